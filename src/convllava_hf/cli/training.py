"""The commands around training: `train`, `recipe`, `plan`, `merge`, `extract-projector` and `insert-projector`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    ForceOption,
    JsonOption,
    OutputOption,
    ShardOption,
    StoredDtypeOption,
    TrustOption,
    print_json,
    print_report,
    report_errors,
)


# What the other commands call it -> what recipes call it.
TRL_NAMES = {
    "--model": "--model_name_or_path",
    "--data": "--dataset_name",
    "--output": "--output_dir",
    "--image-size": "--image_size",
    "--chat-template": "--chat_template_path",
}


def add_training_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
    for command in (recipe, plan, merge, extract_projector, insert_projector):
        app.command()(command)


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a config file of `trl sft`.")],
    flags: Annotated[bool, typer.Option("--flags", help="List every setting, with its meaning and default.")] = False,
):
    """Train by a recipe; --KEY VALUE replaces any of its settings.

    --model, --data, --output, --image-size and --chat-template are understood as TRL's names for them.

    Does what `trl sft --config RECIPE` does, and what that cannot: learning rates per part, batches grouped by modality
    and length, long rows cut without cutting images, curves, checkpoints that a full disk or a crash leaves whole.

    \b
    Examples:
      convllava recipe                                            # the recipes there are
      convllava train convllava_stage1 --model_name_or_path CHECKPOINT --dataset_name DATA
      convllava train custom_finetune_lora --model_name_or_path CHECKPOINT --dataset_name DATA \\
        --projector_learning_rate 2e-5 --output_dir tuned
      convllava train my.yaml --resume_from_checkpoint last
      accelerate launch --config_file fsdp2.yaml $(which convllava) train convllava_stage3 ...
    """
    with report_errors():
        from ..registration import register
        from ..training.run import format_settings, run_recipe

        if flags:
            print(format_settings())
            return
        register()
        run_recipe(recipe, spell_as_trl(context.args))


def spell_as_trl(arguments: list[str]) -> list[str]:
    """Settings by the names that the other commands have for them, under the names of TRL."""
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelled.append(TRL_NAMES.get(name, name) + equals + value)
    return spelled


def recipe(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Of a recipe.", show_default=False)] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe instead of its path.")] = False,
    as_json: JsonOption = False,
):
    """List the recipes, or print the path of one (for `trl sft --config`)."""
    with report_errors():
        from ..shipped import find_file, list_titles, read_titles

        if name is None:
            print_report(as_json, {"recipes": read_titles("recipe")}, list_titles("recipe"))
        else:
            file = find_file("recipe", name)
            text = file.read_text(encoding="utf-8")
            print_report(as_json, {"path": file, **({"text": text} if show else {})}, text if show else str(file))


def plan(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub id.", show_default=False)],
    *,
    stage: Annotated[int, typer.Option(metavar="1|2|3", help="Which of the three stages.", show_default=False)],
    vision_from: Annotated[
        str | None,
        typer.Option(
            metavar="stageN[.B]", help="Stage 2: where the trained part of the tower begins. [default: stage3]"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Of weights, gradients and AdamW's moments.")] = "float32",
    memory: Annotated[
        bool, typer.Option("--memory", help="What each GPU holds by the stage's recipes, activations included.")
    ] = False,
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="With --memory: from one GPU to so many.")] = 1,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="With --memory: side of the images. [default: the checkpoint's]"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="With --memory: length of the rows. [default: the recipe's longest]")
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
):
    """Show what a training stage trains, and the memory it takes.

    Reads the names and shapes of the weights, not the weights.

    \b
    Examples:
      convllava plan CHECKPOINT --stage 2 --vision-from stage3.9
      convllava plan CHECKPOINT --stage 3 --memory --gpus 8
    """
    with report_errors():
        import torch

        from ..checkpoints.architecture import check_source
        from ..checkpoints.cards import read_outline
        from ..checkpoints.shapes import count_parameters
        from ..hub.info import list_tensors
        from ..training.plans import get_trainable, plan_stored

        size = getattr(torch, dtype, None)
        if not isinstance(size, torch.dtype) or not size.is_floating_point:
            raise ValueError(f"dtype={dtype!r}; expected float32, bfloat16 or float16.")
        check_source(checkpoint)
        config = read_outline(checkpoint, trust_remote_code)
        if vision_from is not None and stage != 2:
            raise ValueError(f"--vision-from {vision_from} is for stage 2, which trains a part of the tower.")
        patterns = get_trainable(config, stage, vision_from or "stage3")
        if memory:
            from transformers import AutoConfig, AutoImageProcessor

            from ..registration import register
            from ..training.memory import plan_memory

            register()
            config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
            if image_size is None:
                size = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code).size
                image_size = size.get("height") or size["shortest_edge"]
            table = plan_memory(config, stage, patterns, gpus=gpus, image_size=image_size, tokens=tokens)
            print_json({"stage": stage, "image_size": image_size, "recipes": table}) if as_json else print_memory(table)
            return
        planned = plan_stored(count_parameters(list_tensors(checkpoint)), patterns)
        rows = [(part.part, part.trainable, part.frozen, part.estimate_bytes(size)) for part in planned]
        if as_json:
            parts = [dict(zip(("part", "trainable", "frozen", "bytes"), row, strict=True)) for row in rows]
            print_json({"stage": stage, "dtype": dtype, "trained": patterns, "parts": parts})
            return
        rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
        width = max(len(row[0]) for row in rows)
        print(f"{'part':{width}}  {'trainable':>15}  {'frozen':>15}  {'GB':>8}")
        for part, trainable, frozen, num_bytes in rows:
            print(f"{part:{width}}  {trainable:>15,}  {frozen:>15,}  {num_bytes / 1e9:>8.3f}")
        print(
            f"\nGB: weights, and gradients and both moments of AdamW where trained, all in {dtype}; --memory adds "
            "activations. Sharding (FSDP2, ZeRO-3) divides it by the number of GPUs.\n\nIn a recipe:"
        )
        listed = f"[{', '.join(map(repr, patterns))}]".replace("\\\\", "\\")
        # Other classes do not take `trainable`; `convllava train` freezes them by the trainer's own argument.
        is_ours = config.model_type == "convllava"
        print(f"model_init_kwargs:\n  trainable: {listed}" if is_ours else f"trainable: {listed}")


def print_memory(table: list[dict]) -> None:
    """Prints the rows of `plan_memory` in GB, each recipe with the batch that it was played with."""
    columns = ("weights", "gradients", "moments", "activations", "total")
    width = max(len(row["recipe"]) for row in table)
    print(f"{'GB per GPU':{width}}  GPUs  rows x tokens  " + "  ".join(f"{column:>11}" for column in columns))
    for row in table:
        batch = f"{row['rows']} x {row['tokens']}"
        sizes = "  ".join(f"{row[column] / 1e9:>11.2f}" for column in columns)
        print(f"{row['recipe']:{width}}  {row['gpus']:>4}  {batch:>13}  {sizes}")
    print(
        "\nThe most that a step takes, with activations recomputed. On several GPUs FSDP2 or ZeRO-3 divide weights, "
        "gradients and moments; recipes with adapters divide nothing. Leave a few GB for the CUDA context and for "
        "gaps between tensors."
    )


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT adapter.", show_default=False)],
    *,
    output: OutputOption,
    base: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Hub id or folder of the base. [default: as ADAPTER says]")
    ] = None,
    dtype: StoredDtypeOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
):
    """Make one checkpoint of a base model and an adapter.

    The adapter is LoRA's, or a projector that PEFT trained.

    \b
    Example:
      convllava merge convllava_stage3_lora --output merged
    """
    with report_errors():
        from ..conversion.parts import merge_adapter
        from ..registration import register

        register()
        path = merge_adapter(adapter, output, base=base, dtype=dtype, force=force)
        print_report(as_json, {"output": path}, f"wrote {path}")


def extract_projector(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint or adapter.", show_default=False)],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help=".safetensors, or .bin as LLaVA's mm_projector.bin.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: JsonOption = False,
):
    """Take the projector out of a checkpoint, for example after stage 1.

    \b
    Example:
      convllava extract-projector convllava_stage1 --output mm_projector.bin
    """
    with report_errors():
        from ..conversion.parts import extract_projector

        path = extract_projector(source, output, force=force)
        print_report(as_json, {"output": path}, f"wrote {path}")


def insert_projector(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder.", show_default=False)],
    *,
    projector: Annotated[
        Path, typer.Option(metavar="FILE", help="mm_projector.bin, .safetensors, a checkpoint or an adapter.")
    ],
    output: OutputOption,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    as_json: JsonOption = False,
):
    """Copy a checkpoint with another projector in it.

    \b
    Example:
      convllava insert-projector CHECKPOINT --projector mm_projector.bin --output with_projector
    """
    with report_errors():
        from ..conversion.parts import insert_projector

        path = insert_projector(checkpoint, projector, output, max_shard_size=max_shard_size, force=force)
        print_report(as_json, {"output": path}, f"wrote {path}")
