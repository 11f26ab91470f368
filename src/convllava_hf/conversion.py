"""Makes checkpoints of ours: from the released ConvLLaVA ones, from vision towers alone, or from two parts.

Weights stream from the sources to the output (see `checkpoint_io`), names follow the tables of `weight_maps`, and every
tensor of every source is accounted for in `conversion_report.json`. The result is read back and compared before it gets
its name.

Notation: `R` rows of the original vocabulary, `V` rows of the new one, `D` width of the language model.

Source of the original behaviour: alibaba/conv-llava, `llava/model/builder.py` and `llava/model/llava_arch.py` (what is
loaded from where), `llava/model/multimodal_encoder/convnext_encoder.py` (tower, its image processor, `add_stage`),
`llava/train/train.py` (`smart_tokenizer_and_embedding_resize`: new rows are the mean of the old ones).
"""

import copy
import json
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextModel,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedConfig,
)

from . import __version__
from .checkpoint_io import (
    TORCH_DTYPES,
    WEIGHT_FILES,
    CheckpointReader,
    StoredTensor,
    TensorToWrite,
    WrittenFile,
    check_output,
    hash_file,
    parse_size,
    read_json,
    stage_output,
    write_checkpoint,
)
from .configuration_convllava import ConvLlavaConfig
from .image_processing_convllava import ConvLlavaImageProcessor
from .modeling_convllava import ConvLlavaForConditionalGeneration
from .processing_convllava import ConvLlavaProcessor
from .registration import HUB_FILES
from .weight_maps import (
    CONVLLAVA,
    CONVNEXT,
    OPEN_CLIP_CONVNEXT,
    TIMM_CONVNEXT,
    VISION_TOWER,
    ConversionError,
    Dropped,
    WeightMap,
    build_causal_lm_map,
)


IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
# Rows of the embeddings come in multiples of this: matrix products of such sizes are faster, and shards divide evenly.
VOCABULARY_MULTIPLE = 64
DEFAULT_RESAMPLE = 3  # bicubic, PIL.Image.Resampling
DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Answers end by themselves; this bounds those that do not, where a caller gives no bound. The original: 1024.
MAX_NEW_TOKENS = 1024
# What is read from the config.json of a released language model, whose `model_type` says "llava".
LLAMA_CONFIG_KEYS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
)
CONVNEXT_CONFIG_KEYS = (
    "depths",
    "drop_path_rate",
    "hidden_act",
    "hidden_sizes",
    "image_size",
    "initializer_range",
    "layer_norm_eps",
    "layer_scale_init_value",
    "num_channels",
    "num_stages",
    "patch_size",
)
# The first of these names that a checkpoint holds says whose names its tower has.
TOWER_MARKS = {
    "visual.trunk.stem.0.weight": OPEN_CLIP_CONVNEXT,
    "stem.0.weight": TIMM_CONVNEXT,
    "embeddings.patch_embeddings.weight": CONVNEXT,
    "convnext.embeddings.patch_embeddings.weight": CONVNEXT,
}


@dataclass
class ConversionReport:
    """What was done; also `conversion_report.json` in the output.

    Attributes:
        output (`Path`): the new checkpoint.
        content (`dict`): sources with hashes, counts, every tensor, the output's files, the checks that passed.
    """

    output: Path
    content: dict

    def summary(self) -> str:
        """A few lines for people."""
        content = self.content
        lines = [f"{content['kind']} -> {self.output}"]
        for source in content["sources"]:
            revision = f" at {source['revision'][:12]}" if source["revision"] else ""
            lines.append(f"  from     {source['role']}: {source['name']}{revision}")
        counts = ", ".join(f"{number} {action}" for action, number in content["counts"].items() if number)
        lines.append(f"  tensors  {counts}")
        if tokens := content.get("vocabulary"):
            added = ", ".join(f"{token} = {number}" for token, number in tokens["added"].items()) or "no new token"
            lines.append(f"  words    {tokens['rows_before']} -> {tokens['rows_after']} rows; {added}")
        files = content["files"]
        size = sum(file["bytes"] for file in files)
        lines.append(f"  wrote    {len(files)} weight file(s), {size / 1e9:.3f} GB, {content['dtype']}")
        lines.append(f"  checked  {'; '.join(content['checks'])}")
        peak = content["peak_memory_bytes"]
        memory = f"{peak / 1e9:.2f} GB at the peak (whole process)" if peak else "memory not measured on this system"
        lines.append(f"  took     {content['seconds']:.1f} s, {memory}")
        return "\n".join(lines)


@dataclass
class Source:
    """A repository that weights come from: its name for people, its folder, and the commit if it is from the Hub."""

    role: str
    name: str
    folder: Path
    revision: str | None
    reader: CheckpointReader = field(init=False)

    def open(self):
        """Lists the tensors; see `CheckpointReader` for what it raises."""
        self.reader = CheckpointReader(self.folder)


@dataclass
class Part:
    """Tensors of one source with the names that they get: `targets` new -> original, `dropped` original -> reason."""

    role: str
    tensors: dict[str, StoredTensor]
    read: Callable[[str], torch.Tensor]
    targets: dict[str, str]
    dropped: dict[str, str]


@dataclass
class Tower:
    """A vision tower: its tensors under ConvNextModel's names, its configuration, and how images are prepared for it."""

    source: Source
    part: Part
    config: ConvNextConfig
    image_size: int
    image_mean: list[float]
    image_std: list[float]
    resample: int


