"""The command line `convllava`: its commands come from one file per topic.

Heavy imports happen inside the commands, so that `convllava --help` answers at once. Answers go to stdout; progress,
warnings and errors go to stderr. Exit codes: see `options`.
"""

from typing import Annotated

import typer

from .. import __version__
from .ask import add_ask_commands
from .commands import CommandGroup, accept_quiet
from .conversion import add_conversion_commands
from .data import add_data_commands
from .deltas import add_delta_commands
from .environment import add_environment_command
from .evaluation import add_evaluation_commands
from .export import add_export_command
from .hub import add_hub_commands
from .serving import add_serving_command
from .training import add_training_commands


HELP = """ConvLLaVA: vision-language models that read high-resolution images in few tokens.

\b
Exit codes:
  0    done
  1    a check failed, or the machine could not do it (out of memory)
  2    the command line is wrong
  3    something about the input is wrong: a file, a setting, a checkpoint
  130  interrupted

Every command takes --quiet, and those that report take --json.
"""

app = typer.Typer(
    cls=CommandGroup,
    help=HELP,
    no_args_is_help=True,
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
    add_environment_command,
    add_evaluation_commands,
    add_export_command,
    add_hub_commands,
    add_serving_command,
    add_training_commands,
):
    add_commands(app)
accept_quiet(app)
