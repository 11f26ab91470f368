"""Reading checkpoints one tensor at a time: weights are memory-mapped, and pickles are refused before they run.

Memory stays near the size of the largest tensor, however large the checkpoint. Sizes are in bytes.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .weight_maps import ConversionError


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
# Bounds for files of strangers: of a JSON file, and of the header of a weight file (safetensors' own).
JSON_BYTES = 500 * 10**6
HEADER_BYTES = 100 * 10**6
NAME_BYTES = 255  # the longest name of a file that systems take
# Tensors may share memory in a file, as tied weights do. More bytes of tensors than this many files is no checkpoint.
MAX_SHARING = 8
# Mapped pages count as this process's memory until the mapping goes: close the files after reading this much.
MAPPED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor in a checkpoint, and the name of the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


def name_dtype(dtype: torch.dtype) -> str:
    """Such as `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
        ConversionError: the file is missing, or is no JSON object.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise ConversionError(f"{path} is missing; expected a complete copy of the repository. Get it again.")
    if path.stat().st_size > JSON_BYTES:
        raise ConversionError(f"{path} has {path.stat().st_size} bytes; expected at most {JSON_BYTES}. Get it again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); it may be truncated. Get it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}; expected a JSON object. Get it again.")
    return content


def read_index(path: Path) -> dict[str, str]:
    """Reads which file beside an index holds which tensor.

    Raises:
        ConversionError: it is no index, or names something else than files beside it.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ConversionError(f"{path} has no 'weight_map'; expected tensor names with file names. Get it again.")
    for tensor, name in index.items():
        is_name = isinstance(name, str) and Path(name).name == name and "\\" not in name and "\0" not in name
        if not is_name or len(name.encode(errors="replace")) > NAME_BYTES:
            raise ConversionError(
                f"{path} lists {str(name)[:100]!r} for {tensor[:100]!r}; expected a file beside it. Do not use this "
                "checkpoint."
            )
    return index


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
    index = read_index(found)
    names = sorted(set(index.values()))
    for name in names:
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
                self._open_files[path] = open_safetensors(path)
            else:
                self._open_files[path] = open_pickle(path)
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


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as safetensors: {_describe_cause(error)}. It is "
            "truncated or damaged; get it again."
        ) from error
    except RuntimeError as error:  # the system maps no file that it could not hold if it were written to
        raise ConversionError(
            f"{path} ({path.stat().st_size} bytes) cannot be mapped into memory: {error}. Split it into shards of a "
            "few GB, as save_pretrained writes them, or use a machine with more memory."
        ) from error


def check_archive(archive: zipfile.ZipFile) -> str:
    """Checks that a `.bin` file is what torch.save writes: a zip of one pickle and tensors, uncompressed.

    Returns:
        Name of the pickle in it.

    Raises:
        ConversionError: it is a small file that would unpack to a large one, or another one; the text goes on after the
            name of the file.
    """
    entries = archive.infolist()
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > HEADER_BYTES:
        raise ConversionError("holds no one pickle of tensors of a sensible size. It is damaged; get it again.")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ConversionError(
                f"holds {entry.filename!r} compressed, which torch.save does not do; it was not unpacked. Get the "
                "weights as safetensors, or from their authors."
            )
    return pickles[0].filename


def _describe_cause(error: Exception) -> str:
    """The first sentence of an error, of bounded length: it may quote the file."""
    first = next(iter(str(error).strip().splitlines()), "").split(". ")[0]
    return first[:300].rstrip(".") or type(error).__name__


def open_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Maps a `.bin` file. `weights_only` refuses every pickle that asks for more than tensors, before running it.

    Raises:
        ConversionError: it is damaged, holds something else than tensors by name, or less than it says it does.
    """
    described = f"{path} ({path.stat().st_size} bytes)"
    with open(path, "rb") as file:
        if file.read(4) != ZIP_START:
            raise ConversionError(
                f"{described} is not in the zip format of torch.save; expected a file of torch 1.6 or later. It is "
                "damaged or older, or not what its name says; nothing in it ran. Get it again, or as safetensors."
            )
        try:
            with zipfile.ZipFile(file) as archive:
                check_archive(archive)
        except ConversionError as error:
            raise ConversionError(f"{described} {error}") from error
        except Exception as error:  # damaged archives fail in many ways
            problem = _describe_cause(error)
            raise ConversionError(f"{described} cannot be read: {problem}. It is truncated or damaged.") from error
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
            f"{described} cannot be read: {_describe_cause(error)}. It is truncated or damaged; get it again."
        ) from error
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors by name.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(
                f"{path} holds {name!r}: {type(tensor).__name__}; expected tensors by name. If this is a training "
                "state, use the weights inside it."
            )
        size = tensor.numel() * tensor.itemsize
        if size > tensor.untyped_storage().nbytes():
            raise ConversionError(
                f"{described} holds {name!r} of {size} bytes in {tensor.untyped_storage().nbytes()}: it repeats the "
                "same numbers. Do not use this file."
            )
    if sum(tensor.numel() * tensor.itemsize for tensor in content.values()) > MAX_SHARING * path.stat().st_size:
        raise ConversionError(f"{described} holds the same numbers under many names. Do not use this file.")
    return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one weight file by name, mapped into memory.

    Raises:
        ConversionError: it is no file, or it is damaged.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise ConversionError(f"{path} is no file; expected weights. Pass another.")
    if path.suffix != ".safetensors":
        return open_pickle(path)
    file = open_safetensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}


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
