"""The folder of a run: whose it is, who writes to it, and which of its checkpoints are complete."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

MANIFEST = "checkpoint_files.json"
# transformers pushes nothing to the Hub whose name begins so.
IDENTITY = "_run.json"
LOCK = "_run.lock"
UNFINISHED = "_unfinished"  # where a checkpoint or a model is written before it gets its name
REPLACED = ".replaced"  # ends the name of a checkpoint there whose place a newer one takes
WEIGHTS = re.compile(r"(pytorch_|adapter_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
ANEW = "start anew by --overwrite_output_dir true, or choose another output_dir."
# What tells that a folder was used.
TRACES = ("config.json", "adapter_config.json", f"{PREFIX_CHECKPOINT_DIR}-*")


def write_manifest(folder: Path) -> None:
    """Writes down which files a checkpoint has, and how long they are."""
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What a checkpoint lacks, or `None` where every file is there and as long as when it was written."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError):
        sizes = step = None
    if not isinstance(sizes, dict) or not isinstance(step, int):
        return f"its {MANIFEST} or trainer_state.json cannot be read"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run; what newer ones lack is said."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {folder: folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for folder in folders if folder.is_dir()}
    for folder in sorted((f for f, step in steps.items() if step.isdigit()), key=lambda f: int(steps[f]), reverse=True):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning(f"{folder} is passed over: {damage}.")
    return None


def place_checkpoint(unfinished: Path, folder: Path) -> None:
    """Gives a whole checkpoint its name, and removes one that had it; a kill between leaves both in `UNFINISHED`."""
    replaced = unfinished.with_name(unfinished.name + REPLACED)
    if folder.exists():
        folder.rename(replaced)
    try:
        unfinished.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def restore_checkpoints(output_dir: str | Path) -> None:
    """Puts checkpoints in their places that are complete, and that a kill left in `UNFINISHED`; removes the others.

    Only of a run that no other process writes to.
    """
    unfinished = Path(output_dir) / UNFINISHED
    # The newer of two with one name comes first, as what it replaced has the longer name.
    for path in sorted(unfinished.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        folder = unfinished.parent / path.name.removesuffix(REPLACED)
        if find_damage(path) is not None or (folder.exists() and find_damage(folder) is None):
            continue
        if folder.exists():
            folder.rename(unfinished / f"{folder.name}.damaged")
        path.rename(folder)
        logger.warning(f"{folder} is back in its place: a run was killed just before it gave the checkpoint its name.")
    shutil.rmtree(unfinished, ignore_errors=True)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Deletes the checkpoints of a run, and no folder that only has the name of one."""
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / "trainer_state.json").is_file() or (path / MANIFEST).is_file():
            shutil.rmtree(path)


@contextmanager
def remove_if_cut_short(folder: Path, name_last: Callable[[], str]) -> Iterator[None]:
    """Removes a folder whose writing fails, so that half a checkpoint does not stay.

    Args:
        folder: that the block writes.
        name_last: names the last complete checkpoint, in a sentence.

    Raises:
        OSError: the disk is full, or does not take the files for another reason.
    """
    try:
        yield
    # torch.save reports a full disk as a RuntimeError, safetensors as an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"could not save to {folder.parent}: {error}. What was written was removed; resume when the cause is gone, "
            f"which a full disk is most often. {name_last()}"
        ) from error


def replace_model(folder: Path, unfinished: Path) -> None:
    """Moves a saved model to its folder, and removes weights that were there: shards would be loaded with it."""
    for path in folder.iterdir():
        if WEIGHTS.fullmatch(path.name) and not (unfinished / path.name).exists():
            path.unlink()
    for path in sorted(unfinished.iterdir()):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    unfinished.rmdir()


@contextmanager
def claim_output(
    output_dir: str | Path, identity: dict[str, str | int], resume: bool | str, replace: bool
) -> Iterator[None]:
    """Holds a run's folder while the block runs: no other run writes to it, and no other run's files are in it.

    What a killed run left unfinished is put in its place, where it is complete, or removed.

    Args:
        output_dir: folder of the run.
        identity: what makes it this run, such as recipe, data and model.
        resume: go on with the run that is there; from the checkpoint that is named, where one is.
        replace: start anew in a folder that was used.

    Raises:
        ValueError: the folder is used; or, with `resume`, by a run that is not this one, or that no file tells of.
        OSError: another run writes to it.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(folder / LOCK, timeout=0.1))
        except TimeoutError as error:
            raise OSError(f"output_dir={str(folder)!r}: another run is writing to it; choose another.") from error
        restore_checkpoints(folder)
        used = sorted(path.name for trace in TRACES for path in folder.glob(trace))
        if used and not (resume or replace):
            raise ValueError(
                f"output_dir={str(folder)!r} was used before ({', '.join(used[:4])}). Go on with that run by "
                f"--resume_from_checkpoint last, or {ANEW}"
            )
        if used and resume:
            _compare_identity(folder, identity, resume)
        (folder / IDENTITY).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        yield


def _compare_identity(folder: Path, identity: dict[str, str | int], resume: bool | str) -> None:
    try:
        there = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if isinstance(resume, str) and Path(resume).resolve().parent == folder.resolve():
            logger.warning(f"{folder} has no {IDENTITY}, so nothing tells whether {resume} is of this run.")
            return
        raise ValueError(
            f"output_dir={str(folder)!r} has no {IDENTITY}, so nothing tells which run's files are in it. Name the "
            f"checkpoint to go on from (--resume_from_checkpoint {folder / PREFIX_CHECKPOINT_DIR}-STEP), or {ANEW}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder / IDENTITY} cannot be read: choose another output_dir.") from error
    for key, value in identity.items():
        if there.get(key) != value:
            raise ValueError(
                f"output_dir={str(folder)!r} holds a run with {key} {there.get(key)!r}; this one has {value!r}. Resume "
                f"with the same settings, or {ANEW}"
            )
