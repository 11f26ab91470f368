"""Reading and writing checkpoints one tensor at a time, and putting a finished folder in place.

Memory stays near the size of the largest tensor, however large the checkpoint: sources are memory-mapped, and output
files are written in order instead of being collected first. Sizes are in bytes.
"""

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.utils import logging

from .weight_maps import ConversionError


logger = logging.get_logger(__name__)
# In order of preference, which is that of transformers: files that hold no code come first.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
ZIP_START = b"PK\x03\x04"
# Mapped pages count as this process's memory until the mapping goes: close the files after reading this much.
MAPPED_BYTES = 256 * 2**20
# Room on the disk for the small files beside the weights.
SPARE_BYTES = 32 * 2**20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor in a checkpoint, and the name of the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of the output: name, shape and dtype, known beforehand, and `load()`, which makes it in its turn, as a
    whole or in blocks of rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor | Iterator[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
        ConversionError: the file is missing, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing; expected a complete copy of the repository. Get it again.") from None
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); it may be truncated. Get it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}; expected a JSON object. Get it again.")
    return content


def find_weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Finds the files that hold a checkpoint's weights.

    Args:
        folder: the checkpoint, with one of the names of `WEIGHT_FILES` in it.

    Returns:
        The files, and what the index says: tensor name -> file name (empty without an index).

    Raises:
        ConversionError: there are no weights, a shard that the index lists is missing, or the index leads elsewhere.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ConversionError(
            f"{folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}. Get the repository again, with its "
            "large files."
        )
    if found.suffix != ".json":
        return [found], {}
    index = read_json(found).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ConversionError(f"{found} has no 'weight_map'; expected tensor names with file names. Get it again.")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name:
            raise ConversionError(
                f"{found} lists the file {name!r}; expected one beside it. Do not use this checkpoint."
            )
        if not (folder / name).is_file():
            raise ConversionError(f"{folder / name} is missing; {found.name} lists it. Get the missing shard.")
    return [folder / name for name in names], index


class CheckpointReader:
    """The tensors of a checkpoint, in `.safetensors` or `.bin` files, without holding them in memory.

    Args:
        folder (`Path`): the checkpoint.
        dtypes (`dict[str, torch.dtype]`): those that safetensors may have, by the names that they have there.

    Attributes:
        tensors (`dict[str, StoredTensor]`): every tensor by name, in the order of the files.
        files (`list[Path]`): the files that were read.

    Raises:
        ConversionError: see `find_weight_files`; also a file that is damaged, whose pickle asks for more than tensors,
            or that does not hold what the index lists.
    """

    def __init__(self, folder: Path, dtypes: dict[str, torch.dtype] = TORCH_DTYPES):
        self.files, index = find_weight_files(folder)
        self._dtypes = dtypes
        self._open_files = {}
        self._bytes_mapped = 0
        self.tensors = {}
        for path in self.files:
            for name, stored in self._list(path):
                if name in self.tensors:
                    raise ConversionError(
                        f"{name!r} is in both {self.tensors[name].file} and {path.name}; expected it once. Remove the "
                        "file that does not belong to this checkpoint."
                    )
                self.tensors[name] = stored
            self.close()
        if missing := [name for name in index if name not in self.tensors]:
            raise ConversionError(
                f"{index[missing[0]]} does not hold {missing[0]!r}, which the index lists ({len(missing)} such "
                "tensors); the shards are of different versions or damaged. Get the repository again."
            )

    def _open(self, path: Path):
        if path not in self._open_files:
            if path.suffix == ".safetensors":
                self._open_files[path] = _open_safetensors(path)
            else:
                self._open_files[path] = _open_pickle(path)
        return self._open_files[path]

    def _list(self, path: Path) -> Iterator[tuple[str, StoredTensor]]:
        content = self._open(path)
        if path.suffix != ".safetensors":
            for name, tensor in content.items():
                yield name, StoredTensor(tuple(tensor.shape), tensor.dtype, path.name)
            return
        for name in content.keys():
            view = content.get_slice(name)
            if view.get_dtype() not in self._dtypes:
                raise ConversionError(
                    f"{path} holds {name!r} as {view.get_dtype()}; expected one of {', '.join(self._dtypes)}. Use a "
                    "checkpoint that is not quantised."
                )
            yield name, StoredTensor(tuple(view.get_shape()), self._dtypes[view.get_dtype()], path.name)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor. It may be a view of the file: use it and let it go before reading many others."""
        stored = self.tensors[name]
        if self._bytes_mapped > MAPPED_BYTES:
            self.close()
        path = self.files[0].parent / stored.file
        content = self._open(path)
        tensor = content.get_tensor(name) if path.suffix == ".safetensors" else content[name]
        self._bytes_mapped += tensor.numel() * tensor.itemsize
        return tensor

    def close(self):
        """Lets go of the files and of the memory that their mappings count for."""
        self._open_files.clear()
        self._bytes_mapped = 0


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as safetensors: {error}. It is truncated or damaged; "
            "get it again."
        ) from error
    except RuntimeError as error:  # the system maps no file that it could not hold if it were written to
        raise ConversionError(
            f"{path} ({path.stat().st_size} bytes) cannot be mapped into memory: {error}. Split it into shards of a "
            "few GB, as save_pretrained writes them, or use a machine with more memory."
        ) from error


def _open_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Maps a `.bin` file. `weights_only` refuses every pickle that asks for more than tensors, before running it."""
    described = f"{path} ({path.stat().st_size} bytes)"
    with open(path, "rb") as file:
        if file.read(4) != ZIP_START:
            raise ConversionError(
                f"{described} is not in the zip format of torch.save; expected a file of torch 1.6 or later. It is "
                "damaged or older, or not what its name says; nothing in it ran. Get it again, or as safetensors."
            )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ConversionError(
            f"{described} asks for {repr(asked[1]) if asked else 'something that is no tensor'} when it is unpickled; "
            "expected tensors only. It was refused and nothing in it ran. Do not load it with other tools; get the "
            "weights as safetensors, or from their authors."
        ) from None
    except Exception as error:  # errors of the zip reader and of tensors have no common base
        raise ConversionError(
            f"{described} cannot be read: {str(error).splitlines()[0].split('. ')[0]}. It is truncated or damaged; "
            "get it again."
        ) from error
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors by name.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(
                f"{path} holds {name!r}: {type(tensor).__name__}; expected tensors by name. If this is a training "
                "state, use the weights inside it."
            )
    return content


