"""The command line `convllava`: its commands come from one file per topic.

Heavy imports happen inside the commands, so that `convllava --help` answers at once. Answers go to stdout; progress,
warnings and errors go to stderr. Exit codes: 0 done, 1 the machine failed, 2 something about the input is wrong, 130
interrupted.
"""

from typing import Annotated

import typer

from .. import __version__
from .ask import add_ask_commands
from .conversion import add_conversion_commands
from .data import add_data_commands
from .deltas import add_delta_commands
from .evaluation import add_evaluation_commands
from .export import add_export_command
from .hub import add_hub_commands
from .serving import add_serving_command
from .training import add_training_commands


app = typer.Typer(
    help="ConvLLaVA: ask questions about high-resolution images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


for add_commands in (
    add_ask_commands,
    add_conversion_commands,
    add_data_commands,
    add_delta_commands,
    add_evaluation_commands,
    add_export_command,
    add_hub_commands,
    add_serving_command,
    add_training_commands,
):
    add_commands(app)
