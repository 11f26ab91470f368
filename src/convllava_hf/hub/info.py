"""What a checkpoint is, from its small files and the headers of its weights; original-format ones too.

No weights are read: of a repository on the Hub a few kilobytes per weight file are fetched. No code that comes with a
checkpoint runs.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, HfFileSystem, is_offline_mode, snapshot_download

from ..checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..checkpoints.architecture import check_source
from ..checkpoints.cards import CONFIG_CLASSES, list_image_tokens, read_outline, read_sources
from ..checkpoints.code_files import list_code_files
from ..checkpoints.reading import WEIGHT_FILES, StoredTensor, name_dtype, read_index, read_json
from ..checkpoints.shapes import BITSANDBYTES, count_parameters, find_quantization, read_header
from ..checkpoints.staging import name_replaced
from ..checkpoints.weight_maps import ConversionError, describe_cause
from ..shipped import CHAT_TEMPLATES
from ..training.plans import PARTS
from .client import explain_errors, guard_responses, list_remote


# What `info` fetches of a repository; a tokenizer is megabytes and tells nothing here.
SMALL_FILES = ("config.json", "*_config.json", "*.index.json", "conversion_report.json", "*.jinja", "README.md", "*.py")
# Bytes per weight. bitsandbytes quantises the linear layers of the language model; nf4 has a float32 for every 64.
BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "8-bit": (1, 2), "4-bit": (0.5 + 4 / 64, 2)}
NOT_QUANTIZED = re.compile(r"embed|wte|lm_head|norm")


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
        base: of an adapter, Hub id or folder.
        memory: precision -> bytes of the weights alone.
        chat_template: name of the template, `"its own"` or `None`.
        recipe: that it was trained with, if its card says.
        provenance: a line per source.
        code: code file -> state, see `checkpoints.code_files.list_code_files`.
    """

    name: str
    kind: str
    tensors: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    image_tokens: list[tuple[int, int, int]] = field(default_factory=list)
    quantization: str | None = None
    stored_bytes: int = 0
    base: str | None = None
    memory: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    recipe: str | None = None
    provenance: list[str] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines for people."""
        parts = ", ".join(f"{part} {count:,}" for part, count in self.parts.items())
        dtypes = f"{', '.join(self.dtypes)}, {format_size(self.stored_bytes)}"
        if self.quantization:
            dtypes += f", quantised by {self.quantization}"
        what = "parameters" if self.memory else "numbers"
        rows = [
            ("kind", self.kind),
            ("base", self.base),
            (what, f"{sum(self.parts.values()):,} in {self.tensors} tensors: {parts}"),
            ("stored as", dtypes),
            ("weights", ", ".join(f"{format_size(size)} in {name}" for name, size in self.memory.items())),
            ("images", ", ".join(f"{height}x{width}: {tokens} tokens" for height, width, tokens in self.image_tokens)),
            ("template", self.chat_template or (None if self.base else "none")),
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
    with _open_checkpoint(source, revision, token) as opened:
        return _describe(*opened)


def list_tensors(source: str | Path) -> dict[str, StoredTensor]:
    """Name -> shape and dtype of every tensor of a checkpoint, from its headers.

    Args:
        source: folder, or Hub id.

    Raises:
        HubError, ConversionError: as [`describe_checkpoint`].
    """
    with _open_checkpoint(source) as (_, *opened):
        return _read_headers(*opened)


@contextmanager
def _open_checkpoint(
    source: str | Path, revision: str | None = None, token: str | None = None
) -> Iterator[tuple[str, Path, set[str], Callable[[str], BinaryIO]]]:
    """Its name, a folder with its small files, the names of all files, and what opens one of them."""
    folder = Path(os.path.expanduser(source))
    name_replaced(folder.resolve())
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"{source} is a folder; revision {revision!r} needs a Hub id. Leave it out.")
        yield str(source), *_open_folder(folder)
        return
    repo_id = str(source)
    if is_offline_mode():  # what is in the cache is a folder
        with explain_errors(f"looking at {repo_id}", token):
            yield repo_id, *_open_folder(Path(snapshot_download(repo_id, revision=revision)))
        return
    with explain_errors(f"looking at {repo_id}", token), guard_responses():
        api = HfApi(token=token)
        commit, there = list_remote(api, repo_id, revision or "main", must_exist=True)
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=list(SMALL_FILES), token=token))
        system = HfFileSystem(endpoint=api.endpoint, token=token)

        def open_remote(name: str) -> BinaryIO:
            return system.open(f"{repo_id}/{name}", "rb", revision=commit, block_size=2**18)

        yield f"{repo_id} at {commit[:12]}", folder, set(there), open_remote


def _open_folder(folder: Path) -> tuple[Path, set[str], Callable[[str], BinaryIO]]:
    names = {path.name for path in folder.iterdir() if path.is_file()}  # opening a pipe would wait for ever
    return folder, names, lambda file: open(folder / file, "rb")


def _read_headers(folder: Path, names: set[str], open_file: Callable[[str], BinaryIO]) -> dict[str, StoredTensor]:
    tensors = {}
    for file in _list_weight_files(folder, names):
        with open_file(file) as content:
            tensors |= read_header(content, file)
    return tensors


def _describe(name: str, folder: Path, names: set[str], open_file: Callable[[str], BinaryIO]) -> CheckpointInfo:
    adapter = ADAPTER_CONFIG in names and not names & set(WEIGHT_FILES)
    config = read_json(folder / (ADAPTER_CONFIG if adapter else "config.json"))
    kind, architectures = str(config.get("model_type")), config.get("architectures")
    architectures = list(map(str, architectures)) if isinstance(architectures, list) else []
    info = CheckpointInfo(name, f"{kind} ({', '.join(architectures or ['no architecture named'])})")
    if adapter:
        sizes = [f", {key} {config[key]}" for key in ("r", "lora_alpha") if config.get(key) is not None]
        info.kind = f"PEFT adapter ({config.get('peft_type')}{''.join(sizes)})"
        info.base = str(config.get("base_model_name_or_path") or "not named")
    elif "mm_vision_tower" in config:
        info.kind = f"original format ({', '.join(architectures)}), to be converted; tower: "
        info.kind += str(config["mm_vision_tower"])
        info.image_tokens = _guess_image_tokens(str(config["mm_vision_tower"]))
    elif kind in CONFIG_CLASSES:
        try:
            check_source(folder)
            info.image_tokens = list_image_tokens(read_outline(folder))
        except Exception as error:  # settings of wrong types fail in every class in its own way
            problem = f"{folder / 'config.json'} cannot be read: {describe_cause(error)}. Get it again."
            raise ConversionError(problem) from error
    tensors = _read_headers(folder, names, open_file)
    default = "vision tower" if kind == "convnext" else "language model"
    parts, dtypes, quantized = Counter(), Counter(), 0
    info.quantization = find_quantization(config)
    counts = count_parameters(tensors)
    for tensor, stored in tensors.items():
        dtypes[name_dtype(stored.dtype)] += math.prod(stored.shape)
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
    if info.quantization in (None, BITSANDBYTES) and not adapter:  # how others count is not known here
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
            for part in read_sources(report)
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
    if not isinstance(text, str):
        return "its own"
    # The conversion writes settings of the checkpoint in front of a template.
    templates = {path.stem: path.read_text(encoding="utf-8").rstrip() for path in CHAT_TEMPLATES.glob("*.jinja")}
    return next((name for name, template in templates.items() if text.rstrip().endswith(template)), "its own")


def _list_weight_files(folder: Path, names: set[str]) -> list[str]:
    found = next((name for name in (*WEIGHT_FILES, *ADAPTER_WEIGHTS) if name in names), None)
    if found is None:
        raise ConversionError(f"{folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}.")
    if not found.endswith(".json"):
        return [found]
    files = sorted(set(read_index(folder / found).values()))
    for file in files:
        if file not in names:
            raise ConversionError(f"{file} is missing; {found} lists it. Get the missing shard.")
    return files
