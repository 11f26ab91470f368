"""The command line: `convllava ask`, `chat`, `convert` and `init`.

Heavy imports happen inside the commands, so that `convllava --help` answers at once. Answers go to stdout; progress,
warnings and errors go to stderr. Exit codes: 0 done, 1 the machine failed, 2 something about the input is wrong, 130
interrupted.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .cli_data import add_data_commands
from .cli_deltas import add_delta_commands
from .cli_hub import add_hub_commands
from .cli_options import ForceOption, OutputOption, ShardOption, StoredDtypeOption, print_error, report_errors
from .cli_serving import add_serving_command
from .cli_training import add_training_commands


app = typer.Typer(
    help="ConvLLaVA: ask questions about high-resolution images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="MODEL", help="Checkpoint: a Hub id or a path.", show_default=False)
]
RevisionOption = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub.")]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps ... [default: the best there is]")
]
DtypeOption = Annotated[str, typer.Option(metavar="NAME", help="auto, bfloat16, float16 or float32.")]
QuantizeOption = Annotated[str | None, typer.Option(metavar="4bit|8bit", help="Smaller weights, by bitsandbytes.")]
AttentionOption = Annotated[str | None, typer.Option(metavar="NAME", help="sdpa, eager, flash_attention_2 ...")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
ImageTokensOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Most tokens per image; fewer are faster and see less. [default: as trained]"
    ),
]
CornerOption = Annotated[
    int | None,
    typer.Option(
        "--fit-to-corner", metavar="PIXELS", min=1, help="Put images into the corner of a black square, as LLaVAR does."
    ),
]
NewTokensOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Longest answer, in tokens. [default: 512, or what fits]")
]
TemperatureOption = Annotated[
    float, typer.Option(metavar="T", min=0, help="0 is the most likely answer, above 0 samples.")
]
SeedOption = Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")]

CHAT_HELP = """\
/image PATH...  show images (paths or URLs) with the next question
/reset          forget the conversation
/help           this list
/exit           leave (or Ctrl-D); Ctrl-C stops an answer"""
# What looks like the name of an image: then it is a mistyped path and no question.
IMAGE_NAME = re.compile(r"\S+\.(avif|bmp|gif|jpe?g|jp2|png|tiff?|webp)", re.IGNORECASE)


def print_version(wanted: bool):
    if wanted:
        print(f"convllava {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass  # the options of `convllava` itself


@app.command()
def ask(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE... QUESTION", help="Paths or URLs of images, then the question.", show_default=False
        ),
    ] = None,
    *,
    model: ModelOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with counts and times.")] = False,
    max_image_tokens: ImageTokensOption = None,
    corner: CornerOption = None,
    max_new_tokens: NewTokensOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    attn_implementation: AttentionOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
):
    """Answer one question about images, printing the answer as it forms.

    The last argument is the question, those before it are images. The question comes from standard input if it is
    "-", or if there is none and something is piped in.

    \b
    Examples:
      convllava ask photo.jpg "What is written on the sign?" -m MODEL
      convllava ask before.png after.png "What changed?" -m MODEL
      convllava ask https://example.com/page.png "Summarise this." -m MODEL --max-image-tokens 256
      convllava ask scan.tif -m MODEL --json < question.txt
      convllava ask photo.jpg "What is this?" -m MODEL --device cuda --quantize 4bit
    """
    with report_errors():
        images, question = split_inputs(inputs or [])
        from .inference import answer

        images = [open_image(image, corner) for image in images]  # what is wrong here shows before the weights load
        loaded, processor = load_model(
            model, device, dtype, quantize, attn_implementation, revision, trust_remote_code, seed
        )
        stream = answer(
            loaded,
            processor,
            question,
            images,
            max_new_tokens=max_new_tokens,
            stream=True,
            max_image_tokens=max_image_tokens,
            temperature=temperature,
        )
        if not as_json:
            print_stream(stream)
            return
        text, stats = "".join(stream), stream.stats
        report = {
            "answer": text,
            "model": model,
            "image_tokens": stats.image_tokens,
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": stats.new_tokens,
            "finish_reason": stats.finish_reason,
            "seconds_to_first_token": stats.seconds_to_first_token,
            "seconds": stats.seconds,
            "tokens_per_second": stats.tokens_per_second,
        }
        print(json.dumps(report, ensure_ascii=False))


@app.command()
def chat(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Images for the first question.", show_default=False),
    ] = None,
    *,
    model: ModelOption,
    max_image_tokens: ImageTokensOption = None,
    corner: CornerOption = None,
    max_new_tokens: NewTokensOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    attn_implementation: AttentionOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
):
    """Talk about images; every answer takes the whole conversation into account.

    Each line is a question. Lines may also be piped in; then the first error ends the chat.

    \b
    Commands inside the chat:
      /image PATH...  show images (paths or URLs) with the next question
      /reset          forget the conversation
      /help           list the commands
      /exit           leave (or Ctrl-D); Ctrl-C stops an answer

    \b
    Examples:
      convllava chat photo.jpg -m MODEL
      convllava chat -m MODEL < lines.txt
    """
    with report_errors():
        from .inference import answer

        shown = [open_image(image, corner) for image in images or []]
        loaded, processor = load_model(
            model, device, dtype, quantize, attn_implementation, revision, trust_remote_code, seed
        )
        history, interactive = [], sys.stdin.isatty()
        if interactive:
            print(CHAT_HELP, file=sys.stderr)
        for line in read_lines(interactive):
            try:
                command, _, rest = line.strip().partition(" ")
                if command == "/image":
                    if not rest.strip():
                        raise ValueError("/image needs a path or a URL.")
                    shown += [open_image(path, corner) for path in shlex.split(rest)]
                elif command == "/reset":
                    history, shown = [], []
                elif command == "/help":
                    print(CHAT_HELP, file=sys.stderr)
                elif command in ("/exit", "/quit"):
                    return
                elif command.startswith("/"):
                    raise ValueError(f"unknown command {command}; /help lists what there is.")
                elif command:
                    stream = answer(
                        loaded,
                        processor,
                        line.strip(),
                        shown,
                        history,
                        max_new_tokens=max_new_tokens,
                        stream=True,
                        max_image_tokens=max_image_tokens,
                        temperature=temperature,
                    )
                    try:
                        print_stream(stream)
                    except KeyboardInterrupt:
                        if not interactive:
                            raise
                        stream.close()
                        print(flush=True)
                    if stream.text:  # else the question and its images wait for another try
                        history, shown = stream.history, []
            except ValueError as error:
                if not interactive:
                    raise
                print_error(error)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hub id or folder.", show_default=False)],
    *,
    output: OutputOption,
    vision_tower: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Hub id or folder of the tower. [default: as SOURCE says]")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a template. [default: what SOURCE was trained with]")
    ] = None,
    dtype: StoredDtypeOption = "auto",
    revision: RevisionOption = None,
    vision_revision: Annotated[str | None, typer.Option(metavar="NAME", help="The same, of the tower.")] = None,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
):
    """Convert a released checkpoint of ConvLLaVA, LLaVA, LLaVAR or TinyLLaVA, or a vision tower alone, exactly.

    With a ConvNeXt tower the result is a ConvLLaVA model; with CLIP or SigLIP it is a `llava` of transformers.

    Streams the weights into safetensors, adds the image token, writes everything that belongs to a checkpoint, and
    reads it back. Every tensor of the source is accounted for in DIR/conversion_report.json.

    \b
    Examples:
      convllava convert ConvLLaVA/ConvLLaVA-sft-1536 --output ConvLLaVA-sft-1536-hf
      convllava convert liuhaotian/llava-v1.5-7b --output llava-v1.5-7b-hf
      convllava convert ./llm --vision-tower ./vision --dtype float16 --output converted
      convllava convert ConvLLaVA/LAION-CLIP-ConvNeXt-Large-512 --output tower
    """
    with report_errors():
        from .conversion import convert_checkpoint
        from .registration import register

        register()
        report = convert_checkpoint(
            source,
            output,
            vision_tower=vision_tower,
            chat_template=chat_template,
            revision=revision,
            vision_revision=vision_revision,
            dtype=dtype,
            max_shard_size=max_shard_size,
            force=force,
        )
        print(report.summary())


@app.command()
def init(
    *,
    vision: Annotated[str, typer.Option(metavar="SOURCE", help="Tower: Hub id or folder.", show_default=False)],
    text: Annotated[str, typer.Option(metavar="SOURCE", help="Causal language model: Hub id or folder.")],
    resolution: Annotated[int, typer.Option(metavar="PIXELS", help="Side of the square images.", show_default=False)],
    output: OutputOption,
    add_stage: Annotated[
        str | None, typer.Option(metavar="BLOCKSxWIDTH", help="A fresh stage behind the tower's last, such as 6x3072.")
    ] = None,
    projector_type: Annotated[str, typer.Option(metavar="NAME", help="mlpNx_gelu or linear.")] = "mlp2x_gelu",
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="vicuna_v1, chatml or plain. [default: what the tokenizer fits]")
    ] = None,
    dtype: StoredDtypeOption = "auto",
    vision_revision: Annotated[str | None, typer.Option(metavar="NAME", help="Revision of the tower.")] = None,
    text_revision: Annotated[str | None, typer.Option(metavar="NAME", help="Revision of the language model.")] = None,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the fresh weights.")] = 0,
):
    """Build a new model from a tower and a language model, ready for the first training stage.

    The projector, and a stage added to the tower, have fresh weights.

    \b
    Example:
      convllava init --vision ConvLLaVA/LAION-CLIP-ConvNeXt-Large-512 --text Qwen/Qwen3-0.6B \\
          --resolution 1536 --add-stage 6x3072 --output my-convllava
    """
    with report_errors():
        from .conversion import init_model
        from .registration import register

        register()
        report = init_model(
            vision,
            text,
            output,
            resolution=resolution,
            add_stage=add_stage,
            projector_type=projector_type,
            chat_template=chat_template,
            vision_revision=vision_revision,
            text_revision=text_revision,
            dtype=dtype,
            max_shard_size=max_shard_size,
            force=force,
            seed=seed,
        )
        print(report.summary())


def split_inputs(inputs: list[str]) -> tuple[list[str], str]:
    """Tells images from the question.

    Args:
        inputs: the arguments of `ask`, in order.

    Returns:
        Paths and URLs of images, and the question, which is read from stdin where that was meant.

    Raises:
        ValueError: there is no question, or an image file that does not exist stands where the question should be.
    """
    last = inputs[-1] if inputs else ""
    if last and last != "-" and not last.startswith(("http://", "https://", "data:")) and not is_file(last):
        if IMAGE_NAME.fullmatch(last):
            raise ValueError(f"{last}: no such file (the last argument is the question, those before it are images)")
        return inputs[:-1], last
    if last == "-":
        inputs = inputs[:-1]
    elif sys.stdin.isatty():
        raise ValueError(
            'there is no question: write it after the images, as in: convllava ask photo.jpg "What is this?"'
        )
    question = sys.stdin.read().strip()
    if not question:
        raise ValueError("there is no question: none was given after the images, and standard input is empty.")
    return inputs, question


def open_image(source: str, corner: int | None):
    """Loads an image; with `corner` puts it into a black square of that many pixels."""
    from .image_loading import load_image
    from .llava_family import fit_to_corner

    image = load_image(source)
    return fit_to_corner(image, corner) if corner else image


def is_file(name: str) -> bool:
    try:
        return Path(os.path.expanduser(name)).is_file()
    except (OSError, RuntimeError, ValueError):  # a question may be longer than any path, or start with ~
        return False


def load_model(model, device, dtype, quantize, attn_implementation, revision, trust_remote_code, seed):
    """Registers our classes, which the package leaves to the commands, and loads; arguments as for `inference.load`."""
    from transformers import set_seed

    from .inference import load
    from .registration import register

    register()
    if seed is not None:
        set_seed(seed)
    return load(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def print_stream(stream) -> None:
    """Prints the pieces of an answer as they come, and says so on stderr where the answer was cut."""
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)
    if stream.stats.finish_reason == "length":
        print(
            f"(cut after {stream.stats.new_tokens} tokens; --max-new-tokens sets the limit)",
            file=sys.stderr,
            flush=True,
        )


def read_lines(interactive: bool) -> Iterator[str]:
    """Lines of stdin until it ends, with a prompt and editing keys in a terminal."""
    if not interactive:
        yield from sys.stdin
        return
    try:
        import readline  # noqa: F401 -- gives input() its editing keys, where it exists
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


add_delta_commands(app)
add_training_commands(app)
add_data_commands(app)
add_hub_commands(app)
add_serving_command(app)
