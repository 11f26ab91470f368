"""Putting a finished folder in place: it is written beside its name and gets the name when it is whole."""

import errno
import glob
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


# Room on the disk for the small files beside the weights.
SPARE_BYTES = 32 * 2**20


# Names an export, whose folders are its own.
EXPORT_MANIFEST = "export.json"


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def stage_output(output: Path, num_bytes: int, force: bool, resume: str | None = None) -> Iterator[Path]:
    """Gives an empty folder beside `output` and moves it there when the block ends well; else removes it.

    Args:
        output: where the result shall be. An empty folder counts as free.
        num_bytes: bytes that will be written.
        force: replace a model folder that is there. What is no model folder is never replaced.
        resume: names the work that is done. Where it ends badly the folder stays, and the same name finds it again.

    Yields:
        The folder to write to.

    Raises:
        ConversionError: `output` exists, its place does not take files, or the disk is too small or fills up.
    """
    output = Path(os.path.expanduser(output)).resolve()
    check_output(output, force)
    replaced = output.exists() and any(output.iterdir())
    mark = resume or secrets.token_hex(4)
    staging = output.parent / f".{output.name}.incomplete-{mark}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in staging.rglob("*")) if staging.exists() else 0
        free = shutil.disk_usage(output.parent).free + there
        if free < num_bytes + SPARE_BYTES:
            raise ConversionError(
                f"{output.parent} has {free / 1e9:.2f} GB free; expected {(num_bytes + SPARE_BYTES) / 1e9:.2f} GB. "
                "Free some space or choose another --output."
            )
        staging.mkdir(exist_ok=resume is not None)
        for stale in sorted(set(output.parent.glob(f".{glob.escape(output.name)}.incomplete-*")) - {staging}):
            logger.warning(f"{stale} was left by a run that was killed, or is still written to; if not, delete it.")
        yield staging
        if replaced:
            old = output.parent / f".{output.name}.replaced-{mark}"
            output.rename(old)
            try:
                staging.rename(output)
            except BaseException:
                old.rename(output)
                raise
            shutil.rmtree(old)
        else:
            staging.rename(output)
    except Exception as error:
        # Libraries in Rust report a full disk as a plain exception with the number in its text.
        number = getattr(error, "errno", None) or next(iter(re.findall(r"os error (\d+)", str(error))), None)
        if isinstance(error, ConversionError) or number is None:
            raise
        number = int(number)
        fix = "Free some space or choose another --output." if number in NO_SPACE else "Choose another --output."
        left = f"Nothing was left under {output.name}."
        if resume:
            left += f" What is finished lies in {staging.name}; the same command goes on from there."
        raise ConversionError(f"writing to {output.parent} failed: {os.strerror(number)}. {fix} {left}") from error
    finally:
        if not resume:
            shutil.rmtree(staging, ignore_errors=True)


def check_output(output: Path, force: bool):
    """Checks that a result may be put at `output`, before any work is done.

    Raises:
        ConversionError: a file or folder is there; with `force`, only if it is not the folder of a model, or holds
            folders, such as the checkpoints of a training run, beside it.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise ConversionError(f"{output} exists. Choose another --output, or pass --force to replace it.")
    if (output / EXPORT_MANIFEST).is_file():
        return
    if not (output / "config.json").is_file():
        raise ConversionError(
            f"{output} is not the folder of a model (it has no config.json), so --force does not replace it. Choose "
            "another --output, or delete it yourself."
        )
    folders = sorted(path.name for path in output.iterdir() if path.is_dir() and not path.name.startswith("."))
    if folders:
        raise ConversionError(
            f"{output} holds folders beside a model ({', '.join(folders[:5])}), so --force does not replace it. Choose "
            "another --output, or delete it yourself."
        )