@dataclass
class Vocabulary:
    """How tables of `R` rows grow to `V`: which tensors, how many rows hold words, and which rows are new."""

    tensors: tuple[str, ...]
    num_words: int
    new_rows: list[int]
    added: dict[str, int]
    rows_before: int
    rows_after: int


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    vision_revision: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> ConversionReport:
    """Converts a released ConvLLaVA checkpoint, or a vision tower alone.

    A language model with `mm_vision_tower` in its configuration becomes a [`ConvLlavaForConditionalGeneration`] with its
    tower, tokenizer, processor, chat template and code files. A tower (ConvLLaVA-ConvNeXt-*, LAION-CLIP-ConvNeXt-*, any
    ConvNeXt of transformers, timm or open_clip) becomes a `ConvNextModel` that [`init_model`] takes.

    Args:
        source: Hub id or folder.
        output: folder to make.
        vision_tower: Hub id or folder in place of the configuration's `mm_vision_tower`.
        revision: branch, tag or commit of `source` on the Hub.
        vision_revision: the same for the tower.
        dtype: `"auto"` (every tensor as it is stored), `"float32"`, `"float16"` or `"bfloat16"`.
        max_shard_size: bytes per weight file, or such as `"5GB"`.
        force: replace `output` if it is the folder of a model.

    Returns:
        The report; it also lies in the output.

    Raises:
        ConversionError: anything that keeps the result from being complete and exact. Nothing is left at `output`.
    """
    started = time.monotonic()
    output, limit, cast = _check_arguments(output, force, max_shard_size, dtype)
    main = _resolve(source, revision, "language model", "Pass the id of a Hub repository, or a folder.")
    config = read_json(main.folder / "config.json") if (main.folder / "config.json").is_file() else {}
    if config.get("model_type") == "convllava":
        raise ConversionError(f"{main.name} is converted already (its model_type is 'convllava'); use it as it is.")
    if "mm_vision_tower" not in config and "LlavaLlamaForCausalLM" not in config.get("architectures", []):
        if vision_tower is not None:
            raise ConversionError(
                f"{main.name} is no ConvLLaVA language model (no 'mm_vision_tower' in its config.json), so it takes no "
                f"--vision-tower {str(vision_tower)!r}. To build a model from a tower and a language model use init."
            )
        main.role = "vision tower"
        return _convert_tower(_read_tower(main), output, limit, cast, force, started)

    text_config, projector_type, tower_name = _read_llava_config(config, main)
    main.open()
    text = _map_part(main, CONVLLAVA)
    tower = _read_tower(
        _resolve(
            tower_name if vision_tower is None else vision_tower,
            vision_revision,
            "vision tower",
            "Pass --vision-tower with the folder or Hub id of the tower"
            + (f" (config.json of {main.name} names {tower_name!r})." if vision_tower is None else "."),
        )
    )
    if tower.config.hidden_sizes[-1] != config.get("mm_hidden_size", tower.config.hidden_sizes[-1]):
        raise ConversionError(
            f"the tower {tower.source.name} gives features of width {tower.config.hidden_sizes[-1]}; the projector of "
            f"{main.name} expects mm_hidden_size = {config['mm_hidden_size']}. Pass the right --vision-tower."
        )
    tokenizer = _load_tokenizer(main.folder, text_config)
    tokenizer.model_max_length = config.get("tokenizer_model_max_length") or tokenizer.model_max_length
    build = _Build(
        kind="ConvLLaVA checkpoint",
        tower=tower,
        text=text,
        text_source=main,
        text_config=text_config,
        tokenizer=tokenizer,
        projector_type=projector_type,
        image_size=tower.image_size,
        chat_template="vicuna_v1",
        license="llama2",
    )
    return build.write(output, limit, cast, force, started)


