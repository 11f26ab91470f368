"""The commands around deltas: `apply-delta` and `make-delta`."""

from typing import Annotated

import typer

from .options import ForceOption, JsonOption, OutputOption, ShardOption, print_report, report_errors


BaseOption = Annotated[str, typer.Option(metavar="SOURCE", help="LLaMA: Hub id or folder.", show_default=False)]
BaseRevisionOption = Annotated[str | None, typer.Option(metavar="NAME", help="Revision of the LLaMA on the Hub.")]


def add_delta_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    for command in (apply_delta, make_delta):
        app.command()(command)


def apply_delta(
    *,
    base: BaseOption,
    delta: Annotated[str, typer.Option(metavar="SOURCE", help="Delta: Hub id or folder.", show_default=False)],
    output: OutputOption,
    base_revision: BaseRevisionOption = None,
    delta_revision: Annotated[str | None, typer.Option(metavar="NAME", help="Revision of the delta.")] = None,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    as_json: JsonOption = False,
):
    """Merge a released delta with its LLaMA, exactly.

    Takes the deltas of LLaVA v0 and v1 and of LLaVAR, in little memory. Writes the checkpoint in its original layout,
    as safetensors; `convllava convert` takes it on. A wrong base is named before anything is written. If the command is
    interrupted, run it again: it goes on where it was.

    \b
    Example:
      convllava apply-delta --base llama-13b --delta liuhaotian/LLaVA-13b-delta-v0 --output llava-13b-v0
      convllava convert llava-13b-v0 --output llava-13b-v0-hf
    """
    with report_errors():
        from ..conversion import deltas

        report = deltas.apply_delta(
            base,
            delta,
            output,
            base_revision=base_revision,
            delta_revision=delta_revision,
            max_shard_size=max_shard_size,
            force=force,
        )
        print_report(as_json, {"output": report.output, **report.content}, report.summary())


def make_delta(
    *,
    base: BaseOption,
    target: Annotated[str, typer.Option(metavar="SOURCE", help="Checkpoint in the original layout.")],
    output: OutputOption,
    base_revision: BaseRevisionOption = None,
    target_revision: Annotated[str | None, typer.Option(metavar="NAME", help="Revision of the checkpoint.")] = None,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    as_json: JsonOption = False,
):
    """Take the LLaMA off a checkpoint: the inverse of apply-delta.

    The base's hashes go into the delta, so apply-delta recognises it. float16 cannot hold every difference: the report
    says how many values will not come back bit for bit.

    \b
    Example:
      convllava make-delta --base llama-13b --target llava-13b-v0 --output llava-13b-delta
    """
    with report_errors():
        from ..conversion import deltas

        report = deltas.make_delta(
            base,
            target,
            output,
            base_revision=base_revision,
            target_revision=target_revision,
            max_shard_size=max_shard_size,
            force=force,
        )
        print_report(as_json, {"output": report.output, **report.content}, report.summary())
