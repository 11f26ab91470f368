"""What a checkpoint is, from its small files and the headers of its weights, and whether it is whole and sound.

`describe_checkpoint` reads no weights: of a repository on the Hub it fetches a few kilobytes per weight file. It knows
original-format checkpoints too. `check_checkpoint` reads everything. Neither runs code that comes with a checkpoint;
the headers of pickles are read by an unpickler that makes nothing but shapes.
"""

import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import HfApi, HfFileSystem, is_offline_mode, snapshot_download
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)

from .checkpoint_io import TORCH_DTYPES, WEIGHT_FILES, CheckpointReader, StoredTensor, hash_file, read_json
from .configuration_convllava import ConvLlavaConfig
from .conversion import list_shapes
from .hub import explain_errors, list_remote
from .model_cards import CONFIG_CLASSES, list_image_tokens
from .modeling_convllava import ConvLlavaForConditionalGeneration
from .plans import PARTS
from .processing_convllava import ConvLlavaProcessor
from .registration import find_foreign_code, list_code_files
from .template_files import CHAT_TEMPLATES
from .weight_maps import ConversionError


# What `info` fetches of a repository; a tokenizer is megabytes and tells nothing here.
SMALL_FILES = ("config.json", "*_config.json", "*.index.json", "conversion_report.json", "*.jinja", "README.md", "*.py")
MODEL_CLASSES = {
    "convllava": (ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaProcessor),
    "llava": (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor),
    "convnext": (ConvNextConfig, ConvNextModel, None),
}
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
# Bytes per weight. bitsandbytes quantises the linear layers of the language model; nf4 has a float32 for every 64.
BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "8-bit": (1, 2), "4-bit": (0.5 + 4 / 64, 2)}
NOT_QUANTIZED = re.compile(r"embed|wte|lm_head|norm")


# ---- what a checkpoint is


@dataclass
class CheckpointInfo:
    """What a checkpoint is.

    Attributes:
        name: Hub id or folder.
        kind: in words.
        tensors: number of stored tensors.
        parts: part -> parameters.
        dtypes: dtype -> stored numbers.
        image_tokens: height and width in pixels, tokens.
        quantization: method, if the weights are quantised. By another one than bitsandbytes, `parts` has numbers as
            they are stored, which may be several weights each.
        stored_bytes: of the weights as they are.
        memory: precision -> bytes of the weights alone.
        chat_template: name of the template, `"its own"` or `None`.
        recipe: that it was trained with, if its card says.
        provenance: a line per source.
        code: code file -> state, see `registration.list_code_files`.
    """

    name: str
    kind: str
    tensors: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    image_tokens: list[tuple[int, int, int]] = field(default_factory=list)
    quantization: str | None = None
    stored_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    recipe: str | None = None
    provenance: list[str] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def summary(self) -> str:
        """A few lines for people."""
        parts = ", ".join(f"{part} {count:,}" for part, count in self.parts.items())
        dtypes = f"{', '.join(self.dtypes)}, {format_size(self.stored_bytes)}"
        if self.quantization:
            dtypes += f", quantised by {self.quantization}"
        what = "parameters" if self.memory else "numbers"
        rows = [
            ("kind", self.kind),
            (what, f"{sum(self.parts.values()):,} in {self.tensors} tensors: {parts}"),
            ("stored as", dtypes),
            ("weights", ", ".join(f"{format_size(size)} in {name}" for name, size in self.memory.items())),
            ("images", ", ".join(f"{height}x{width}: {tokens} tokens" for height, width, tokens in self.image_tokens)),
            ("template", self.chat_template or "none"),
            ("recipe", self.recipe or "not recorded"),
            ("from", "; ".join(self.provenance) or "not recorded"),
        ]
        if self.code:
            states = {state: [name for name in self.code if self.code[name] == state] for state in self.code.values()}
            if set(states) == {"same"}:
                rows.append(("code", "equal to the installed version"))
            else:
                rows += [("code", f"{state}: {', '.join(names)}") for state, names in states.items() if state != "same"]
        return "\n".join([self.name, *(f"  {name:10}  {value}" for name, value in rows if value)])


