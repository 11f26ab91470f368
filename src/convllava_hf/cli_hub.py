"""The commands around the Hub: `convllava push`, `pull`, `info` and `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import ForceOption, report_errors


FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a checkpoint.", show_default=False)]
RepoArgument = Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub.", show_default=False)]
RevisionOption = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub.")]


def add_hub_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    for command in (push, pull):
        app.command()(command)


def push(
    folder: FolderArgument,
    repo_id: RepoArgument,
    *,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository. [default: as the owner set]")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch, made if it is not there. [default: main]")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest weight file, such as 5GB. [default: as they are]")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="Title of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list files, sizes and what would change.")] = False,
):
    """Publish a checkpoint on the Hub in one commit: weights, code, template, configurations and card.

    What is interrupted goes on with the same command, and nothing is visible before all has arrived. Log in with
    `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      convllava push my-model someone/my-model --dry-run
      convllava push my-model someone/my-model --private
      convllava push my-model someone/my-model --create-pr --message "Better weights"
    """
    with report_errors():
        from .hub import push_checkpoint

        report = push_checkpoint(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message,
            shard_size=shard_size,
            dry_run=dry_run,
        )
        print(report.summary())


def pull(
    repo_id: RepoArgument,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to make. [default: the cache]")
    ] = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
):
    """Fetch a checkpoint, compare every file with the hash that the Hub lists, and print where it lies.

    What is interrupted goes on with the same command. What is in the cache is also found offline.

    \b
    Examples:
      convllava pull someone/my-model
      convllava pull someone/my-model --revision v1.0 --output my-model
    """
    with report_errors():
        from .hub import pull_checkpoint

        print(pull_checkpoint(repo_id, output, revision, force=force))
