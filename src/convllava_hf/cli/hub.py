"""The commands around the Hub: `convllava push`, `pull`, `info` and `doctor`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import CheckFailed, ForceOption, JsonOption, RevisionOption, print_report, report_errors


FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a checkpoint.", show_default=False)]
RepoArgument = Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub.", show_default=False)]


def add_hub_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    for command in (push, pull, info, doctor):
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
    base: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Base that an adapter shall name. [default: as it says]")
    ] = None,
    delete_other_code: Annotated[
        bool, typer.Option("--delete-other-code", help="Delete *.py of the repository that are not this package's.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list files, sizes and what would change.")] = False,
    as_json: JsonOption = False,
):
    """Publish a checkpoint on the Hub in one commit.

    Weights, code, template, configurations and card.
    What is interrupted goes on with the same command, and nothing is visible before all has arrived. Log in with
    `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      convllava push my-model someone/my-model --dry-run
      convllava push my-model someone/my-model --private
      convllava push my-model someone/my-model --create-pr --message "Better weights"
    """
    with report_errors():
        from ..hub.push import push_checkpoint

        report = push_checkpoint(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message,
            shard_size=shard_size,
            base=base,
            delete_other_code=delete_other_code,
            dry_run=dry_run,
        )
        changes = [
            {"name": name, "change": change, "bytes": size} for name, (change, size) in sorted(report.changes.items())
        ]
        print_report(as_json, {**asdict(report), "changes": changes}, report.summary())


def pull(
    repo_id: RepoArgument,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to make. [default: the cache]")
    ] = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
):
    """Fetch a checkpoint, checked by the Hub's hashes.

    Prints where it lies.
    What is interrupted goes on with the same command. What is in the cache is also found offline.

    \b
    Examples:
      convllava pull someone/my-model
      convllava pull someone/my-model --revision v1.0 --output my-model
    """
    with report_errors():
        from ..checkpoints.adapters import is_adapter, read_adapter
        from ..hub.pull import pull_checkpoint

        folder = pull_checkpoint(repo_id, output, revision, force=force)
        base = read_adapter(folder).base if is_adapter(folder) else None
        if is_adapter(folder):
            print(f"an adapter of {base or 'BASE'}: convllava merge {folder} --output DIR joins them", file=sys.stderr)
        print_report(as_json, {"output": folder, "base": base}, str(folder))


def info(
    source: Annotated[str, typer.Argument(metavar="DIR|REPO_ID", help="Folder or Hub id.", show_default=False)],
    *,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
):
    """Say what a checkpoint is, without reading its weights.

    Parts, parameters, tokens per image, memory, template, origin. Takes original-format checkpoints too. Of a
    repository on the Hub a few kilobytes are fetched.

    \b
    Examples:
      convllava info my-model
      convllava info ConvLLaVA/ConvLLaVA-sft-1536 --json
    """
    with report_errors():
        from ..hub.info import describe_checkpoint

        described = describe_checkpoint(source, revision)
        print_report(as_json, asdict(described), described.summary())


def doctor(folder: FolderArgument, as_json: JsonOption = False):
    """Check everything in a checkpoint; exit code 1 where something is wrong.

    Tensors against the configuration, their values, the tokenizer, the chat template, the code files, and the hashes of
    the conversion.

    \b
    Example:
      convllava doctor my-model && convllava push my-model someone/my-model
    """
    with report_errors():
        from ..hub.doctor import check_checkpoint
        from ..registration import register

        register()
        checks = check_checkpoint(folder)
        lines = [
            f"{'wrong' if check.problem else 'ok':6} {check.name}{f': {check.problem}' if check.problem else ''}"
            for check in checks
        ]
        print_report(as_json, {"checks": [asdict(check) for check in checks]}, "\n".join(lines))
        if wrong := sum(check.problem is not None for check in checks):
            raise CheckFailed(f"{wrong} of {len(checks)} checks of {folder} found something wrong.")