def init_model(
    vision: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    resolution: int,
    add_stage: str | None = None,
    projector_type: str = "mlp2x_gelu",
    chat_template: str | None = None,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    force: bool = False,
    seed: int = 0,
) -> ConversionReport:
    """Builds a new model from a vision tower and a language model, ready for stage 1: projector and added stage are fresh.

    Args:
        vision: Hub id or folder of a ConvNeXt tower, as for [`convert_checkpoint`].
        text: Hub id or folder of a causal language model of transformers.
        output: folder to make.
        resolution: side of the square images in pixels, a multiple of the tower's downsampling factor.
        add_stage: `"BLOCKSxWIDTH"`, a stage to put behind the tower's last, for example `"6x3072"`.
        projector_type: `"mlpNx_gelu"` or `"linear"`.
        chat_template: name of a template of this package. Default: `"vicuna_v1"` where `</s>` ends a text, `"chatml"`
            where the tokenizer knows `<|im_end|>`.
        vision_revision, text_revision: branch, tag or commit on the Hub.
        dtype, max_shard_size, force: as for [`convert_checkpoint`].
        seed: of the fresh weights. Each tensor depends on the seed and its name alone.

    Returns:
        The report.

    Raises:
        ConversionError: as for [`convert_checkpoint`]; also parts that do not fit together.
    """
    started = time.monotonic()
    output, limit, cast = _check_arguments(output, force, max_shard_size, dtype)
    tower = _read_tower(_resolve(vision, vision_revision, "vision tower", "Pass --vision with a Hub id or a folder."))
    if add_stage is not None:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", add_stage)
        if not match:
            raise ConversionError(f"add_stage={add_stage!r}; expected BLOCKSxWIDTH, for example '6x3072'.")
        values = {key: getattr(tower.config, key) for key in CONVNEXT_CONFIG_KEYS}
        values["depths"] = [*tower.config.depths, int(match[1])]
        values["hidden_sizes"] = [*tower.config.hidden_sizes, int(match[2])]
        tower.config = ConvNextConfig(**{**values, "num_stages": tower.config.num_stages + 1})
    tower.config.image_size = resolution

    main = _resolve(text, text_revision, "language model", "Pass --text with a Hub id or a folder.")
    try:
        text_config = AutoConfig.from_pretrained(main.folder, trust_remote_code=False)
        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(text_config, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ConversionError(
            f"{main.name} is no causal language model that transformers knows: {error}. Pass another --text."
        ) from error
    head = next(name for name, module in causal.named_modules() if module is causal.get_output_embeddings())
    main.open()
    tokenizer = _load_tokenizer(main.folder, text_config)
    if chat_template is None:
        if tokenizer.eos_token == "</s>":
            chat_template = "vicuna_v1"
        elif "<|im_end|>" in tokenizer.get_vocab():
            chat_template = "chatml"
        else:
            raise ConversionError(
                f"no chat template fits the tokenizer of {main.name}, whose texts end in {tokenizer.eos_token!r}; "
                "expected '</s>' or a token '<|im_end|>'. Pass --chat-template to choose one all the same."
            )
    build = _Build(
        kind="new model",
        tower=tower,
        text=_map_part(main, build_causal_lm_map(causal.base_model_prefix, head)),
        text_source=main,
        text_config=text_config,
        tokenizer=tokenizer,
        projector_type=projector_type,
        image_size=resolution,
        chat_template=chat_template,
        license=None,
        fresh_stage=None if add_stage is None else tower.config.num_stages - 1,
        seed=seed,
    )
    return build.write(output, limit, cast, force, started)


def _check_arguments(output, force: bool, max_shard_size, dtype: str) -> tuple[Path, int, torch.dtype | None]:
    """Checks what needs no look at the sources, so that a mistake costs no download."""
    if dtype not in DTYPES:
        raise ConversionError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}.")
    output = Path(output).expanduser().resolve()
    check_output(output, force)
    return output, parse_size(max_shard_size), DTYPES[dtype]


def _resolve(name: str | Path, revision: str | None, role: str, fix: str) -> Source:
    """Finds a repository: a folder as it is, else the Hub, else what the Hub's cache holds."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"{name} is a folder; revision {revision!r} needs a Hub id. Leave the revision out.")
        return Source(role, folder.resolve().name, folder.resolve(), None)
    name = str(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConversionError(f"there is no folder {name!r} for the {role}, and it is no Hub id. {fix}")
    try:
        files = HfApi().list_repo_files(name, revision=revision)
        weights = next((file for file in WEIGHT_FILES if file in files), "")
        # One format is enough, and for shards their index does not name them before it is there.
        patterns = ["*.json", "*.model", "*.txt", weights]
        if weights.endswith(".index.json"):
            stem, suffix = weights.removesuffix(".index.json").split(".")
            patterns[-1] = f"{stem}-*.{suffix}"
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # errors of the Hub, of HTTP and of sockets have no common base
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConversionError(
                f"the {role} {name!r} is no folder here and could not be fetched from the Hub: {reason} {fix}"
            ) from error
    return Source(role, name, folder, folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None)


def _read_llava_config(config: dict, source: Source) -> tuple[LlamaConfig, str, str]:
    """Reads the configuration of a released language model.

    Returns:
        The Llama configuration, the projector's type and the name of the tower.
    """

    def refuse(key: str, expected: str):
        raise ConversionError(
            f"config.json of {source.name} has {key} = {config.get(key)!r}; expected {expected}. Only ConvLLaVA's "
            "checkpoints can be converted."
        )

    if config.get("architectures") != ["LlavaLlamaForCausalLM"]:
        refuse("architectures", "['LlavaLlamaForCausalLM']")
    if config.get("mm_vision_select_layer", -1) != -1:
        refuse("mm_vision_select_layer", "-1, the last map of the tower")
    if config.get("image_aspect_ratio") != "pad":
        refuse("image_aspect_ratio", "'pad'")
    if config.get("mm_use_im_start_end", False):
        refuse("mm_use_im_start_end", "false")
    if not isinstance(config.get("mm_vision_tower"), str):
        refuse("mm_vision_tower", "the name of the tower's repository")
    text_config = LlamaConfig(**{key: config[key] for key in LLAMA_CONFIG_KEYS if key in config})
    return text_config, config.get("mm_projector_type", "linear"), config["mm_vision_tower"]


def _map_part(source: Source, *maps: WeightMap) -> Part:
    """Looks every tensor of a source up, in one table after the other."""
    targets, dropped = {}, {}
    for name in source.reader.tensors:
        target = name
        for table in maps:
            try:
                target = table.rename(target)
            except ConversionError as error:
                raise ConversionError(f"{source.role} {source.name}: {error}") from None
            if isinstance(target, Dropped):
                dropped[name] = target.reason
                break
        else:
            if target in targets:
                raise ConversionError(
                    f"{source.role} {source.name}: {targets[target]!r} and {name!r} both are {target!r}; expected one of "
                    "them. Remove the one that does not belong there."
                )
            targets[target] = name
    return Part(source.role, source.reader.tensors, source.reader.read, targets, dropped)


def _read_tower(source: Source) -> Tower:
    """Reads a vision tower of transformers, timm or open_clip."""
    config_files = [name for name in ("config.json", "open_clip_config.json") if (source.folder / name).is_file()]
    config = {name: read_json(source.folder / name) for name in config_files}
    source.open()
    tensors = source.reader.tensors
    table = next((table for mark, table in TOWER_MARKS.items() if mark in tensors), None)
    if table is None:
        kind = config.get("config.json", {}).get("model_type", "unknown")
        raise ConversionError(
            f"{source.name} is no ConvNeXt (model_type {kind!r}); expected one of transformers, timm or open_clip, with a "
            f"tensor named {', '.join(repr(mark) for mark in TOWER_MARKS)}. Pass another vision tower."
        )
    part = _map_part(source, table)
    shapes = {target: tensors[name].shape for target, name in part.targets.items()}
    if table is CONVNEXT:
        settings = read_json(source.folder / "config.json")
        vision_config = ConvNextConfig(**{key: settings[key] for key in CONVNEXT_CONFIG_KEYS if key in settings})
        return Tower(source, part, vision_config, *_read_clip_processor(source.folder / "preprocessor_config.json"))
    if table is OPEN_CLIP_CONVNEXT:
        settings = config.get("open_clip_config.json") or read_json(source.folder / "open_clip_config.json")
        vision = settings.get("model_cfg", {}).get("vision_cfg", {})
        _check_timm(vision.get("timm_model_name"), {}, source)
        image_size = vision.get("image_size", 224)
        images = settings.get("preprocess_cfg", {})
    else:
        settings = read_json(source.folder / "config.json")
        _check_timm(settings.get("architecture"), settings.get("model_args", {}), source)
        images = settings.get("pretrained_cfg", settings)
        image_size = images.get("input_size", [3, 224, 224])[-1]
    # CLIP's statistics are the defaults of open_clip; timm always writes its own.
    mean, std = (list(images.get(key, getattr(ConvLlavaImageProcessor, f"image_{key}"))) for key in ("mean", "std"))
    vision_config = _derive_convnext_config(shapes, image_size)
    _flatten_pointwise(part, vision_config)
    return Tower(source, part, vision_config, image_size, mean, std, DEFAULT_RESAMPLE)


def _check_timm(architecture: str | None, model_args: dict, source: Source):
    """Refuses timm models whose arithmetic ConvNextModel, with its norms' fixed epsilon and plain GELU, does not have."""
    reason = next((f"model_args {key!r}" for key in ("act_layer", "norm_eps", "norm_layer") if key in model_args), None)
    if str(architecture).startswith("convnext_xxlarge"):
        reason = "norms with an epsilon of 1e-5"
    if reason:
        raise ConversionError(
            f"{source.name} ({architecture}) has {reason}; expected timm's defaults, layer norms with epsilon 1e-6 and "
            "GELU. Use it through transformers' timm_wrapper, or pass another tower."
        )


