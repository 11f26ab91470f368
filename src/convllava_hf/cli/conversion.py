"""`convllava convert` and `init`."""

from typing import Annotated

import typer

from .options import (
    ForceOption,
    JsonOption,
    OutputOption,
    RevisionOption,
    ShardOption,
    StoredDtypeOption,
    print_report,
    report_errors,
)


def add_conversion_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    for command in (convert, init):
        app.command()(command)


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hub id or folder.", show_default=False)],
    *,
    output: OutputOption,
    vision_tower: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Hub id or folder of the tower. [default: as SOURCE says]")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Of a LoRA or a projector: what it was trained on.")
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Write a LoRA as a PEFT adapter of a converted --base.")
    ] = False,
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a template. [default: what SOURCE was trained with]")
    ] = None,
    dtype: StoredDtypeOption = "auto",
    revision: RevisionOption = None,
    vision_revision: Annotated[str | None, typer.Option(metavar="NAME", help="The same, of the tower.")] = None,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    as_json: JsonOption = False,
):
    """Convert a released checkpoint, or a vision tower, exactly.

    Takes ConvLLaVA, LLaVA, LLaVAR and TinyLLaVA, and vision towers alone.
    With a ConvNeXt tower the result is a ConvLLaVA model; with CLIP or SigLIP it is a `llava` of transformers.

    Streams the weights into safetensors, adds the image token, writes everything that belongs to a checkpoint, and
    reads it back. Every tensor of the source is accounted for in DIR/conversion_report.json.

    \b
    Examples:
      convllava convert ConvLLaVA/ConvLLaVA-sft-1536 --output ConvLLaVA-sft-1536-hf
      convllava convert liuhaotian/llava-v1.5-7b --output llava-v1.5-7b-hf
      convllava convert llava-lora --base lmsys/vicuna-7b-v1.5 --output finetuned
      convllava convert ./llm --vision-tower ./vision --dtype float16 --output converted
      convllava convert ConvLLaVA/LAION-CLIP-ConvNeXt-Large-512 --output tower
    """
    with report_errors():
        from ..conversion.convert import convert_checkpoint
        from ..registration import register

        register()
        report = convert_checkpoint(
            source,
            output,
            vision_tower=vision_tower,
            base=base,
            keep_adapter=keep_adapter,
            chat_template=chat_template,
            revision=revision,
            vision_revision=vision_revision,
            dtype=dtype,
            max_shard_size=max_shard_size,
            force=force,
        )
        if keep_adapter:
            print_report(as_json, {"output": report}, f"wrote {report}")
        else:
            print_report(as_json, {"output": report.output, **report.content}, report.summary())


def init(
    *,
    vision: Annotated[
        str, typer.Option("--vision", "--vision-tower", metavar="SOURCE", help="Tower: Hub id or folder.")
    ],
    text: Annotated[str, typer.Option(metavar="SOURCE", help="Causal language model: Hub id or folder.")],
    output: OutputOption,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size", "--resolution", metavar="PIXELS", help="Side of the square images. [default: the tower's]"
        ),
    ] = None,
    add_stage: Annotated[
        str | None, typer.Option(metavar="BLOCKSxWIDTH", help="A fresh stage behind the tower's last, such as 6x3072.")
    ] = None,
    projector_type: Annotated[str, typer.Option(metavar="NAME", help="mlpNx_gelu or linear.")] = "mlp2x_gelu",
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a template. [default: that of the language model's family]")
    ] = None,
    dtype: StoredDtypeOption = "auto",
    vision_revision: Annotated[str | None, typer.Option(metavar="NAME", help="Revision of the tower.")] = None,
    text_revision: Annotated[str | None, typer.Option(metavar="NAME", help="Revision of the language model.")] = None,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the fresh weights.")] = 0,
    as_json: JsonOption = False,
):
    """Build a new model from a tower and a language model.

    The projector, and a stage added to the tower, have fresh weights: the first training stage comes next. A ConvNeXt,
    ConvNeXt V2, DINOv3 ConvNeXt or FastViT, of transformers or timm, makes a ConvLLaVA; CLIP and SigLIP make a `llava`
    of transformers.

    \b
    Examples:
      convllava init --vision ConvLLaVA/LAION-CLIP-ConvNeXt-Large-512 --text Qwen/Qwen3-0.6B \\
          --image-size 1536 --add-stage 6x3072 --output my-convllava
      convllava init --vision timm/fastvit_mci3.apple_mclip2_dfndr2b --text Qwen/Qwen3-0.6B --image-size 1024 -o mine
      convllava init --vision openai/clip-vit-large-patch14-336 --text lmsys/vicuna-7b-v1.5 --output my-llava
    """
    with report_errors():
        from ..conversion.init import init_model
        from ..registration import register

        register()
        report = init_model(
            vision,
            text,
            output,
            resolution=image_size,
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
        print_report(as_json, {"output": report.output, **report.content}, report.summary())
