"""Parts of checkpoints: merging what PEFT trained, taking projectors out and putting them in.

Source of the `.bin` form: haotian-liu/LLaVA, `llava/train/train.py` (`mm_projector.bin` of a pretraining run): the
state of an `nn.Sequential`, whose layer `2 i` is our `linear_{i + 1}`.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..checkpoints.reading import CheckpointReader
from ..checkpoints.staging import stage_output
from ..checkpoints.weight_maps import ConversionError
from ..checkpoints.writing import TensorToWrite, parse_size, write_checkpoint


PROJECTOR_WEIGHT = re.compile(r"multi_modal_projector\.(?:modules_to_save\.\w+\.)?(linear_(\d+)\.(weight|bias))$")
LLAVA_WEIGHT = re.compile(r"mm_projector\.(?:(\d+)\.)?(weight|bias)$")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def merge_adapter(
    adapter: str | Path, output: str | Path, *, base: str | None = None, dtype: str = "auto", force: bool = False
) -> Path:
    """Writes the checkpoint that a base model and an adapter make together.

    Args:
        adapter: folder of a PEFT adapter.
        output: folder to write; nothing is left there if something fails.
        base: Hub id or folder of the base model. Default: what the adapter names.
        dtype: of the weights; "auto" keeps the base's.
        force: replace a model that is there.

    Returns:
        `output`.

    Raises:
        ConversionError: no adapter, no base, an output that exists.
    """
    from peft import PeftModel

    adapter, output = Path(adapter), Path(output)
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ConversionError(f"{adapter} has no {ADAPTER_CONFIG}; expected the folder of a PEFT adapter.")
    base = base or json.loads((adapter / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not base:
        raise ConversionError(f"{adapter / ADAPTER_CONFIG} names no base model; name it with --base.")
    with stage_output(output, 0, force) as staging:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        merged.save_pretrained(staging)
        holder = adapter if (adapter / "tokenizer_config.json").is_file() else base
        AutoProcessor.from_pretrained(holder).save_pretrained(staging)
    return output


def read_projector(source: str | Path) -> dict[str, torch.Tensor]:
    """Reads a projector from a checkpoint, a PEFT adapter that trained it, or a file of either form.

    Args:
        source: a folder, a `.safetensors` file, or LLaVA's `mm_projector.bin`.

    Returns:
        `linear_1.weight`, `linear_1.bias`, ... in the order of the layers.

    Raises:
        ConversionError: no projector there.
    """
    source = Path(source)
    if source.is_dir() and not (source / ADAPTER_WEIGHTS).is_file():
        reader = CheckpointReader(source)
        names, read = list(reader.tensors), reader.read
    elif source.suffix in (".bin", ".pt", ".pth"):
        content = torch.load(source, map_location="cpu", weights_only=True)
        names, read = list(content), content.__getitem__
    else:
        content = safe_open(source / ADAPTER_WEIGHTS if source.is_dir() else source, "pt")
        names, read = list(content.keys()), content.get_tensor
    found = {}
    for name in names:
        if match := PROJECTOR_WEIGHT.search(name):
            found[int(match[2]), match[3]] = read(name).clone()
        elif match := LLAVA_WEIGHT.search(name):
            found[int(match[1] or 0) // 2 + 1, match[2]] = read(name).clone()
    if not found:
        raise ConversionError(
            f"{source} holds no projector; expected weights named multi_modal_projector.linear_1.weight or "
            "mm_projector.0.weight."
        )
    order = sorted(found, key=lambda key: (key[0], key[1] == "bias"))
    return {f"linear_{layer}.{leaf}": found[layer, leaf] for layer, leaf in order}


def is_identity(projector: dict[str, torch.Tensor]) -> bool:
    """Whether the second of two layers changes nothing, as in a LLaVA v0 or LLaVAR model of transformers."""
    weight, bias = projector.get("linear_2.weight"), projector.get("linear_2.bias")
    if weight is None or bias is None or len(projector) != 4 or weight.shape[0] != weight.shape[1]:
        return False
    return torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) and not bias.any()


def extract_projector(source: str | Path, output: str | Path, *, force: bool = False) -> Path:
    """Writes the projector of a checkpoint or an adapter to a file of its own.

    Args:
        source: see [`read_projector`].
        output: `.safetensors` for our names, `.bin` for LLaVA's `mm_projector.bin`.
        force: replace a file that is there.

    Returns:
        `output`.

    Raises:
        ConversionError: no projector in `source`, an output that exists or has another ending.
    """
    output = Path(output)
    if output.suffix not in (".safetensors", ".bin"):
        raise ConversionError(f"{output} ends in {output.suffix!r}; expected .safetensors, or .bin for LLaVA's form.")
    if output.exists() and not force:
        raise ConversionError(f"{output} exists; choose another --output, or replace it with --force.")
    projector = read_projector(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".safetensors":
        renamed = {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
        save_file(renamed, output, {"format": "pt"})
        return output
    layers = {name: tensor for name, tensor in projector.items() if not name.startswith("linear_2")}
    # LLaVA v0's one linear layer is stored as two, the second of which is the identity.
    projector = layers if is_identity(projector) else projector
    single = len({name.split(".")[0] for name in projector}) == 1
    renamed = {}
    for name, tensor in projector.items():
        layer, leaf = re.fullmatch(r"linear_(\d+)\.(\w+)", name).groups()
        index = "" if single else f"{2 * (int(layer) - 1)}."
        renamed[f"model.mm_projector.{index}{leaf}"] = tensor
    torch.save(renamed, output)
    return output


def insert_projector(
    checkpoint: str | Path, projector: str | Path, output: str | Path, *, max_shard_size="5GB", force: bool = False
) -> Path:
    """Writes a copy of a checkpoint with another projector, tensor by tensor.

    Args:
        checkpoint: folder of a ConvLLaVA or LLaVA checkpoint in this package's or transformers' form.
        projector: see [`read_projector`].
        output: folder to write; nothing is left there if something fails.
        max_shard_size: largest weight file.
        force: replace a model that is there.

    Returns:
        `output`.

    Raises:
        ConversionError: layers or shapes that are not those of the checkpoint's projector.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    reader, new = CheckpointReader(checkpoint), read_projector(projector)
    targets = {name: match[1] for name in reader.tensors if (match := PROJECTOR_WEIGHT.search(name))}
    if len(new) == 2 and is_identity(current := read_projector(checkpoint)):
        new = {**current, **new}
    if set(targets.values()) != set(new):
        raise ConversionError(
            f"{projector} holds {', '.join(new)}; expected {', '.join(sorted(targets.values())) or 'nothing'}, as in "
            f"{checkpoint}."
        )
    tensors = []
    for name, stored in reader.tensors.items():
        if name not in targets:
            tensors.append(TensorToWrite(name, stored.shape, stored.dtype, lambda name=name: reader.read(name)))
            continue
        tensor = new[targets[name]]
        if tuple(tensor.shape) != stored.shape:
            raise ConversionError(
                f"{targets[name]} of {projector} has shape {tuple(tensor.shape)}; expected {stored.shape}, as in "
                f"{checkpoint}."
            )
        tensors.append(TensorToWrite(name, stored.shape, stored.dtype, lambda t=tensor, d=stored.dtype: t.to(d)))
    with stage_output(output, sum(tensor.num_bytes for tensor in tensors), force) as staging:
        for file in checkpoint.iterdir():
            if file.is_file() and file not in reader.files and not file.name.endswith(".index.json"):
                shutil.copy2(file, staging)
        write_checkpoint(staging, tensors, parse_size(max_shard_size))
    return output
