"""What a checkpoint stores, by name, shape and dtype: read from headers, without weights.

The headers of pickles are read by an unpickler that makes nothing but shapes.
"""

import json
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from typing import BinaryIO

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from .reading import TORCH_DTYPES, StoredTensor
from .weight_maps import LLAVA_PUBLISHED, ConversionError


def list_shapes(model: nn.Module, config: PreTrainedConfig) -> tuple[dict, tuple[str, ...]]:
    """Shapes of what a model stores, and the names that it does not store because they are tied."""
    published = LLAVA_PUBLISHED.rename if isinstance(model, LlavaForConditionalGeneration) else str
    tied = ("lm_head.weight",) if getattr(config, "tie_word_embeddings", False) else ()
    return {
        published(name): tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }, tied


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
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            entries = {key: value for key, value in header.items() if key != "__metadata__"}
            for key, value in entries.items():
                if value["dtype"] not in HEADER_DTYPES:
                    raise ConversionError(
                        f"it holds {key!r} as {value['dtype']}; expected one of {', '.join(HEADER_DTYPES)}."
                    )
            return {
                key: StoredTensor(tuple(value["shape"]), HEADER_DTYPES[value["dtype"]], name)
                for key, value in entries.items()
            }
        with zipfile.ZipFile(file) as archive:
            (pickled,) = (entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
            with archive.open(pickled) as stream:
                content = _ShapeUnpickler(stream).load()
        return {key: StoredTensor(shape, dtype, name) for key, (shape, dtype) in content.items()}
    except ConversionError as error:
        raise ConversionError(f"{name}: {error}") from None
    except Exception as error:  # damaged headers fail in every way there is
        raise ConversionError(f"the header of {name} cannot be read ({error}); get the file again.") from error


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