def format_size(size: int) -> str:
    """A number of bytes in GB, or MB below one."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def describe_checkpoint(source: str | Path, revision: str | None = None, token: str | None = None) -> CheckpointInfo:
    """Finds out what a checkpoint is, without its weights.

    Args:
        source: folder, or Hub id.
        revision: branch, tag or commit on the Hub.
        token: of the Hub. Default: that of `hf auth login`.

    Returns:
        The description.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
        ConversionError: no configuration or no weights, or files that are damaged.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"{source} is a folder; revision {revision!r} needs a Hub id. Leave it out.")
        names = {path.name for path in folder.iterdir()}
        return _describe(str(source), folder, names, lambda name: open(folder / name, "rb"))
    repo_id = str(source)
    if is_offline_mode():  # what is in the cache is a folder
        with explain_errors(f"looking at {repo_id}", token):
            folder = Path(snapshot_download(repo_id, revision=revision))
            return _describe(
                repo_id, folder, {path.name for path in folder.iterdir()}, lambda n: open(folder / n, "rb")
            )
    with explain_errors(f"looking at {repo_id}", token):
        api = HfApi(token=token)
        commit, there = list_remote(api, repo_id, revision or "main", must_exist=True)
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=list(SMALL_FILES), token=token))
        system = HfFileSystem(endpoint=api.endpoint, token=token)

        def open_remote(name: str) -> BinaryIO:
            return system.open(f"{repo_id}/{name}", "rb", revision=commit, block_size=2**18)

        return _describe(f"{repo_id} at {commit[:12]}", folder, set(there), open_remote)


def _describe(name: str, folder: Path, names: set[str], open_file: Callable[[str], BinaryIO]) -> CheckpointInfo:
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    is_original = "mm_vision_tower" in config
    info = CheckpointInfo(name, f"{kind} ({', '.join(config.get('architectures') or ['no architecture named'])})")
    if is_original:
        info.kind = f"original format ({', '.join(config.get('architectures') or [])}), to be converted; tower: "
        info.kind += str(config["mm_vision_tower"])
        info.image_tokens = _guess_image_tokens(str(config["mm_vision_tower"]))
    elif kind in CONFIG_CLASSES:
        info.image_tokens = list_image_tokens(CONFIG_CLASSES[kind].from_pretrained(folder))
    tensors = {}
    for file in _list_weight_files(folder, names):
        with open_file(file) as content:
            tensors |= read_header(content, file)
    default = "vision tower" if kind == "convnext" else "language model"
    parts, dtypes, quantized = Counter(), Counter(), 0
    info.quantization = find_quantization(config)
    counts = count_parameters(tensors)
    for tensor, stored in tensors.items():
        dtypes[str(stored.dtype).removeprefix("torch.")] += math.prod(stored.shape)
        if tensor not in counts:
            continue
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, tensor)), default)
        part = "projector" if "mm_projector" in tensor else part
        count = counts[tensor]
        parts[part] += count
        if part == "language model" and len(stored.shape) == 2 and not NOT_QUANTIZED.search(tensor):
            quantized += count
    info.tensors, info.dtypes = len(tensors), dict(dtypes)
    info.parts = {part: parts[part] for part in PARTS if parts[part]}
    total = sum(parts.values())
    info.stored_bytes = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in tensors.values())
    if info.quantization in (None, BITSANDBYTES):  # how others count is not known here
        info.memory = {
            key: round(small * quantized + large * (total - quantized)) for key, (small, large) in BYTES.items()
        }
    info.chat_template = _name_template(folder)
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    recipe = re.search(r"^\| recipe \| (.+?) \|$", card, re.MULTILINE)
    info.recipe = recipe[1] if recipe else None
    if (folder / "conversion_report.json").is_file():
        report = read_json(folder / "conversion_report.json")
        info.provenance = [
            f"{part['role']} {part['name']}" + (f" at {part['revision'][:12]}" if part["revision"] else "")
            for part in report.get("sources", [])
        ]
    info.code = list_code_files(folder)
    return info


def _guess_image_tokens(tower: str) -> list[tuple[int, int, int]]:
    """Tokens of the released towers, by what their names say: the tower lies in another repository."""
    if match := re.search(r"ConvNeXt-(\d+)$", tower):
        side = int(match[1])
        return [(side, side, (side // 64) ** 2)]
    if match := re.search(r"patch(\d+)(?:-(\d+))?$", tower):
        side = int(match[2] or 224)
        return [(side, side, (side // int(match[1])) ** 2)]
    return []


def _name_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8") if file.is_file() else None
    if text is None and (folder / "tokenizer_config.json").is_file():
        text = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not text:
        return None
    # The conversion writes settings of the checkpoint in front of a template.
    templates = {path.stem: path.read_text(encoding="utf-8").rstrip() for path in CHAT_TEMPLATES.glob("*.jinja")}
    return next((name for name, template in templates.items() if text.rstrip().endswith(template)), "its own")


# ---- headers


def _list_weight_files(folder: Path, names: set[str]) -> list[str]:
    found = next((name for name in WEIGHT_FILES if name in names), None)
    if found is None:
        raise ConversionError(f"{folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}.")
    if not found.endswith(".json"):
        return [found]
    files = sorted(set(read_json(folder / found).get("weight_map", {}).values()))
    for file in files:
        if file not in names:
            raise ConversionError(f"{file} is missing; {found} lists it. Get the missing shard.")
    return files


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


# ---- whether it is sound


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
