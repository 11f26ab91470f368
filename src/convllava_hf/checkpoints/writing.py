"""Writing checkpoints one tensor at a time: files are written in order instead of being collected first.

Sizes are in bytes.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .reading import SAFETENSORS_DTYPES, hash_file
from .weight_maps import ConversionError


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


def measure_peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes, or `None` where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
