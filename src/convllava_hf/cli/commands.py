"""How `convllava` shows its commands, and the option that all of them have."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperGroup

from .options import be_quiet


QuietOption = Annotated[bool, typer.Option("--quiet", help="Write nothing to stderr but errors.")]


class CommandGroup(TyperGroup):
    """A list of commands in which no line is cut off."""

    def format_commands(self, ctx, formatter) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, (command.help or "").strip().split("\n")[0]) for name, command in commands if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def accept_quiet(app: typer.Typer) -> None:
    """Gives every command of an app, and of the groups inside it, the option `--quiet`."""
    for command in app.registered_commands:
        command.callback = _add_quiet(command.callback)
    for group in app.registered_groups:
        accept_quiet(group.typer_instance)


def _add_quiet(command: Callable) -> Callable:
    @functools.wraps(command)
    def run(*args, quiet: QuietOption = False, **kwargs):
        be_quiet(quiet)
        return command(*args, **kwargs)

    signature = inspect.signature(command)
    quiet = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), quiet])
    run.__annotations__ = {**command.__annotations__, "quiet": QuietOption}
    return run
