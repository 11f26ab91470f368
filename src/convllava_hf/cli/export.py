"""`convllava export`."""

from dataclasses import asdict
from typing import Annotated

import typer

from .ask import TrustOption
from .options import JsonOption, OutputOption, RevisionOption, print_report, report_errors


def add_export_command(app: typer.Typer) -> None:
    """Adds the command of this module to the command line."""
    app.command()(export)


def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Hub id or folder.", show_default=False)],
    *,
    to: Annotated[
        str, typer.Option(metavar="onnx|openvino|executorch|web|gguf", help="What shall run it.", show_default=False)
    ],
    output: OutputOption,
    quantize: Annotated[str | None, typer.Option(metavar="int8|int4", help="Smaller weights, faster.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder that holds an export.")] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
):
    """Take a checkpoint to another runtime: ONNX Runtime, OpenVINO, ExecuTorch, a web page, llama.cpp.

    Takes ConvLLaVA and the LLaVA family. What was written is run and compared with the checkpoint, token by token,
    before the folder gets its name; sizes, differences and speed are printed.

    \b
    Examples:
      convllava export MODEL --to onnx --output model-onnx
      convllava ask photo.jpg "What is this?" -m model-onnx --runtime onnx
      convllava export MODEL --to openvino --quantize int8 --output model-int8
      convllava export MODEL --to web --quantize int8 --output model-web
      convllava export llava-v1.5-7b-hf --to gguf --output llava-gguf
    """
    with report_errors():
        from ..export.run import export_checkpoint
        from ..registration import register

        register()
        report = export_checkpoint(checkpoint, to, output, quantize, force, revision, trust_remote_code)
        print_report(as_json, asdict(report), report.summary())
