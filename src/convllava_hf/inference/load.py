"""Loads a checkpoint with its processor, onto the best device there is, in a dtype that the device computes fast."""

import importlib.util
import os
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    TorchAoConfig,
)
from transformers.utils import logging

from ..checkpoints.architecture import check_source
from ..checkpoints.shapes import find_relabelled
from ..checkpoints.staging import find_replaced
from .runtime import load_export


logger = logging.get_logger(__name__)
# Name -> the package that does it.
QUANTIZERS = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao"}
# The vision tower and the projector are a small share of the weights and suffer most; `model.` anchors the names.
UNQUANTIZED_MODULES = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
# torch has no public name for these checks, which it makes itself before it hands a product to oneDNN; everywhere else
# half precision runs through a fallback loop.
CPU_CHECKS = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}


def load(
    model: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    runtime: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a model and its processor, ready to answer.

    Args:
        model: Hub id or path of a checkpoint.
        device: such as `"cpu"`, `"cuda:1"`, `"mps"`. Default: the GPUs, and the CPU for what does not fit (accelerate
            places the layers); without a GPU the CPU.
        dtype: such as `"bfloat16"`. `"auto"` is the checkpoint's own, but float32 on a CPU that lacks it: torch then
            computes hundreds of times slower. (Plain `from_pretrained` does not know that: pass `dtype` there.)
        quantize: `"4bit"` (nf4) or `"8bit"`, through bitsandbytes, or `"int8"` (weights alone), through torchao; the
            vision tower, the projector and the output layer stay as they are.
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`, or what else transformers takes.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the code in the checkpoint, for models that neither transformers nor this package has.
        runtime: `"onnx"`, `"openvino"` or `"executorch"`; `model` is then a folder that `convllava export` made, which
            runs on the CPU as it was exported.

    Returns:
        The model in evaluation mode and the processor.

    Raises:
        ValueError: an unknown device, dtype, quantisation or runtime, settings that an export does not have, or a
            checkpoint in the original LLaVA format, or whose configuration asks for what no model has.
        ImportError: bitsandbytes, torchao or the runtime is missing.
        OSError: no such checkpoint.
    """
    # The Hub's own message about a path would be that it is no valid repository name.
    local = Path(os.path.expanduser(model))
    if local.is_dir():
        model = local
    elif local.is_file():
        raise NotADirectoryError(f"{str(model)!r} is a file; expected the folder of a checkpoint, or a Hub id.")
    elif old := find_replaced(local):
        raise FileNotFoundError(
            f"there is no folder {str(local)!r}; {old} was there before a run was killed. Rename it."
        )
    elif local.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise FileNotFoundError(f"there is no folder {str(local)!r}.")
    if runtime is not None:
        if quantize or attn_implementation or str(dtype) not in ("auto", "float32", "torch.float32"):
            raise ValueError(
                f"quantize={quantize!r}, attn_implementation={attn_implementation!r} and dtype={str(dtype)!r} do not "
                f"go with runtime={runtime!r}: an export is what it was exported as (convllava export --quantize int8)."
            )
        if str(device or "cpu") != "cpu":
            raise ValueError(f"device={str(device)!r} does not go with runtime={runtime!r}, which runs on the CPU.")
        return load_export(local, runtime, trust_remote_code)
    if quantize not in (None, *QUANTIZERS):
        raise ValueError(f"quantize={quantize!r}; expected '4bit', '8bit' or 'int8'.")
    if quantize and importlib.util.find_spec(QUANTIZERS[quantize]) is None:
        raise ImportError(
            f"quantize={quantize!r} needs {QUANTIZERS[quantize]}: pip install 'convllava-hf[quantization]'"
        )
    device_map = _choose_device_map(device)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        stored, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    except OSError as error:
        raise OSError(f"cannot load {str(model)!r}: {error}") from error  # without a network it names no model
    if "mm_vision_tower" in stored:
        raise ValueError(
            f"{model} is in the original LLaVA format (config.json names mm_vision_tower); convert it first: "
            "convllava convert, or convllava_hf.conversion.convert_checkpoint."
        )
    check_source(model, revision)
    dtype = _choose_dtype(dtype, stored, on_cpu=device_map == {"": torch.device("cpu")})
    processor = AutoProcessor.from_pretrained(model, **source)
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        options["quantization_config"] = TorchAoConfig(
            Int8WeightOnlyConfig(), modules_to_not_convert=UNQUANTIZED_MODULES
        )
    elif quantize:
        # One line for each layer and token, about a cast that is meant.
        logging.get_logger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantize == "4bit",
            load_in_8bit=quantize == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=_get_stored_dtype(stored) if dtype == "auto" else dtype,
            llm_int8_skip_modules=UNQUANTIZED_MODULES,
        )
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, device_map=device_map, **source, **options
        )
    except (SafetensorError, UnpicklingError) as error:  # neither is an error of the system or of a value
        problem = " ".join(str(error).split())[:300]
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):  # torch's own advice would be to let it run
            problem = f"unpickling them asks for {asked[1]!r}, which was refused; nothing ran. Get safetensors."
        raise OSError(f"the weights of {str(model)!r} cannot be read: {problem}") from error
    if found := _find_unusable(loaded):
        raise ValueError(
            f"the weights of {str(model)!r} are damaged: {found}. `convllava doctor` looks at all of them."
        )
    return loaded.eval(), processor


def _find_unusable(model: PreTrainedModel) -> str | None:
    """Looks for weights that no answer can come of: not finite, or written as another dtype than they are read as."""
    # Of what is quantised (tensors of other types) or elsewhere nothing is known.
    known = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if type(parameter) is torch.nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
    }
    for name, weights in known.items():
        if not weights.sum(dtype=torch.float32).isfinite():  # as soon as one of its numbers is not
            return f"{name} holds values that are not finite"
    matrices = [weights for weights in known.values() if weights.ndim > 1]
    relabelled = sum(find_relabelled(weights) is not None for weights in matrices)
    return "their numbers look like those of another 16-bit dtype" if relabelled > len(matrices) / 2 else None


def _choose_device_map(device: str | torch.device | None) -> str | dict[str, torch.device]:
    """`device_map` for transformers; raises ValueError on a device that torch does not know or does not have."""
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        if available is not None and available.type == "cuda":
            return "auto"
        return {"": available or torch.device("cpu")}
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}; expected for example 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    present = ["cpu"]
    if available is not None:
        present += [available.type, *(f"{available.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if str(device) not in present:
        raise ValueError(f"device={str(device)!r} is not present here; torch sees {', '.join(present)}.")
    return {"": device}


def _get_stored_dtype(stored: dict) -> str | None:
    """The dtype that a config.json names, under its old or its new key."""
    return stored.get("dtype") or stored.get("torch_dtype")


def _choose_dtype(dtype: str | torch.dtype, stored: dict, on_cpu: bool) -> str | torch.dtype:
    """The dtype to load in: as asked, as stored (`"auto"`), or float32 for a CPU that lacks the stored one.

    Args:
        dtype: what the caller asked for.
        stored: the checkpoint's config.json.
        on_cpu: whether the whole model runs on the CPU.

    Raises:
        ValueError: no such dtype.
    """
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not (isinstance(named, torch.dtype) and named.is_floating_point):
            raise ValueError(f"dtype={dtype!r}; expected 'auto', 'bfloat16', 'float16' or 'float32'.")
        return named
    if dtype != "auto" or not on_cpu:
        return dtype
    name = _get_stored_dtype(stored)
    if name is None:
        return torch.float32
    if name not in CPU_CHECKS or is_fast_on_cpu(name):
        return "auto"
    logger.warning(f"Loading in float32 instead of {name}, which this CPU lacks and computes far slower.")
    return torch.float32


def is_fast_on_cpu(dtype: str) -> bool:
    """Whether the CPU computes in `"bfloat16"` or `"float16"`; without instructions it is hundreds of times slower."""
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, CPU_CHECKS[dtype])()
