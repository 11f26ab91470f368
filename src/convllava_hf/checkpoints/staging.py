"""Putting a finished folder in place: it is written beside its name and gets the name when it is whole.

A folder made here holds a manifest of its files. Only what the manifest lists, unchanged, is ever replaced.
"""

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from .weight_maps import ConversionError


logger = logging.get_logger(__name__)
MANIFEST = ".convllava-manifest.json"
# Room on the disk for the small files beside the weights.
SPARE_BYTES = 32 * 2**20
# Names an export.
EXPORT_MANIFEST = "export.json"
# Of larger files a manifest has the size alone: weights are not edited by hand, and hashing them takes minutes.
HASHED_BYTES = 2**20
# What torch's own writer says of a write that the system cut short.
TORCH_WRITE_ERRORS = ("iostream error", "PytorchStreamWriter failed", "unexpected pos ")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def stage_output(output: Path, num_bytes: int, force: bool, resume: str | None = None) -> Iterator[Path]:
    """Gives an empty folder beside `output` and moves it there when the block ends well; else removes it.

    Args:
        output: where the result shall be. An empty folder counts as free.
        num_bytes: bytes that will be written.
        force: replace a folder that this package made and nobody has changed since.
        resume: names the work that is done. Where it ends badly the folder stays, and the same name finds it again.

    Yields:
        The folder to write to.

    Raises:
        ConversionError: `output` exists, its place does not take files, or the disk is too small or fills up.
    """
    output = Path(os.path.expanduser(output)).resolve()
    check_output(output, force)
    mark = resume or secrets.token_hex(4)
    staging = output.parent / f".{output.name}.incomplete-{mark}"
    with explain_disk_errors(output, staging.name if resume else None):
        output.parent.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in staging.rglob("*")) if staging.exists() else 0
        free = shutil.disk_usage(output.parent).free + there
        if free < num_bytes + SPARE_BYTES:
            raise ConversionError(
                f"{output.parent} has {free / 1e9:.2f} GB free; expected {(num_bytes + SPARE_BYTES) / 1e9:.2f} GB. "
                "Free some space or choose another --output."
            )
        staging.mkdir(exist_ok=resume is not None)
        name_stale(output, "incomplete", staging)
        try:
            yield staging
            put_in_place(staging, output, force)
        finally:
            if not resume:
                shutil.rmtree(staging, ignore_errors=True)


def put_in_place(staging: Path, output: Path, force: bool):
    """Lists the files of a finished folder and gives it its name.

    Raises:
        ConversionError: see [`check_output`]. The work took its time, and others may have put something there.
    """
    write_manifest(staging)
    check_output(output, force)
    if not output.exists() or not any(output.iterdir()):
        staging.rename(output)
        return
    replaced = output.parent / f".{output.name}.replaced-{secrets.token_hex(4)}"
    output.rename(replaced)
    try:
        staging.rename(output)
    except BaseException:
        replaced.rename(output)
        raise
    try:
        doomed = replaced.with_name(f".{output.name}.incomplete-{secrets.token_hex(4)}")
        replaced.rename(doomed)  # what is half deleted is no model to go back to
        shutil.rmtree(doomed)
    except OSError as error:  # the new one is in its place
        logger.warning(f"what was at {output} before could not be deleted ({error}); delete it yourself.")


@contextmanager
def stage_file(output: Path) -> Iterator[Path]:
    """Gives a name beside `output` to write a file to, which gets its name when the block ends well; else it goes.

    Raises:
        ConversionError: the disk refuses to write.
    """
    staging = output.parent / f".{output.name}.incomplete-{secrets.token_hex(4)}"
    try:
        with explain_disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            yield staging
            os.replace(staging, output)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def explain_disk_errors(output: Path, kept: str | None = None) -> Iterator[None]:
    """Says in one line what the system refused; `kept` names the folder that the same command goes on from."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:  # libraries in Rust and C++ have errors of their own
        number = find_error_number(error)
        if number is None:
            raise
        fix = "Free some space or choose another --output." if number in NO_SPACE else "Choose another --output."
        left = f" What is finished lies in {kept}; the same command goes on from there." if kept else ""
        raise ConversionError(
            f"writing {output} failed: {os.strerror(number)}. Nothing was put there. {fix}{left}"
        ) from error


def find_error_number(error: BaseException | None) -> int | None:
    """The system's number of an error; libraries in Rust and C++ have it, or its words, in their text alone."""
    while error is not None:
        if number := getattr(error, "errno", None):
            return number
        if found := re.search(r"os error (\d+)", str(error)):
            return int(found[1])
        if any(words in str(error) for words in TORCH_WRITE_ERRORS):
            return errno.EIO
        error = error.__cause__
    return None


def write_manifest(folder: Path):
    """Lists the files of a finished folder, with their sizes, and the hashes of small ones."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        files[path.relative_to(folder).as_posix()] = _describe(path)
    (folder / MANIFEST).write_text(json.dumps({"made_by": "convllava-hf", "files": files}, indent=1) + "\n")


def _describe(path: Path) -> dict:
    size = path.stat().st_size
    return {"bytes": size} | ({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if size <= HASHED_BYTES else {})


def list_foreign(folder: Path) -> list[str]:
    """What a folder holds that its manifest does not list, or that was changed since; all, without a manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {**files}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        files = {}
    foreign = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()) and not any(known.startswith(f"{name}/") for known in files):
                foreign.append(f"{name}/")
        elif name != MANIFEST and (path.is_symlink() or not path.is_file() or files.get(name) != _describe(path)):
            foreign.append(name)
    return foreign


def name_stale(output: Path, kind: str, own: Path | None = None):
    """Warns of what killed runs left beside `output`; `own` is this run's."""
    for stale in set(output.parent.glob(f".{glob.escape(output.name)}.{kind}-*")) - {own}:
        logger.warning(f"{stale} was left by a run that was killed, or is still written to; if not, delete it.")


def find_replaced(output: Path) -> Path | None:
    """The model that was at `output` before a run with --force, which was killed while it was replaced."""
    return next(iter(sorted(output.parent.glob(f".{glob.escape(output.name)}.replaced-*"))), None)


def name_replaced(output: Path):
    """Warns of the model that a killed run left beside `output`, see `find_replaced`."""
    if old := find_replaced(output):
        way = "delete it if it is not needed" if os.path.lexists(output) else "rename it to get it back"
        logger.warning_once(f"{old} is the model that was at {output} before a run was killed; {way}.")


def check_output(output: Path, force: bool):
    """Checks that a result may be put at `output`, before any work is done.

    Raises:
        ConversionError: a file or folder is there; with `force`, only if it holds anything that this package did not
            make. Also a mount point, and a place that takes no files.
    """
    if os.path.ismount(output):
        raise ConversionError(
            f"{output} is a mount point, which cannot be replaced. Choose a folder in it for --output."
        )
    name_replaced(output)
    parent = next(parent for parent in output.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConversionError(f"{parent} is no folder that takes files. Choose another --output.")
    if not os.path.lexists(output):
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    if not force:
        raise ConversionError(f"{output} exists. Choose another --output, or pass --force to replace it.")
    foreign = list_foreign(output) if output.is_dir() else [output.name]
    if foreign:
        names = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise ConversionError(
            f"{output} holds what convllava-hf did not make, or what was changed since ({names}), so --force does not "
            "replace it. Choose another --output, or delete it yourself."
        )
