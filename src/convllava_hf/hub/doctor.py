"""Whether a checkpoint is whole and sound: everything is read, and no code that comes with it runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from PIL import Image
from transformers import PreTrainedConfig

from ..checkpoints.adapters import Adapter, is_adapter, read_adapter
from ..checkpoints.architecture import check_source
from ..checkpoints.code_files import find_foreign_code, list_code_files
from ..checkpoints.reading import CheckpointReader, hash_file, name_dtype, read_json, read_tensors
from ..checkpoints.shapes import (
    BITSANDBYTES,
    HEADER_DTYPES,
    compare_shapes,
    count_parameters,
    find_packed,
    find_quantization,
    find_relabelled,
    is_finite,
)
from ..checkpoints.staging import name_replaced
from ..checkpoints.templates import render_chat_template, run_in_bounds
from ..checkpoints.turn_ends import find_turn_problem, read_end_ids
from ..checkpoints.weight_maps import ConversionError, describe_cause


# Module and classes of each kind: configuration, model, processor. They are imported when they are needed.
OURS = "convllava_hf.model"
MODEL_CLASSES = {
    "convllava": (
        f"{OURS}.configuration_convllava.ConvLlavaConfig",
        f"{OURS}.modeling_convllava.ConvLlavaForConditionalGeneration",
        f"{OURS}.processing_convllava.ConvLlavaProcessor",
    ),
    "llava": ("transformers.LlavaConfig", "transformers.LlavaForConditionalGeneration", "transformers.LlavaProcessor"),
    "llava_next": (
        "transformers.LlavaNextConfig",
        "transformers.LlavaNextForConditionalGeneration",
        "transformers.LlavaNextProcessor",
    ),
    "convnext": ("transformers.ConvNextConfig", "transformers.ConvNextModel", None),
}


@dataclass
class Check:
    """What was looked at, and what is wrong with it (`None`: nothing)."""

    name: str
    problem: str | None = None


def check_checkpoint(folder: str | Path) -> list[Check]:
    """Looks at everything in a checkpoint: tensors, values, tokenizer, template, code, hashes.

    Args:
        folder: of a ConvLLaVA, of a `llava` or `llava_next` of transformers, of a ConvNeXt tower, or of a PEFT adapter.

    Returns:
        The checks in order, those that found something wrong included.

    Raises:
        ConversionError: the folder has no configuration, or one of another kind of model or of quantisation.
    """
    folder = Path(os.path.expanduser(folder))
    name_replaced(folder.resolve())
    if is_adapter(folder):
        return _check_adapter(folder)
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if "mm_vision_tower" in settings:
        raise ConversionError(f"{folder} is in the original format; convert it first: convllava convert.")
    if kind not in MODEL_CLASSES:
        raise ConversionError(
            f"{folder} holds a model of type {kind!r}; expected one of {', '.join(MODEL_CLASSES)}. Pass another."
        )
    if (method := find_quantization(settings)) not in (None, BITSANDBYTES):
        raise ConversionError(
            f"{folder} is quantised by {method}; expected whole weights, or {BITSANDBYTES}. Check the checkpoint that "
            "it was made of."
        )
    config_class, model_class, processor_class = map(_import, MODEL_CLASSES[kind])
    checks = Checks()
    check = checks.add
    config = reader = processor = None
    with check("configuration is read"):
        check_source(folder)
        config = config_class.from_pretrained(folder)
    with check("weight files are whole") as found:
        reader = CheckpointReader(folder, HEADER_DTYPES)
        if (folder / "model.safetensors").is_file() and (folder / "model.safetensors.index.json").is_file():
            found.problem = (
                "there are two sets of weights, model.safetensors, which is loaded, and the shards of "
                "model.safetensors.index.json; delete those that are not meant"
            )
    if reader is not None and config is not None:
        with check("tensors have the names and shapes of the configuration") as found:
            found.problem = compare_shapes(reader, model_class, config)
    if reader is not None:
        with check("values are finite") as found:
            found.problem = _find_infinite(reader)
        with check("values are of the dtype that they are stored as") as found:
            found.problem = _find_relabelled(reader, settings)
    if processor_class is not None:
        with check("processor is read"):
            processor = processor_class.from_pretrained(folder, trust_remote_code=False)
    if processor is not None and config is not None:
        with check("tokenizer has the image token") as found:
            found.problem = _check_tokenizer(processor, config)
        with check("chat template renders, with the right number of image tokens") as found:
            found.problem = _check_template(processor, config)
        with check("answers end in an end token") as found:
            ends = read_end_ids(folder)
            found.problem = run_in_bounds(lambda: find_turn_problem(processor.tokenizer, processor.chat_template, ends))
    if kind == "convllava":
        with check("code files are those of the installed version") as found:
            wrong = [f"{name} is {state}" for name, state in list_code_files(folder).items() if state != "same"]
            found.problem = "; ".join(wrong) or None
    with check("configurations name no other code") as found:
        found.problem = find_foreign_code(folder)
    if (folder / "conversion_report.json").exists():
        with check("weight files have the hashes of conversion_report.json") as found:
            found.problem = _compare_hashes(folder)
    return checks


def _import(name: str | None):
    if name is None:
        return None
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


class Checks(list[Check]):
    """The checks so far."""

    @contextmanager
    def add(self, name: str) -> Iterator[Check]:
        """A check that the block makes; an error in it is what is wrong."""
        self.append(Check(name))
        try:
            yield self[-1]
        except Exception as error:  # whatever a damaged file leads to is what is wrong with it
            self[-1].problem = describe_cause(error, 500)


def _check_adapter(folder: Path) -> list[Check]:
    checks = Checks()
    adapter = tensors = None
    with checks.add("adapter configuration is read"):
        adapter = read_adapter(folder)
    if adapter is None:
        return checks
    with checks.add("weight file is whole") as found:
        tensors = read_tensors(adapter.weights)
        found.problem = None if tensors else "it holds no tensors, so the adapter changes nothing"
    if tensors:
        with checks.add("values are finite") as found:
            wrong = [name for name, tensor in tensors.items() if not is_finite(tensor)]
            found.problem = f"{len(wrong)} tensor(s) are not, the first is {wrong[0]}" if wrong else None
        with checks.add("factors of a layer fit each other") as found:
            found.problem = _compare_factors(tensors)
    with checks.add("base model is named") as found:
        found.problem = None if adapter.base else "base_model_name_or_path is empty; merge and push need --base"
    if tensors and adapter.base and (Path(adapter.base) / "config.json").is_file():
        with checks.add("the base has the layers that it changes") as found:
            found.problem = _compare_base(adapter, tensors)
    with checks.add("configurations name no other code") as found:
        found.problem = find_foreign_code(folder)
    return checks


def _compare_factors(tensors: dict) -> str | None:
    for name, tensor in tensors.items():
        other = tensors.get(name.replace("lora_A", "lora_B")) if "lora_A.weight" in name else tensor
        if other is None:
            return f"{name} has no lora_B"
        if "lora_A.weight" in name and other.shape[1] != tensor.shape[0]:
            return f"{name} has the rank {tensor.shape[0]} and its lora_B {other.shape[1]}"
    return None


def _compare_base(adapter: Adapter, tensors: dict) -> str | None:
    # Files may have older names of the same modules; their ends are the same.
    stored = {
        name: tensor.shape for name, tensor in CheckpointReader(Path(adapter.base), HEADER_DTYPES).tensors.items()
    }
    for name, tensor in tensors.items():
        if "lora_A.weight" not in name:
            continue
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        if layer in stored and stored[layer][-1] != tensor.shape[-1]:
            return f"{layer} of {adapter.base} takes {stored[layer][-1]} inputs; {name} takes {tensor.shape[-1]}"
        if layer not in stored and set(stored) & {"model.multi_modal_projector.linear_1.weight"}:
            return f"{adapter.base} has no {layer}, which {name} changes"
    return None


def _find_infinite(reader: CheckpointReader) -> str | None:
    packed = find_packed(reader.tensors)
    names = [name for name, stored in reader.tensors.items() if stored.dtype.is_floating_point and name not in packed]
    wrong = [name for name in names if not is_finite(reader.read(name))]
    reader.close()
    return f"{len(wrong)} tensor(s) hold values that are not finite, the first is {wrong[0]}" if wrong else None


def _find_relabelled(reader: CheckpointReader, settings: dict) -> str | None:
    packed = find_packed(reader.tensors)
    weights = {name: reader.tensors[name] for name in count_parameters(reader.tensors) if name not in packed}
    # Batch norms count their batches, in whole numbers.
    weights = {name: stored for name, stored in weights.items() if not name.endswith(".num_batches_tracked")}
    if find_quantization(settings) is None:
        whole = [name for name, stored in weights.items() if not stored.dtype.is_floating_point]
        if whole:
            return f"{whole[0]} is stored as {name_dtype(weights[whole[0]].dtype)}; expected a floating-point dtype"
        named = settings.get("dtype") or settings.get("torch_dtype")
        dtypes = {name_dtype(stored.dtype) for stored in weights.values()}
        if isinstance(named, str) and named not in dtypes:
            return f"config.json says {named}; the weights are stored as {', '.join(sorted(dtypes))}"
    found = [name for name in weights if find_relabelled(reader.read(name))]
    matrices = [name for name, stored in weights.items() if len(stored.shape) > 1]
    reader.close()
    if len(found) > len(matrices) / 2:
        tensor = reader.read(found[0])
        kinds = f"look like {find_relabelled(tensor)} read as {name_dtype(tensor.dtype)}"
        return f"{len(found)} tensor(s) {kinds}, the first is {found[0]}"
    return None


def _check_tokenizer(processor, config: PreTrainedConfig) -> str | None:
    tokenizer = processor.tokenizer
    found = tokenizer.convert_tokens_to_ids(processor.image_token)
    if found != config.image_token_id:
        return f"{processor.image_token!r} has the id {found}; config.json says {config.image_token_id}"
    if len(tokenizer) > config.text_config.vocab_size:
        return f"it has {len(tokenizer)} words; the model has {config.text_config.vocab_size} rows"
    return None if tokenizer.pad_token_id is not None else "it has no pad token"


def _check_template(processor, config: PreTrainedConfig) -> str | None:
    side = config.vision_config.image_size if config.model_type != "convllava" else 128
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = render_chat_template(processor, [{"role": "user", "content": content}])
    inputs = processor(text=text, images=Image.new("RGB", (side, side)))
    found = list(inputs["input_ids"][0]).count(config.image_token_id)
    if config.model_type == "llava_next":  # the number depends on the tiles; the processor knows it
        expected = processor._get_num_multimodal_tokens([(side, side)])["num_image_tokens"][0]
    elif config.model_type == "convllava":
        expected = config.num_image_tokens(*inputs["pixel_values"][0].shape[-2:])
    else:
        expected = config.image_seq_length
    return None if found == expected else f"an image gives {found} image tokens; expected {expected}"


def _compare_hashes(folder: Path) -> str | None:
    files = read_json(folder / "conversion_report.json").get("files", [])
    for file in files if isinstance(files, list) else [None]:
        name = file.get("name") if isinstance(file, dict) else None
        if not isinstance(name, str) or Path(name).name != name or "sha256" not in file:
            return "its list of files is not what convllava-hf writes; delete it"
    # Saved anew in other shards, the hashes are of files that are gone.
    if not all((folder / file["name"]).is_file() for file in files):
        return None
    wrong = [file["name"] for file in files if hash_file(folder / file["name"]) != file["sha256"]]
    return f"{wrong[0]} was changed or damaged since the conversion" if wrong else None
