"""What a checkpoint stores, by name, shape and dtype: read from headers, without weights.

The headers of pickles are read by an unpickler that makes nothing but shapes.
"""

import json
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from io import BytesIO
from typing import BinaryIO

import torch
from torch import nn
from transformers import PreTrainedConfig

from .reading import HEADER_BYTES, TORCH_DTYPES, CheckpointReader, StoredTensor, check_archive
from .weight_maps import LLAVA_PUBLISHED, ConversionError, describe_cause


# Of the pickle that names the tensors of a file: a thousand times what the largest released checkpoints have.
PICKLE_BYTES, MOST_OBJECTS = 16 * 10**6, 10**6
# By name: their modules are imported where a model of theirs is built, and not to read a header.
PUBLISHED_OTHERWISE = {"LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"}


def list_shapes(model: nn.Module, config: PreTrainedConfig) -> tuple[dict, tuple[str, ...]]:
    """Shapes of what a model stores, and the names that it does not store because they are tied."""
    published = LLAVA_PUBLISHED.rename if type(model).__name__ in PUBLISHED_OTHERWISE else str
    tied = ("lm_head.weight",) if getattr(config, "tie_word_embeddings", False) else ()
    return {
        published(name): tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }, tied


# Where the published names of a llava have its tower.
VIT_MODULE = "vision_tower.vision_model."
# Settings that say how many modules a model is made of.
COUNTS = re.compile(r"num_\w*layers|n_layers?|depths?|num_stages")


def check_counts(config: PreTrainedConfig | dict, num_tensors: int):
    """Refuses a configuration of more layers than there are tensors, before a model of them is built.

    Raises:
        ConversionError: names the setting.
    """
    for key, value in (config if isinstance(config, dict) else config.to_dict()).items():
        if isinstance(value, dict):
            check_counts(value, num_tensors)
        elif COUNTS.fullmatch(str(key)):
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int) and count > num_tensors:
                    raise ConversionError(
                        f"{key} = {value!r}; expected at most {num_tensors}, the number of stored tensors. The "
                        "config.json is not of these weights."
                    )


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Beside those that the conversion reads.
HEADER_DTYPES = {**TORCH_DTYPES, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# What bitsandbytes stores beside a weight that it has quantised. Four-bit weights are two to a byte.
QUANTIZATION_STATE = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|(?P<four_bit>quant_state\.bitsandbytes__\w+))$"
    r"|\.(SCB|weight_format)$"
)
BITSANDBYTES = "bitsandbytes"


def find_quantization(config: dict) -> str | None:
    """The method that the weights of a checkpoint are quantised by, from its `config.json`."""
    settings = config.get("quantization_config")
    return (settings.get("quant_method") or BITSANDBYTES) if settings else None  # older files of bitsandbytes lack it


def find_packed(tensors: Iterable[str]) -> set[str]:
    """The weights that bitsandbytes holds in four bits each, whatever their dtype says."""
    states = [match for name in tensors if (match := QUANTIZATION_STATE.search(name)) and match["four_bit"]]
    return {f"{match.string[: match.start()]}.weight" for match in states}


def count_parameters(tensors: dict[str, StoredTensor]) -> dict[str, int]:
    """Weight -> number of parameters, without what bitsandbytes stores beside the weights that it has quantised."""
    packed = find_packed(tensors)
    return {
        name: math.prod(stored.shape) * (2 * stored.dtype.itemsize if name in packed else 1)
        for name, stored in tensors.items()
        if not QUANTIZATION_STATE.search(name)
    }


def compare_shapes(reader: CheckpointReader, model_class: type[nn.Module], config: PreTrainedConfig) -> str | None:
    """Compares the tensors of a checkpoint with those of the model that its configuration describes.

    Returns:
        What differs; `None` if the model has exactly these tensors.

    Raises:
        ConversionError: the configuration asks for more layers than there are tensors.
    """
    check_counts(config, len(reader.tensors))
    with torch.device("meta"):
        model = model_class(config)
    counts = count_parameters(reader.tensors)
    stored = {name: reader.tensors[name].shape for name in counts}
    expected, tied = list_shapes(model, config)
    if not set(stored) & set(expected):  # transformers' llava under the names of its modules
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    elif not any(name.startswith(VIT_MODULE) for name in stored):  # as newer versions of transformers save it
        expected = {name.replace(VIT_MODULE, "vision_tower."): shape for name, shape in expected.items()}
    for what, names in (("missing", set(expected) - set(stored)), ("unknown", set(stored) - set(expected))):
        if names:
            return f"{len(names)} tensor(s) are {what}, the first is {min(names)}"
    packed, wrong = find_packed(reader.tensors), []
    for name, shape in stored.items():
        if name in packed:  # whole bytes, and whole numbers of the dtype that they are stored as
            rest = counts[name] - math.prod(expected[name])
            is_right = 0 <= rest < 2 * reader.tensors[name].dtype.itemsize
        else:
            is_right = shape == expected[name]
        if not is_right:
            wrong.append(name)
    if wrong:
        return f"{wrong[0]} has the shape {list(stored[wrong[0]])}; expected {list(expected[wrong[0]])}"
    return None


