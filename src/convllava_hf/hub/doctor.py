"""Whether a checkpoint is whole and sound: everything is read, and no code that comes with it runs."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)

from ..checkpoints.code_files import find_foreign_code, list_code_files
from ..checkpoints.reading import CheckpointReader, hash_file, read_json
from ..checkpoints.shapes import (
    BITSANDBYTES,
    HEADER_DTYPES,
    count_parameters,
    find_packed,
    find_quantization,
    list_shapes,
)
from ..checkpoints.weight_maps import ConversionError
from ..model.configuration_convllava import ConvLlavaConfig
from ..model.modeling_convllava import ConvLlavaForConditionalGeneration
from ..model.processing_convllava import ConvLlavaProcessor


MODEL_CLASSES = {
    "convllava": (ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaProcessor),
    "llava": (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor),
    "convnext": (ConvNextConfig, ConvNextModel, None),
}


@dataclass
class Check:
    """What was looked at, and what is wrong with it (`None`: nothing)."""

    name: str
    problem: str | None = None


def check_checkpoint(folder: str | Path) -> list[Check]:
    """Looks at everything in a checkpoint: tensors, values, tokenizer, template, code, hashes.

    Args:
        folder: of a ConvLLaVA, of a `llava` of transformers, or of a ConvNeXt tower.

    Returns:
        The checks in order, those that found something wrong included.

    Raises:
        ConversionError: the folder has no configuration, or one of another kind of model or of quantisation.
    """
    folder = Path(os.path.expanduser(folder))
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
    config_class, model_class, processor_class = MODEL_CLASSES[kind]
    checks: list[Check] = []

    @contextmanager
    def check(name: str) -> Iterator[Check]:
        checks.append(Check(name))
        try:
            yield checks[-1]
        except Exception as error:  # whatever a damaged file leads to is what is wrong with it
            checks[-1].problem = " ".join(f"{error}".split())[:500] or type(error).__name__

    config = reader = processor = None
    with check("configuration is read"):
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
            found.problem = _compare_shapes(reader, model_class, config)
    if reader is not None:
        with check("values are finite") as found:
            found.problem = _find_infinite(reader)
    if processor_class is not None:
        with check("processor is read"):
            processor = processor_class.from_pretrained(folder, trust_remote_code=False)
    if processor is not None and config is not None:
        with check("tokenizer has the image token") as found:
            found.problem = _check_tokenizer(processor, config)
        with check("chat template renders, with the right number of image tokens") as found:
            found.problem = _check_template(processor, config)
    if kind == "convllava":
        with check("code files are those of the installed version") as found:
            wrong = [f"{name} is {state}" for name, state in list_code_files(folder).items() if state != "same"]
            found.problem = "; ".join(wrong) or None
    with check("configurations name no other code") as found:
        found.problem = find_foreign_code(folder)
    # Saved anew in other shards, the hashes are of files that are gone.
    report = read_json(folder / "conversion_report.json") if (folder / "conversion_report.json").is_file() else {}
    files = report.get("files", [])
    if files and all((folder / file["name"]).is_file() for file in files):
        with check("weight files have the hashes of conversion_report.json") as found:
            found.problem = _compare_hashes(folder, files)
    return checks


def _compare_shapes(reader: CheckpointReader, model_class: type, config: PreTrainedConfig) -> str | None:
    with torch.device("meta"):
        model = model_class(config)
    counts = count_parameters(reader.tensors)
    stored = {name: reader.tensors[name].shape for name in counts}
    expected, tied = list_shapes(model, config)
    if not set(stored) & set(expected):  # transformers' llava under the names of its modules
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
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


def _find_infinite(reader: CheckpointReader) -> str | None:
    packed, wrong = find_packed(reader.tensors), []
    for name, stored in reader.tensors.items():
        if stored.dtype.is_floating_point and name not in packed:
            tensor = reader.read(name).reshape(-1)
            blocks = tensor.split(2**24)
            if not all((block if block.itemsize > 1 else block.float()).isfinite().all() for block in blocks):
                wrong.append(name)
    reader.close()
    return f"{len(wrong)} tensor(s) hold values that are not finite, the first is {wrong[0]}" if wrong else None


def _check_tokenizer(processor, config: PreTrainedConfig) -> str | None:
    tokenizer = processor.tokenizer
    found = tokenizer.convert_tokens_to_ids(processor.image_token)
    if found != config.image_token_id:
        return f"{processor.image_token!r} has the id {found}; config.json says {config.image_token_id}"
    if len(tokenizer) > config.text_config.vocab_size:
        return f"it has {len(tokenizer)} words; the model has {config.text_config.vocab_size} rows"
    return None if tokenizer.pad_token_id is not None else "it has no pad token"


def _check_template(processor, config: PreTrainedConfig) -> str | None:
    side = config.vision_config.image_size if config.model_type == "llava" else 128
    content = [{"type": "image", "image": Image.new("RGB", (side, side))}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    found = list(inputs["input_ids"][0]).count(config.image_token_id)
    height, width = inputs["pixel_values"][0].shape[-2:]
    is_convllava = config.model_type == "convllava"
    expected = config.num_image_tokens(height, width) if is_convllava else config.image_seq_length
    return None if found == expected else f"an image gives {found} image tokens; expected {expected}"


def _compare_hashes(folder: Path, files: list[dict]) -> str | None:
    wrong = [file["name"] for file in files if hash_file(folder / file["name"]) != file["sha256"]]
    return f"{wrong[0]} was changed or damaged since the conversion" if wrong else None