def _derive_convnext_config(shapes: dict[str, tuple[int, ...]], image_size: int) -> ConvNextConfig:
    """Reads depths and widths off the shapes of a tower, under ConvNextModel's names."""
    blocks = Counter()
    widths = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.\d+\.dwconv\.weight", name):
            blocks[int(match[1])] += 1
            widths[int(match[1])] = shape[0]
    stem = shapes["embeddings.patch_embeddings.weight"]
    return ConvNextConfig(
        num_channels=stem[1],
        patch_size=stem[2],
        num_stages=len(blocks),
        depths=[blocks[stage] for stage in sorted(blocks)],
        hidden_sizes=[widths[stage] for stage in sorted(widths)],
        layer_norm_eps=1e-6,
        image_size=image_size,
    )


def _flatten_pointwise(part: Part, config: ConvNextConfig):
    """timm's small ConvNeXts hold pointwise layers as 1x1 convolutions: `(out, in, 1, 1)` becomes `(out, in)`."""
    pointwise = {name for target, name in part.targets.items() if re.search(r"\.pwconv[12]\.weight$", target)}
    pointwise = {name for name in pointwise if part.tensors[name].shape[2:] == (1, 1)}
    read = part.read
    part.read = lambda name: read(name).flatten(1) if name in pointwise else read(name)
    part.tensors = {
        name: StoredTensor(stored.shape[:2], stored.dtype, stored.file) if name in pointwise else stored
        for name, stored in part.tensors.items()
    }


def _read_clip_processor(path: Path) -> tuple[int, list[float], list[float], int]:
    """Reads a CLIPImageProcessor: side of the square in pixels, mean, standard deviation, filter."""
    settings = read_json(path)

    def side(key: str) -> int | None:
        value = settings.get(key)
        if isinstance(value, dict):
            value = value.get("shortest_edge", value.get("height"))
        return value

    size, crop = side("size"), side("crop_size")
    if not isinstance(size, int) or size != (crop or size):
        raise ConversionError(
            f"{path} has size {settings.get('size')!r} and crop_size {settings.get('crop_size')!r}; expected the same side "
            "in both, in pixels. Only then is a padded square kept whole."
        )
    if not all(isinstance(settings.get(key), list) and len(settings[key]) == 3 for key in ("image_mean", "image_std")):
        raise ConversionError(f"{path} has no image_mean and image_std of three numbers; expected those of the tower.")
    return size, settings["image_mean"], settings["image_std"], settings.get("resample", DEFAULT_RESAMPLE)


