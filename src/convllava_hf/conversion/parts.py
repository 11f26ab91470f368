"""Parts of checkpoints: merging what PEFT trained, taking projectors out and putting them in.

Source of the `.bin` form: haotian-liu/LLaVA, `llava/train/train.py` (`mm_projector.bin` of a pretraining run): the
state of an `nn.Sequential`, whose layer `2 i` is our `linear_{i + 1}`.
"""

import json
import os
import re
import shutil
import warnings
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .. import __version__
from ..checkpoints.adapters import ADAPTER_CONFIG, Adapter, is_adapter, read_adapter
from ..checkpoints.architecture import check_source
from ..checkpoints.cards import build_model_card, get_training, list_image_tokens, read_sources, read_trainer_card
from ..checkpoints.reading import CheckpointReader, describe_file, read_json, read_tensors
from ..checkpoints.shapes import compare_shapes, is_finite
from ..checkpoints.staging import MANIFEST, check_output, stage_file, stage_output
from ..checkpoints.weight_maps import ConversionError, describe_cause
from ..checkpoints.writing import TensorToWrite, WrittenFile, parse_size, write_checkpoint


PROJECTOR_WEIGHT = re.compile(r"multi_modal_projector\.(?:modules_to_save\.\w+\.)?(linear_(\d+)\.(weight|bias))$")
LLAVA_WEIGHT = re.compile(r"mm_projector\.(?:(\d+)\.)?(weight|bias)$")