def read_header(file: BinaryIO, name: str) -> dict[str, StoredTensor]:
    """Shapes and dtypes of the tensors of a weight file, from its first or last bytes.

    Args:
        file: open for reading, seekable.
        name: of the file; its ending says the format.

    Returns:
        Tensor name -> shape, dtype, file name.

    Raises:
        ConversionError: the file is damaged, or its pickle asks for more than tensors, which is refused unrun.
    """
    try:
        if name.endswith(".safetensors"):
            tensors = _read_safetensors_header(file)
        else:
            tensors = _read_pickle_header(file)
    except ConversionError as error:
        raise ConversionError(f"{name}: {error}") from None
    except Exception as error:  # damaged headers fail in every way there is
        problem = f"the header of {name} cannot be read ({describe_cause(error)}); get the file again."
        raise ConversionError(problem) from error
    for key, (shape, _) in tensors.items():
        if not isinstance(key, str) or not all(type(side) is int and 0 <= side < 2**48 for side in shape):
            raise ConversionError(
                f"{name} holds {key!r} of shape {str(shape)[:100]}; expected whole numbers. Get it again."
            )
    return {key: StoredTensor(shape, dtype, name) for key, (shape, dtype) in tensors.items()}


def _read_safetensors_header(file: BinaryIO) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    size = struct.unpack("<Q", file.read(8))[0]
    if size > HEADER_BYTES:
        raise ValueError(f"it has {size} bytes; expected at most {HEADER_BYTES}")
    header = json.loads(file.read(size))
    tensors = {}
    for key, value in header.items():
        if key == "__metadata__":
            continue
        if value["dtype"] not in HEADER_DTYPES:
            found = f"{key[:200]!r} as {str(value['dtype'])[:40]}"
            raise ConversionError(f"it holds {found}; expected one of {', '.join(HEADER_DTYPES)}.")
        tensors[key] = tuple(value["shape"]), HEADER_DTYPES[value["dtype"]]
    return tensors


def _read_pickle_header(file: BinaryIO) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    with zipfile.ZipFile(file) as archive:
        try:
            pickled = check_archive(archive)
        except ConversionError as error:
            raise ConversionError(f"it {error}") from error
        if (size := archive.getinfo(pickled).file_size) > PICKLE_BYTES:
            raise ConversionError(f"its pickle has {size} bytes; expected at most {PICKLE_BYTES}. It is damaged.")
        data = archive.read(pickled)
    for code, argument, _ in pickletools.genops(data):
        # Python's unpickler makes room for as many objects as such a number says.
        if code.name in ("PUT", "LONG_BINPUT") and argument > min(len(data), MOST_OBJECTS):
            raise ConversionError(f"its pickle of {len(data)} bytes numbers an object {argument}. It is damaged.")
    content = _ShapeUnpickler(BytesIO(data)).load()
    if not all(isinstance(value, tuple) and len(value) == 2 for value in content.values()):
        raise ConversionError("its pickle holds something that is no tensor; expected tensors by name.")
    return {key: (tuple(shape), dtype) for key, (shape, dtype) in content.items()}


class _ShapeUnpickler(pickle.Unpickler):
    """Reads what torch.save wrote, and makes shape and dtype of every tensor; knows nothing else to make."""

    def find_class(self, module: str, name: str):
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda dtype, offset, shape, *rest: (tuple(shape), dtype),
            "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
        }
        if f"{module}.{name}" not in known:
            raise ConversionError(f"its pickle asks for '{module}.{name}'; expected tensors only. Nothing in it ran.")
        return known[f"{module}.{name}"]

    def persistent_load(self, identifier):
        return identifier[1]  # ("storage", type, key, device, size)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a floating-point tensor are finite; no copy of the whole is made."""
    blocks = tensor.reshape(-1).split(2**24)
    return all((block if block.itemsize > 1 else block.float()).isfinite().all() for block in blocks)


def find_relabelled(tensor: torch.Tensor) -> str | None:
    """The dtype that 16-bit numbers were written as, if they are read as the other one; `None` if they look right.

    Weights lie around zero: about one in eight is smaller than a quarter of their median. bfloat16 read as float16 has
    hardly any of those (the exponent of all is about the same); float16 read as bfloat16 is next to nothing.
    """
    if tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.ndim < 2 or tensor.numel() < 1024:
        return None
    sizes = tensor.reshape(-1)[: 2**16].float().abs()
    median = sizes.median()
    if tensor.dtype == torch.bfloat16:
        return "float16" if 0 < median < 1e-6 else None
    small = (sizes < median / 4).float().mean()
    return "bfloat16" if median > 0.25 and small < 0.03 and sizes.std() > 0 else None