def _load_tokenizer(folder: Path, config: PreTrainedConfig):
    """Loads the tokenizer that the language model was trained with.

    AutoTokenizer loses SentencePiece's leading space on a repository whose model_type is "llava" and whose tokenizer is
    in the old format; LlamaTokenizer with `legacy=False` gives the original ids.
    """
    try:
        if config.model_type == "llama" and (folder / "tokenizer.model").is_file():
            return LlamaTokenizer.from_pretrained(folder, legacy=False)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # sentencepiece, tokenizers and transformers have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(f"the tokenizer in {folder.name} cannot be loaded: {reason} Get its files again.") from error


def extend_rows(rows: torch.Tensor, num_rows: int, new_rows: list[int], num_words: int, distinct: bool) -> torch.Tensor:
    """Grows a table of the vocabulary and fills its new rows from the words that are there, without random numbers.

    Args:
        rows: `(R, D)` weights, or `(R,)` biases.
        num_rows: `V`.
        new_rows: rows to fill; the others keep their values.
        num_words: rows that the means are taken over, from the first.
        distinct: the k-th new row is the mean of every n-th word from the k-th on (n new rows). Embeddings need rows
            that differ, so that a placeholder can be told from padding; for the output layer the mean of all words,
            which makes a new word's score the mean score, is the better start.

    Returns:
        `(V, D)` or `(V,)`, in the same dtype. Means are taken in float64.
    """
    table = rows.new_empty((num_rows, *rows.shape[1:]))
    table[: len(rows)] = rows[:num_rows]
    step = min(len(new_rows), num_words) if distinct else 1
    # In blocks of whole steps, so that the float64 copy stays small.
    block = max(1, 2048 // step) * step
    sums = torch.zeros((step, *rows.shape[1:]), dtype=torch.float64)
    for start in range(0, num_words, block):
        part = rows[start : min(start + block, num_words)].double()
        for offset in range(min(step, len(part))):
            sums[offset] += part[offset::step].sum(0)
    counts = torch.tensor([len(range(offset, num_words, step)) for offset in range(step)], dtype=torch.float64)
    means = (sums / counts.view(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)
    for number, row in enumerate(new_rows):
        table[row] = means[number % step]
    return table


def plan_weights(
    shapes: dict[str, tuple[int, ...]],
    parts: list[Part],
    *,
    dtype: torch.dtype | None = None,
    vocabulary: Vocabulary | None = None,
    fresh: Callable[[str], Callable[[], torch.Tensor] | None] = lambda name: None,
    tied: tuple[str, ...] = (),
) -> tuple[list[TensorToWrite], list[dict]]:
    """Says for every tensor of the new model where it comes from, and for every tensor of the sources where it goes.

    Args:
        shapes: name -> shape of everything that the new model stores.
        parts: the sources; the first one's dtype is that of fresh tensors.
        dtype: of all floating-point tensors; `None` keeps each as it is stored.
        vocabulary: tensors that grow.
        fresh: gives for a name that no source has a function that makes the tensor in float32, or `None`.
        tied: names that the new model does not store because they share another tensor's memory.

    Returns:
        What to write, in the order of `shapes`, and one record per tensor for the report.

    Raises:
        ConversionError: a missing tensor, one that has no place, or one of another shape.
    """
    found, records = {}, []
    for part in parts:
        for target, name in list(part.targets.items()):
            if target in tied:
                part.dropped[name] = "shares the memory of the input embeddings"
            elif target not in shapes:
                raise ConversionError(
                    f"the {part.role} holds {name!r}, for which the model that its config.json describes has no place "
                    f"({target!r}); expected weights and config.json of one model. Check config.json, or get both again."
                )
            else:
                found[target] = (part, name)
        for name, reason in part.dropped.items():
            stored = part.tensors[name]
            records.append(_record(part, name, stored, None, "dropped", stored.shape, stored.dtype, reason))

    first = next(iter(parts[0].tensors.values())).dtype
    tensors, missing = [], []
    for target, shape in shapes.items():
        if target not in found:
            make = fresh(target)
            if make is None:
                missing.append(target)
                continue
            new_dtype = dtype or first
            tensors.append(TensorToWrite(target, shape, new_dtype, _loader(make, target, new_dtype)))
            records.append(_record(None, None, None, target, "initialised", shape, new_dtype))
            continue
        part, name = found[target]
        stored = part.tensors[name]
        new_dtype = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        load, action = (lambda part=part, name=name: part.read(name)), "renamed"
        expected = shape
        if vocabulary and target in vocabulary.tensors:
            expected = (vocabulary.rows_before, *shape[1:])
            load = _row_loader(load, vocabulary, distinct="embed" in target)
            action = "extended"
        if stored.shape != expected:
            raise ConversionError(
                f"{name!r} of the {part.role} ({stored.file}) has shape {stored.shape}; expected {expected} from its "
                "config.json. Check config.json, or get both again."
            )
        tensors.append(TensorToWrite(target, shape, new_dtype, _loader(load, target, new_dtype)))
        records.append(_record(part, name, stored, target, action, shape, new_dtype))
    if missing:
        raise ConversionError(
            f"{len(missing)} tensors are in no source, first {missing[0]!r}; expected all of what config.json describes. "
            "The checkpoint is incomplete, or not of this model: get it again."
        )
    return tensors, records


def _loader(load: Callable[[], torch.Tensor], name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def load_as() -> torch.Tensor:
        tensor = load()
        cast = tensor.to(dtype)
        if dtype == torch.float16 and torch.isinf(cast).any() and not torch.isinf(tensor).any():
            raise ConversionError(
                f"{name!r} has values up to {tensor.abs().max().item():.3g}, which float16 cannot hold; expected at most "
                "65504. Pass --dtype bfloat16."
            )
        return cast

    return load_as


def _row_loader(load: Callable, vocabulary: Vocabulary, distinct: bool) -> Callable[[], torch.Tensor]:
    return lambda: extend_rows(load(), vocabulary.rows_after, vocabulary.new_rows, vocabulary.num_words, distinct)


def _record(part, name, stored, target, action, shape, dtype, reason=None) -> dict:
    record = {"action": action, "target": target, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    if part is not None:
        record |= {"source": part.role, "name": name, "file": stored.file}
        if stored.shape != tuple(shape):
            record["source_shape"] = list(stored.shape)
    return record | ({"reason": reason} if reason else {})


def _make_fresh(model: nn.Module, name: str, seed: int) -> torch.Tensor:
    """Initialises one tensor of a model on the meta device as the original's new modules are: by torch's defaults.

    Args:
        model: on the meta device.
        name: a parameter of it.
        seed: see `init_model`.

    Returns:
        float32, on the CPU.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf == "layer_scale_parameter":
        return torch.full(module.layer_scale_parameter.shape, model.config.vision_config.layer_scale_init_value)
    # Weight and bias come from one initialisation, which is repeated for each of the two.
    module = copy.deepcopy(module).to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}.{owner}".encode()))
        module.reset_parameters()
    return getattr(module, leaf).detach()


@dataclass
class _Build:
    """Everything that a model is made of; `write` makes it."""

    kind: str
    tower: Tower
    text: Part
    text_source: Source
    text_config: PreTrainedConfig
    tokenizer: object
    projector_type: str
    image_size: int
    chat_template: str
    license: str | None
    fresh_stage: int | None = None
    seed: int | None = None

    def write(self, output: Path, limit: int, dtype: torch.dtype | None, force: bool, started: float):
        """Plans, writes and checks; see `convert_checkpoint`."""
        template = Path(__file__).with_name("chat_templates") / f"{self.chat_template}.jinja"
        if not template.is_file():
            names = ", ".join(sorted(path.stem for path in template.parent.glob("*.jinja")))
            raise ConversionError(f"chat_template={self.chat_template!r}; expected one of {names}.")
        vocabulary = self._add_tokens()
        config, processor = self._describe(vocabulary, template.read_text(encoding="utf-8"))
        with torch.device("meta"):
            model = ConvLlavaForConditionalGeneration(config)
        tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
        embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        vocabulary.tensors = (f"{embeddings}.weight", "lm_head.weight", "lm_head.bias")

        new = ["model.multi_modal_projector."] if self.seed is not None else []
        if self.fresh_stage is not None:
            new.append(f"model.vision_tower.encoder.stages.{self.fresh_stage}.")
        parts = [self.text, _nest_tower(self.tower.part)]
        tensors, records = plan_weights(
            shapes,
            parts,
            dtype=dtype,
            vocabulary=vocabulary,
            fresh=lambda name: (
                (lambda: _make_fresh(model, name, self.seed)) if name.startswith(tuple(new)) else None
            ),
            tied=tied,
        )
        config.dtype = next(tensor.dtype for tensor in tensors if tensor.name == vocabulary.tensors[0])

        def save(folder: Path):
            config.architectures = [ConvLlavaForConditionalGeneration.__name__]
            config.save_pretrained(folder)
            self._generation_config().save_pretrained(folder)
            processor.save_pretrained(folder)
            for name in HUB_FILES:
                shutil.copyfile(Path(__file__).with_name(name), folder / name)

        content = {
            "kind": self.kind,
            "dtype": "as stored" if dtype is None else str(dtype).removeprefix("torch."),
            "vocabulary": {
                "rows_before": vocabulary.rows_before,
                "rows_after": vocabulary.rows_after,
                "added": vocabulary.added,
                "initialised_rows": [vocabulary.new_rows[0], vocabulary.new_rows[-1]] if vocabulary.new_rows else [],
            },
        }
        return _write_and_check(
            output,
            [self.text_source, self.tower.source],
            tensors,
            records,
            content,
            save,
            lambda folder: _check_model(folder, vocabulary),
            limit,
            force,
            started,
            self.license,
        )

    def _add_tokens(self) -> Vocabulary:
        """Gives the tokenizer a placeholder and a pad token of their own, and says how the tables grow."""
        tokenizer = self.tokenizer
        name = next((name for target, name in self.text.targets.items() if "embed" in target), None)
        if name is None:
            raise ConversionError(
                f"{self.text_source.name} has no input embeddings; expected a complete language model. Get it again."
            )
        rows = self.text.tensors[name].shape[0]
        num_words = len(tokenizer)
        if num_words > rows:
            raise ConversionError(
                f"the tokenizer of {self.text_source.name} has {num_words} tokens, its embeddings {name!r} have {rows} "
                "rows; expected a row for each token. The tokenizer is not of this model: get both again."
            )
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
        # An unknown word or the end of a text as padding would be masked where it is meant.
        if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.unk_token, tokenizer.eos_token):
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        tokenizer.padding_side = "left"
        added = {
            token: tokenizer.convert_tokens_to_ids(token)
            for token in (IMAGE_TOKEN, PAD_TOKEN)
            if tokenizer.convert_tokens_to_ids(token) is not None
            and tokenizer.convert_tokens_to_ids(token) >= num_words
        }
        rows_after = -(-max(rows, len(tokenizer)) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        new_rows = sorted({*added.values(), *range(rows, rows_after)})
        return Vocabulary((), num_words, new_rows, added, rows, rows_after)

    def _describe(self, vocabulary: Vocabulary, template: str) -> tuple[ConvLlavaConfig, ConvLlavaProcessor]:
        tower, tokenizer = self.tower, self.tokenizer
        self.text_config.vocab_size = vocabulary.rows_after
        self.text_config.pad_token_id = tokenizer.pad_token_id
        try:
            config = ConvLlavaConfig(
                vision_config=tower.config,
                text_config=self.text_config,
                image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
                projector_type=self.projector_type,
            )
            config.num_image_tokens(self.image_size, self.image_size)
            image_processor = ConvLlavaImageProcessor(
                image_aspect_ratio="pad",
                size={"height": self.image_size, "width": self.image_size},
                downsampling_factor=config.downsampling_factor,
                image_mean=tower.image_mean,
                image_std=tower.image_std,
                resample=tower.resample,
            )
            processor = ConvLlavaProcessor(
                image_processor=image_processor,
                tokenizer=tokenizer,
                chat_template=template,
                image_token=IMAGE_TOKEN,
                chunk_prefix_space=tokenizer.tokenize("a")[0].startswith("\u2581"),
            )
        except ConversionError:
            raise
        except ValueError as error:
            raise ConversionError(f"{tower.source.name} and {self.text_source.name} do not make a model: {error}") from error
        return config, processor

    def _generation_config(self) -> GenerationConfig:
        """End and pad tokens, and a bound on answers. The sources' own files hold sampling settings that the original's
        evaluation does not use, and a `max_length` that warns beside every `max_new_tokens`."""
        ends = self.text_config.eos_token_id
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends if ends is not None else self.tokenizer.eos_token_id]
        if self.chat_template == "chatml":
            ends.append(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        ends = list(dict.fromkeys(ends))
        return GenerationConfig(
            bos_token_id=self.text_config.bos_token_id,
            eos_token_id=ends[0] if len(ends) == 1 else ends,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=MAX_NEW_TOKENS,
        )


def _nest_tower(part: Part) -> Part:
    """The names of a tower inside the whole model."""
    targets, dropped = {}, dict(part.dropped)
    for target, name in part.targets.items():
        nested = VISION_TOWER.rename(target)
        if isinstance(nested, Dropped):
            dropped[name] = nested.reason
        else:
            targets[nested] = name
    return Part(part.role, part.tensors, part.read, targets, dropped)


def _convert_tower(tower: Tower, output: Path, limit: int, dtype, force: bool, started: float) -> ConversionReport:
    """Writes a tower alone, as a ConvNextModel."""
    with torch.device("meta"):
        model = ConvNextModel(tower.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # The released towers lack the norm of the pooled output; one that changes nothing keeps loading free of warnings.
    pooled = {"layernorm.weight": torch.ones, "layernorm.bias": torch.zeros}
    tensors, records = plan_weights(
        shapes,
        [tower.part],
        dtype=dtype,
        fresh=lambda name: (lambda: pooled[name](shapes[name])) if name in pooled else None,
    )
    tower.config.dtype = tensors[0].dtype
    processor = CLIPImageProcessor(
        size={"shortest_edge": tower.image_size},
        crop_size={"height": tower.image_size, "width": tower.image_size},
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        resample=tower.resample,
    )

    def save(folder: Path):
        tower.config.architectures = [ConvNextModel.__name__]
        tower.config.save_pretrained(folder)
        processor.save_pretrained(folder)

    def check(folder: Path) -> list[str]:
        with torch.device("meta"):
            _check_stored(folder, ConvNextModel(ConvNextConfig.from_pretrained(folder)), ())
        return ["ConvNextModel has exactly these tensors"]

    content = {"kind": "vision tower", "dtype": "as stored" if dtype is None else str(dtype).removeprefix("torch.")}
    return _write_and_check(
        output, [tower.source], tensors, records, content, save, check, limit, force, started, None
    )


def _write_and_check(
    output: Path,
    sources: list[Source],
    tensors: list[TensorToWrite],
    records: list[dict],
    content: dict,
    save: Callable[[Path], None],
    check: Callable[[Path], list[str]],
    limit: int,
    force: bool,
    started: float,
    license: str | None,
) -> ConversionReport:
    """Writes a checkpoint into a folder of its own, reads it back, and only then gives it its name."""
    if any(source.folder == output for source in sources):
        raise ConversionError(f"{output} is a source as well; expected another folder. Choose another --output.")
    counts = Counter(record["action"] for record in records)
    num_read = sum(len(source.reader.tensors) for source in sources)
    if num_read != counts["renamed"] + counts["extended"] + counts["dropped"]:
        raise ConversionError(f"{num_read} tensors were read, but the report accounts for {dict(counts)}; please report this.")
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    with stage_output(output, num_bytes, force) as folder:
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="writing", disable=None) as progress:
            files = write_checkpoint(folder, tensors, limit, progress)
        save(folder)
        sizes = [path.stat().st_size for source in sources for path in source.reader.files]
        with tqdm(total=sum(sizes) + num_bytes, unit="B", unit_scale=True, desc="checking", disable=None) as progress:
            provenance = [_hash_source(source, progress) for source in sources]
            _check_files(folder, files, tensors, progress)
        checks = ["files read back with the hashes of what was written", *check(folder)]
        content = {
            "convllava_hf": __version__,
            **content,
            "sources": provenance,
            "counts": {
                "read": num_read,
                **{action: counts[action] for action in ("renamed", "extended", "dropped", "initialised")},
                "written": len(tensors),
            },
            "files": [{"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256} for file in files],
            "checks": checks,
            "seconds": round(time.monotonic() - started, 3),
            "peak_memory_bytes": measure_peak_memory(),
            "tensors": records,
        }
        (folder / "README.md").write_text(build_model_card(output.name, content, license), encoding="utf-8")
        (folder / "conversion_report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return ConversionReport(output, content)


def _hash_source(source: Source, progress: tqdm) -> dict:
    files = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path, progress)}
        for path in source.reader.files
    ]
    return {"role": source.role, "name": source.name, "revision": source.revision, "files": files}


def _check_files(folder: Path, files: list[WrittenFile], tensors: list[TensorToWrite], progress: tqdm):
    """Reads the output back: the bytes of every file, and name, shape and dtype of every tensor."""
    expected = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}
    found = {}
    for file in files:
        if hash_file(folder / file.name, progress) != file.sha256:
            raise ConversionError(f"{file.name} reads back differently from what was written; the disk is faulty. Try another.")
        with safe_open(folder / file.name, framework="pt") as content:
            for name in content.keys():
                view = content.get_slice(name)
                found[name] = (tuple(view.get_shape()), TORCH_DTYPES[view.get_dtype()])
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ConversionError(f"{len(wrong)} tensors read back differently, first {wrong[0]!r}; please report this.")


def _check_stored(folder: Path, model: nn.Module, tied: tuple[str, ...]):
    """Compares names and shapes of the stored tensors with what a model, built from the saved configuration, has."""
    stored = {name: tensor.shape for name, tensor in CheckpointReader(folder).tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    if stored != expected:
        wrong = sorted(name for name in {*stored, *expected} if stored.get(name) != expected.get(name))
        raise ConversionError(
            f"the saved configuration does not describe the saved weights, first {wrong[0]!r}; please report this."
        )


def _check_model(folder: Path, vocabulary: Vocabulary) -> list[str]:
    """Loads what was saved, from the files alone, and compares the parts with each other."""
    config = ConvLlavaConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config)
    _check_stored(folder, model, ("lm_head.weight",) if config.tie_word_embeddings else ())
    processor = ConvLlavaProcessor.from_pretrained(folder)
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    generation = GenerationConfig.from_pretrained(folder)
    agreements = {
        "image_token_id": (config.image_token_id, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        "pad_token_id": (config.text_config.pad_token_id, tokenizer.pad_token_id),
        "pad_token_id of generation": (generation.pad_token_id, tokenizer.pad_token_id),
        "downsampling_factor": (config.downsampling_factor, image_processor.downsampling_factor),
        "vocab_size": (config.text_config.vocab_size, vocabulary.rows_after),
        "new tokens": ([tokenizer.convert_tokens_to_ids(token) for token in vocabulary.added], [*vocabulary.added.values()]),
        "padding_side": (tokenizer.padding_side, "left"),
    }
    for what, (saved, expected) in agreements.items():
        if saved != expected:
            raise ConversionError(f"{what} reads back as {saved!r}; expected {expected!r}. Please report this.")
    return ["the model has exactly these tensors", "configuration, tokenizer and processor load and agree"]


def measure_peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes, or `None` where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def build_model_card(name: str, content: dict, license: str | None) -> str:
    """README.md of a converted checkpoint: what it is, how to use it, and where every file came from.

    Args:
        name: of the output folder.
        content: of the report.
        license: identifier of the Hub, if it is known.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    is_tower = content["kind"] == "vision tower"
    bases = [source["name"] for source in content["sources"] if source["revision"]]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if is_tower else "image-text-to-text",
        base_model=bases or None,
        license=license,
        tags=["convnext"] if is_tower else ["convllava", "convnext", "llava", "multimodal"],
    )
    if is_tower:
        usage = "It is a `ConvNextModel` of transformers; `convllava init --vision` builds a model from it."
    else:
        usage = """```python
import convllava_hf
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("PATH")
chat = [{"role": "user", "content": [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is it?"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Without the package `convllava-hf` installed, leave its import out and pass `trust_remote_code=True` to both calls."""
    rows = "\n".join(
        f"| {source['role']} | {source['name']} | {source['revision'] or 'local folder'} | {file['name']} | "
        f"`{file['sha256']}` |"
        for source in content["sources"]
        for file in source["files"]
    )
    counts = ", ".join(f"{number} {action}" for action, number in content["counts"].items())
    return f"""---
{data.to_yaml()}
---

# {name}

A {content["kind"]}, made with convllava-hf {content["convllava_hf"]} from the files below.

## Use

{usage}

## Provenance

| part | source | revision | file | SHA-256 |
|---|---|---|---|---|
{rows}

Tensors: {counts}. `conversion_report.json` lists every one of them.
"""