def parse_size(size: int | str) -> int:
    """Number of bytes of `"5GB"`, `"500MB"` (powers of ten) or a number.

    Raises:
        ConversionError: any other text, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)?", str(size).strip(), re.IGNORECASE)
    unit = 1000 ** ["B", "KB", "MB", "GB", "TB"].index(((match and match[2]) or "B").upper())
    if not match or float(match[1]) * unit < 1:
        raise ConversionError(f"size {size!r}; expected a number of bytes, or such as '5GB' or '1.5GB'.")
    return int(float(match[1]) * unit)


def hash_file(path: Path, progress: tqdm | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; `progress` counts its bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(4 * 2**20):
            digest.update(block)
            if progress is not None:
                progress.update(len(block))
    return digest.hexdigest()


def describe_file(path: Path, progress: tqdm | None = None) -> dict:
    """Name, size in bytes and SHA-256 of a file, as reports list them; `progress` counts its bytes."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path, progress)}


@dataclass(frozen=True)
class WrittenFile:
    """A file of the output: name, size in bytes, and SHA-256 of what was meant to be written."""

    name: str
    num_bytes: int
    sha256: str

    def check(self, folder: Path, progress: tqdm | None = None):
        """Reads the file back; `progress` counts its bytes.

        Raises:
            ConversionError: it holds something else.
        """
        if hash_file(folder / self.name, progress) != self.sha256:
            raise ConversionError(
                f"{self.name} reads back differently from what was written: the disk is faulty. Choose another "
                "--output."
            )

    def describe(self) -> dict:
        """As `describe_file`, without reading the file."""
        return {"name": self.name, "bytes": self.num_bytes, "sha256": self.sha256}


def write_checkpoint(
    folder: Path,
    tensors: Sequence[TensorToWrite],
    max_shard_size: int,
    progress: tqdm | None = None,
    resume: bool = False,
) -> list[WrittenFile]:
    """Writes `model.safetensors`, or shards and their index, as transformers names them.

    Args:
        folder: an existing folder.
        tensors: what to write, in this order.
        max_shard_size: bytes of tensors per file; a larger tensor gets a file of its own.
        progress: counts the bytes written.
        resume: keep the files that are there and have the hash that was noted when they were written, in a hidden
            file beside each; the caller removes these notes (`remove_notes`).

    Returns:
        The weight files.

    Raises:
        ConversionError: a tensor that does not have the shape and dtype that were announced.
        OSError: the disk refuses to write.
    """
    shards, room = [], 0
    for tensor in tensors:
        if not shards or tensor.num_bytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(tensor)
        room -= tensor.num_bytes

    def write(name: str, shard: list[TensorToWrite]) -> WrittenFile:
        path, note = folder / name, folder / f".{name}.sha256"
        if resume and path.is_file() and note.is_file():
            found = WrittenFile(name, path.stat().st_size, hash_file(path, progress))
            if found.sha256 == note.read_text():
                return found
            progress.update(-found.num_bytes)  # damaged since, so written anew
        written = _write_safetensors(path, shard, progress)
        if resume:
            note.write_text(written.sha256)
        return written

    if len(shards) == 1:
        return [write("model.safetensors", shards[0])]
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
        "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    written = [write(name, shard) for name, shard in zip(names, shards, strict=True)]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def remove_notes(folder: Path) -> None:
    """Removes what `write_checkpoint` noted for a run that goes on."""
    for note in folder.glob(".*.safetensors.sha256"):
        note.unlink()


def _write_safetensors(path: Path, tensors: list[TensorToWrite], progress: tqdm | None) -> WrittenFile:
    # The format: length of the header (8 bytes, little endian), a JSON header, the bytes of the tensors. Wide dtypes
    # first keeps every tensor aligned to its own element size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:

        def write(block):
            file.write(block)
            digest.update(block)
            if progress is not None:
                progress.update(len(block))

        write(len(header).to_bytes(8, "little"))
        write(header)
        for tensor in tensors:
            loaded, count = tensor.load(), 0
            is_whole = isinstance(loaded, torch.Tensor)
            for block in [loaded] if is_whole else loaded:
                expected = tensor.shape if is_whole else (*block.shape[:1], *tensor.shape[1:])
                _check_loaded(tensor, tuple(block.shape) == expected and block.dtype == tensor.dtype, block)
                count += block.numel()
                if block.numel():
                    write(memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy()))
            _check_loaded(tensor, count == torch.Size(tensor.shape).numel(), block)
        file.flush()
        # Some file systems say that they are full only now.
        os.fsync(file.fileno())
    unfinished.rename(path)
    return WrittenFile(path.name, path.stat().st_size, digest.hexdigest())


def _check_loaded(tensor: TensorToWrite, is_right: bool, block: torch.Tensor):
    if not is_right:
        raise ConversionError(
            f"{tensor.name!r} came as {tuple(block.shape)} {block.dtype}; expected {tensor.shape} {tensor.dtype}. The "
            "source changed while it was read; convert it again."
        )


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


def measure_peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes, or `None` where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
