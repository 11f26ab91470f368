"""`convllava ask` and `chat`."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOption, RevisionOption, TrustOption, print_error, print_json, report_errors


ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="MODEL", help="Checkpoint: a Hub id or a path.", show_default=False)
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps ... [default: the best there is]")
]
DtypeOption = Annotated[str, typer.Option(metavar="NAME", help="auto, bfloat16, float16 or float32.")]
QuantizeOption = Annotated[
    str | None, typer.Option(metavar="4bit|8bit|int8", help="Smaller weights: by bitsandbytes, or torchao's int8.")
]
AttentionOption = Annotated[str | None, typer.Option(metavar="NAME", help="sdpa, eager, flash_attention_2 ...")]
RuntimeOption = Annotated[
    str | None, typer.Option(metavar="onnx|openvino|executorch", help="MODEL is an export for this runtime.")
]
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


def add_ask_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    for command in (ask, chat):
        app.command()(command)


def ask(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE... QUESTION", help="Paths or URLs of images, then the question.", show_default=False
        ),
    ] = None,
    *,
    model: ModelOption,
    as_json: JsonOption = False,
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
    runtime: RuntimeOption = None,
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
        from ..inference.answer import answer

        images = [open_image(image, corner) for image in images]  # what is wrong here shows before the weights load
        loaded, processor = load_model(
            model, device, dtype, quantize, attn_implementation, revision, trust_remote_code, seed, runtime
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
        report = {"answer": "".join(stream), "model": model, **asdict(stream.stats)}
        print_json({**report, "tokens_per_second": stream.stats.tokens_per_second})


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
    runtime: RuntimeOption = None,
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
        from ..inference.answer import answer

        shown = [open_image(image, corner) for image in images or []]
        loaded, processor = load_model(
            model, device, dtype, quantize, attn_implementation, revision, trust_remote_code, seed, runtime
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
    from ..images import fit_to_corner, load_image

    image = load_image(source)
    return fit_to_corner(image, corner) if corner else image


def is_file(name: str) -> bool:
    try:
        return Path(os.path.expanduser(name)).is_file()
    except (OSError, RuntimeError, ValueError):  # a question may be longer than any path, or start with ~
        return False


def load_model(model, device, dtype, quantize, attn_implementation, revision, trust_remote_code, seed, runtime=None):
    """Registers our classes, which the package leaves to the commands, and loads; arguments as for `inference.load`."""
    from transformers import set_seed

    from ..checkpoints.templates import render_chat_template
    from ..inference.load import load
    from ..registration import register

    register()
    if seed is not None:
        set_seed(seed)
    loaded = load(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
        runtime=runtime,
    )
    if loaded[1].chat_template:  # of strangers: a question of one word must not take the machine
        content = [{"type": "image"}, {"type": "text", "text": "Hello"}]
        render_chat_template(loaded[1], [{"role": "user", "content": content}])
    return loaded


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