def merge_adapter(
    adapter: str | Path, output: str | Path, *, base: str | None = None, dtype: str = "auto", force: bool = False
) -> Path:
    """Writes the checkpoint that a base model and an adapter make together, and what both came from.

    Args:
        adapter: folder of a PEFT adapter.
        output: folder to write; nothing is left there if something fails.
        base: Hub id or folder of the base model. Default: what the adapter names.
        dtype: of the weights; "auto" keeps the base's.
        force: replace a model that is there.

    Returns:
        `output`.

    Raises:
        ConversionError: no adapter, no base, weights of either that have no place in the model or that it lacks, values
            that are not finite, an output that exists.
    """
    from peft import PeftModel

    output = Path(os.path.expanduser(output)).resolve()
    found = read_adapter(Path(adapter))
    base = base or found.base
    if not base:
        raise ConversionError(f"{found.folder / ADAPTER_CONFIG} names no base model; name it with --base.")
    check_output(output, force)
    check_source(base)
    stored = read_tensors(found.weights)
    _check_finite(stored, f"the adapter {found.folder}", "Train it again.")
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, output_loading_info=True)
    except (SafetensorError, UnpicklingError) as error:
        raise ConversionError(
            f"the weights of {base} cannot be read: {describe_cause(error)} Get them again."
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading[what])):
            raise ConversionError(
                f"the base {base} has {len(names)} {what.replace('_', ' ')}, the first is {names[0]}; expected exactly "
                "the weights of its config.json. Get the base again."
            )
    _check_finite(model.state_dict(), f"the base {base} in {model.dtype}", "Pass --dtype float32 or another base.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below, as an error
            model = PeftModel.from_pretrained(model, str(found.folder))
    except (ValueError, RuntimeError, TypeError, KeyError) as error:  # PEFT's, of an adapter that does not fit
        raise ConversionError(
            f"the adapter {found.folder} does not fit the base {base}: {describe_cause(error)} Pass the right --base."
        ) from error
    _check_adapter(model, stored, f"the adapter {found.folder}", base)
    merged = model.merge_and_unload()
    _check_finite(merged.state_dict(), f"{base} with {found.folder}", "Pass --dtype float32, or train it again.")
    with stage_output(output, sum(tensor.nbytes for tensor in merged.state_dict().values()), force) as staging:
        merged.save_pretrained(staging)
        holder = found.folder if (found.folder / "tokenizer_config.json").is_file() else base
        AutoProcessor.from_pretrained(holder).save_pretrained(staging)
        reader = CheckpointReader(staging)
        if problem := compare_shapes(reader, type(merged), merged.config):
            raise ConversionError(f"the merged model was not saved whole: {problem}. Please report this.")
        report = _describe_merge(found, base, merged.config, len(reader.tensors))
        report["files"] = [describe_file(path) for path in reader.files]
        (staging / "conversion_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(build_model_card(output.name, report), encoding="utf-8")
    return output


def _check_finite(tensors: dict[str, torch.Tensor], what: str, fix: str):
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ConversionError(f"{name!r} of {what} holds values that are not finite. {fix}")


def _check_adapter(model, stored: dict[str, torch.Tensor], what: str, base: str):
    """Compares what PEFT made of an adapter with the file: it only warns of what is missing, or has no place."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    everything = loaded | get_peft_model_state_dict(model, save_embedding_layers=True)
    unknown, missing = sorted(stored.keys() - everything.keys()), sorted(loaded.keys() - stored.keys())
    for names, problem in ((unknown, "has no place for"), (missing, "lacks")):
        if names:
            who = base if problem.startswith("has") else what
            raise ConversionError(
                f"{what} does not fit the base {base}: {who} {problem} {names[0]!r} ({len(names)} such tensors). Pass "
                "the right --base."
            )
    for name, tensor in stored.items():
        if not torch.equal(everything[name].cpu(), tensor.to(everything[name].dtype)):
            raise ConversionError(f"{name!r} of {what} was not loaded as it is stored. Please report this.")
    if not loaded:
        raise ConversionError(f"{what} holds no weights for {base}. Pass the right --base.")


def _describe_merge(adapter: Adapter, base: str, config, num_tensors: int) -> dict:
    """The report of a merge: the sources of the base as far as they are known, and the adapter."""
    folder = Path(os.path.expanduser(base))
    report = read_json(folder / "conversion_report.json") if (folder / "conversion_report.json").is_file() else {}
    sources, card = read_sources(report), read_trainer_card(adapter.folder)
    if not sources:
        files = [describe_file(path) for path in CheckpointReader(folder).files] if folder.is_dir() else []
        name = folder.resolve().name if folder.is_dir() else base
        revision = getattr(config, "_commit_hash", None)
        sources = [{"role": "base", "name": name, "revision": revision, "files": files}]
    part = {"role": "adapter", "name": adapter.folder.resolve().name, "revision": None}
    return {
        "convllava_hf": __version__,
        "kind": "merged checkpoint",
        "adapter": adapter.describe(),
        "training": get_training(card) if card else None,
        "license": report.get("license"),
        "architecture": (config.architectures or [None])[0],
        "image_tokens": list_image_tokens(config),
        "sources": [*sources, {**part, "files": [describe_file(adapter.weights)]}],
        "counts": {"written": num_tensors},
    }


def read_projector(source: str | Path) -> dict[str, torch.Tensor]:
    """Reads a projector from a checkpoint, a PEFT adapter that trained it, or a file of either form.

    Args:
        source: a folder, a `.safetensors` file, or LLaVA's `mm_projector.bin`.

    Returns:
        `linear_1.weight`, `linear_1.bias`, ... in the order of the layers.

    Raises:
        ConversionError: no projector there, a file that is damaged, or values that are not finite.
    """
    source = Path(source)
    if source.is_dir() and not is_adapter(source):
        reader = CheckpointReader(source)
        names, read = list(reader.tensors), reader.read
    else:
        content = read_tensors(read_adapter(source).weights if source.is_dir() else source)
        names, read = list(content), content.__getitem__
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
    projector = {f"linear_{layer}.{leaf}": found[layer, leaf] for layer, leaf in order}
    _check_finite(projector, str(source), "Take another projector.")
    return projector


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
        ConversionError: no projector in `source`, an output that exists, with `force` one that is no projector, or that
            has another ending.
    """
    output = Path(output)
    if output.suffix not in (".safetensors", ".bin"):
        raise ConversionError(f"{output} ends in {output.suffix!r}; expected .safetensors, or .bin for LLaVA's form.")
    if output.exists() and not force:
        raise ConversionError(f"{output} exists; choose another --output, or replace it with --force.")
    if output.exists():
        read_projector(output)  # nothing else is replaced
    projector = read_projector(source)
    if output.suffix == ".safetensors":
        renamed = {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
        with stage_file(output) as staging:
            save_file(renamed, staging, {"format": "pt"})
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
    with stage_file(output) as staging:
        torch.save(renamed, staging)
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
        ConversionError: layers or shapes that are not those of the checkpoint's projector, or values of either that are
            not finite.
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

    def copy_finite(name: str) -> torch.Tensor:
        tensor = reader.read(name)
        _check_finite({name: tensor}, str(checkpoint), "Get the checkpoint again.")
        return tensor

    tensors = []
    for name, stored in reader.tensors.items():
        if name not in targets:
            tensors.append(TensorToWrite(name, stored.shape, stored.dtype, partial(copy_finite, name)))
            continue
        tensor = new[targets[name]]
        if tuple(tensor.shape) != stored.shape:
            raise ConversionError(
                f"{targets[name]} of {projector} has shape {tuple(tensor.shape)}; expected {stored.shape}, as in "
                f"{checkpoint}."
            )
        tensor = tensor.to(stored.dtype)
        _check_finite({name: tensor}, f"{projector} in {stored.dtype}", "Use a checkpoint of a wider dtype.")
        tensors.append(TensorToWrite(name, stored.shape, stored.dtype, lambda tensor=tensor: tensor))
    check_source(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    if problem := compare_shapes(reader, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], config):
        raise ConversionError(f"{checkpoint} is not whole: {problem}. Get it again.")
    size = parse_size(max_shard_size)
    with stage_output(output, sum(tensor.num_bytes for tensor in tensors), force) as staging:
        for file in checkpoint.iterdir():
            if file.is_file() and file not in reader.files and not file.name.endswith((".index.json", MANIFEST)):
                shutil.copy2(file, staging)
        written = write_checkpoint(staging, tensors, size)
        _note_projector(staging, Path(projector), written)
    return output


def _note_projector(folder: Path, projector: Path, written: list[WrittenFile]):
    """Adds the projector to the sources in the report of a checkpoint, where there is one, and its new files."""
    path = folder / "conversion_report.json"
    if not path.is_file():
        return
    report = read_json(path)
    part = {"role": "projector", "name": projector.resolve().name, "revision": None}
    part["files"] = [describe_file(projector)] if projector.is_file() else []
    report["sources"] = [*read_sources(report), part]
    report["files"] = [file.describe() for file in written]
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
