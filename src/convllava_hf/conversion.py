"""Makes checkpoints of ours: from the released ConvLLaVA ones, from vision towers alone, or from two parts.

Weights stream from the sources to the output (`checkpoint_io`), their names follow tables (`weight_maps`), and every
tensor of every source is accounted for in `conversion_report.json`. The result is read back and checked before it gets
its name.

Source of the original behaviour: alibaba/conv-llava, `llava/model/multimodal_encoder/convnext_encoder.py` (`add_stage`)
and `llava/model/multimodal_projector/builder.py` (new modules are initialised by torch's defaults).
"""

import copy
import json
import os
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from . import __version__
from .checkpoint_io import (
    CheckpointReader,
    TensorToWrite,
    check_output,
    measure_peak_memory,
    parse_size,
    read_json,
    stage_output,
    write_checkpoint,
)
from .configuration_convllava import ConvLlavaConfig
from .image_processing_convllava import ConvLlavaImageProcessor
from .llava_family import build_llava, is_vit, read_llava_family, read_vit
from .model_cards import build_model_card, list_image_tokens
from .modeling_convllava import ConvLlavaForConditionalGeneration
from .processing_convllava import ConvLlavaProcessor
from .registration import HUB_FILES
from .sources import (
    CONVNEXT_CONFIG_KEYS,
    LanguageModel,
    Source,
    Tower,
    find_source,
    read_causal_lm,
    read_llava,
    read_tower,
)
from .template_files import build_chat_template, read_chat_template
from .vocabulary import Vocabulary, add_tokens, count_ids, extend_rows
from .weight_maps import LLAVA_PUBLISHED, VISION_TOWER, ConversionError


# Where a merged checkpoint says what it was made of; see `deltas`.
DELTA_REPORT = "delta_report.json"
DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Bounds answers that do not end by themselves, where a caller gives no bound.
MAX_NEW_TOKENS = 1024
# What becomes of a tensor. The first three account for all tensors of the sources, all but "dropped" for the output's.
ACTIONS = ("renamed", "extended", "dropped", "initialised")


@dataclass
class ConversionReport:
    """What was done; also `conversion_report.json` in the output.

    Attributes:
        output (`Path`): the new checkpoint.
        content (`dict`): sources with hashes, counts, every tensor, the files written, the checks that passed.
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
        for reason, number in content["dropped"].items():
            lines.append(f"  dropped  {number}: {reason}")
        if vocabulary := content.get("vocabulary"):
            added = ", ".join(f"{token} = {number}" for token, number in vocabulary["added"].items()) or "no new token"
            lines.append(f"  words    {vocabulary['rows_before']} -> {vocabulary['rows_after']} rows; {added}")
        size = sum(file["bytes"] for file in content["files"])
        lines.append(f"  wrote    {len(content['files'])} weight file(s), {size / 1e9:.3f} GB, {content['dtype']}")
        lines.append(f"  checked  {'; '.join(content['checks'])}")
        peak = content["peak_memory_bytes"]
        memory = f"{peak / 1e9:.2f} GB of memory at the peak" if peak else "memory is not measured on this system"
        lines.append(f"  took     {content['seconds']:.1f} s, {memory}")
        return "\n".join(lines)


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    vision_tower: str | Path | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    vision_revision: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> ConversionReport:
    """Converts a released checkpoint of ConvLLaVA or of the LLaVA family, or a vision tower alone.

    A language model with `mm_vision_tower` in its configuration becomes a model with its tower, tokenizer, processor
    and chat template: with a ConvNeXt a [`ConvLlavaForConditionalGeneration`] and its code files, with CLIP or SigLIP
    (LLaVA, LLaVAR, TinyLLaVA) transformers' `LlavaForConditionalGeneration`, without code. A tower
    (ConvLLaVA-ConvNeXt-*, LAION-CLIP-ConvNeXt-*, any ConvNeXt of transformers, timm or open_clip) becomes a
    `ConvNextModel` that [`init_model`] takes.

    Args:
        source: Hub id or folder.
        output: folder to make.
        vision_tower: Hub id or folder in place of the configuration's `mm_vision_tower`.
        chat_template: name of a template of this package. Default: the one that the checkpoint was trained with.
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
    writer = _Writer(output, dtype, max_shard_size, force)
    if chat_template is not None:
        read_chat_template(chat_template)
    main = find_source(source, revision, "language model", "Pass a Hub id or a folder.")
    config = read_json(main.folder / "config.json") if (main.folder / "config.json").is_file() else {}
    if config.get("model_type") == "convllava" or {"text_config", "vision_config"} <= config.keys():
        kind = config.get("model_type")
        raise ConversionError(f"{main.name} is converted already (its model_type is {kind!r}); use it as it is.")
    if not config.get("mm_vision_tower"):
        if vision_tower is not None:
            raise ConversionError(
                f"{main.name} has no 'mm_vision_tower' in its config.json, so it is no ConvLLaVA or LLaVA language "
                f"model and takes no --vision-tower {str(vision_tower)!r}. To join a tower and a model use init."
            )
        main.role = "vision tower"
        return _write_tower(writer, read_tower(main))

    fix = "Pass --vision-tower with the folder or Hub id of the tower."
    tower_source = find_source(str(vision_tower or config["mm_vision_tower"]), vision_revision, "vision tower", fix)
    if is_vit(tower_source):
        tower = read_vit(tower_source)
        text = read_llava_family(main, config, tower)
        content = {"kind": f"checkpoint of the LLaVA family, from {config['architectures'][0]}"}
        text.chat_template = chat_template or text.chat_template

        def build() -> tuple[PreTrainedConfig, ProcessorMixin]:
            return build_llava(tower, text, config)

        return _write_model(writer, content, tower, text, LlavaForConditionalGeneration, build, _make_identity)

    text, projector_type = read_llava(main, config)
    tower = read_tower(tower_source)
    width = tower.config.hidden_sizes[-1]
    if width != config.get("mm_hidden_size", width):
        raise ConversionError(
            f"the tower {tower.source.name} gives features of width {width}; the projector of {main.name} expects "
            f"mm_hidden_size = {config['mm_hidden_size']}. Pass the right one with --vision-tower."
        )
    content = {"kind": "ConvLLaVA checkpoint", "license": "llama2"}
    text.chat_template = chat_template or "vicuna_v1"
    return _write_convllava(writer, content, tower, text, projector_type, tower.image_size)


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
    """Builds a new model from a tower and a language model, ready for stage 1: projector and added stage are fresh.

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
        The report; it also lies in the output.

    Raises:
        ConversionError: as for [`convert_checkpoint`]; also parts that do not fit together.
    """
    writer = _Writer(output, dtype, max_shard_size, force)
    stage = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", add_stage or "1x1")
    if not stage:
        raise ConversionError(f"add_stage={add_stage!r}; expected BLOCKSxWIDTH, for example '6x3072'.")
    if chat_template is not None:
        read_chat_template(chat_template)
    fix = "Pass --vision and --text with a Hub id or a folder each."
    tower = read_tower(find_source(vision, vision_revision, "vision tower", fix))
    fresh = ["model.multi_modal_projector."]
    if add_stage is not None:
        fresh.append(f"model.vision_tower.encoder.stages.{tower.config.num_stages}.")
        values = {key: getattr(tower.config, key) for key in CONVNEXT_CONFIG_KEYS}
        values["num_stages"] += 1
        values["depths"] = [*tower.config.depths, int(stage[1])]
        values["hidden_sizes"] = [*tower.config.hidden_sizes, int(stage[2])]
        tower.config = ConvNextConfig(**values)
    tower.config.image_size = resolution

    language = read_causal_lm(find_source(text, text_revision, "language model", fix))
    if chat_template is None:
        if language.tokenizer.eos_token == "</s>":
            chat_template = "vicuna_v1"
        elif "<|im_end|>" in language.tokenizer.get_vocab():
            chat_template = "chatml"
        else:
            raise ConversionError(
                f"no chat template fits the tokenizer of {language.source.name}, whose texts end in "
                f"{language.tokenizer.eos_token!r}; expected '</s>', or a token '<|im_end|>'. Pass --chat-template to "
                "choose one all the same."
            )
    content = {"kind": "new model", "seed": seed}
    language.chat_template = chat_template
    return _write_convllava(writer, content, tower, language, projector_type, resolution, tuple(fresh))


def plan_weights(
    shapes: dict[str, tuple[int, ...]],
    sources: Sequence[Source],
    *,
    dtype: torch.dtype | None = None,
    vocabulary: Vocabulary | None = None,
    fresh: Callable[[str], Callable[[], torch.Tensor] | None] = lambda name: None,
    tied: Sequence[str] = (),
) -> tuple[list[TensorToWrite], list[dict]]:
    """Says for every tensor of a new model where it comes from, and for every tensor of the sources where it goes.

    Args:
        shapes: name -> shape of everything that the new model stores.
        sources: with their tensors renamed; fresh tensors get the dtype of the first one.
        dtype: of all floating-point tensors; `None` keeps each as it is stored.
        vocabulary: which tensors grow, and how.
        fresh: gives for a name that no source has a function that makes the tensor, or `None`.
        tied: names that the new model does not store because they share another tensor's memory.

    Returns:
        What to write, in the order of `shapes`, and one record per tensor for the report.

    Raises:
        ConversionError: a missing tensor, one that has no place, or one of another shape.
    """
    origins, tensors, records = {}, [], []
    for source in sources:
        dropped = dict(source.dropped)
        for target, name in source.targets.items():
            if target in tied:
                dropped[name] = "shares the memory of the input embeddings"
            elif target not in shapes:
                raise ConversionError(
                    f"the {source.role} {source.name} holds {name!r}, for which the model of its config.json has no "
                    f"place (it would be {target!r}); expected weights and config.json of one model. Get both again."
                )
            else:
                origins[target] = (source, name)
        for name, reason in dropped.items():
            stored = source.tensors[name]
            records.append(
                {"action": "dropped", **_describe(source, name), "shape": list(stored.shape), "reason": reason}
            )

    first = next(iter(sources[0].tensors.values())).dtype
    missing = []
    for target, shape in shapes.items():
        if target not in origins:
            load, new_dtype = fresh(target), dtype or first
            action, origin = "initialised", {}
            if load is None:
                missing.append(target)
                continue
        else:
            source, name = origins[target]
            stored, origin = source.tensors[name], _describe(source, name)
            new_dtype = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
            load, action, expected = (lambda source=source, name=name: source.reader.read(name)), "renamed", shape
            if vocabulary and target in vocabulary.tensors:
                expected, action = (vocabulary.rows_before, *shape[1:]), "extended"
                load = _extending(load, vocabulary, distinct=target == vocabulary.tensors[0])
            elif stored.shape == (*shape, 1, 1):  # small timm models hold pointwise layers as 1x1 convolutions
                expected, load = stored.shape, lambda load=load, shape=shape: load().reshape(shape)
            if stored.shape != expected:
                raise ConversionError(
                    f"{name!r} of the {source.role} {source.name} ({stored.file}) has shape {stored.shape}; expected "
                    f"{expected} from its config.json. Check config.json, or get both again."
                )
        tensors.append(TensorToWrite(target, shape, new_dtype, _casting(load, target, new_dtype)))
        records.append(
            {"action": action, **origin, "target": target, "shape": list(shape), "target_dtype": _name(new_dtype)}
        )
    if missing:
        raise ConversionError(
            f"{len(missing)} tensors are in no source, the first of them {missing[0]!r}; expected everything that "
            "config.json describes. The checkpoint is incomplete or not of this model: get it again."
        )
    return tensors, records


def _describe(source: Source, name: str) -> dict:
    stored = source.tensors[name]
    return {"source": source.role, "name": name, "file": stored.file, "dtype": _name(stored.dtype)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _extending(load: Callable[[], torch.Tensor], vocabulary: Vocabulary, distinct: bool) -> Callable[[], torch.Tensor]:
    return lambda: extend_rows(load(), vocabulary.rows_after, vocabulary.new_rows, vocabulary.num_words, distinct)


def _casting(load: Callable[[], torch.Tensor], name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def load_cast() -> torch.Tensor:
        tensor = load()
        if dtype == torch.float16 and tensor.dtype != dtype and tensor.abs().max() > torch.finfo(dtype).max:
            raise ConversionError(
                f"{name!r} has values up to {tensor.abs().max().item():.3g}; expected at most 65504, the largest of "
                "float16. Pass --dtype bfloat16."
            )
        return tensor.to(dtype)

    return load_cast


def _make_fresh(model: nn.Module, name: str, seed: int) -> torch.Tensor:
    """Initialises a parameter of a model on the meta device by torch's defaults, in float32 on the CPU."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf == "layer_scale_parameter":
        return torch.full(module.layer_scale_parameter.shape, model.config.vision_config.layer_scale_init_value)
    # Weight and bias come from one initialisation, which is repeated for each of them.
    module = copy.deepcopy(module).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {owner}".encode()))
        module.reset_parameters()
    return getattr(module, leaf).detach()


def _build_generation_config(language: LanguageModel) -> GenerationConfig:
    text_config, tokenizer = language.config, language.tokenizer
    # The files of the sources also hold sampling settings, which the original's evaluation does not use, and a
    # `max_length`, which warns beside every `max_new_tokens`.
    ends = text_config.eos_token_id if text_config.eos_token_id is not None else tokenizer.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    # Configurations of the first LLaMA conversions name other ids than their tokenizers have.
    if tokenizer.eos_token_id not in (None, *ends):
        ends.append(tokenizer.eos_token_id)
    if language.chat_template in ("chatml", "chatml_direct", "mpt") and "<|im_end|>" in tokenizer.get_vocab():
        ends = list(dict.fromkeys([*ends, tokenizer.convert_tokens_to_ids("<|im_end|>")]))
    return GenerationConfig(
        bos_token_id=text_config.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        # A placeholder in an answer stands for nothing.
        suppress_tokens=[tokenizer.convert_tokens_to_ids(language.image_token)],
        max_new_tokens=MAX_NEW_TOKENS,
    )


def list_shapes(model: nn.Module, config: PreTrainedConfig) -> tuple[dict, tuple[str, ...]]:
    """Shapes of what a model stores, and the names that it does not store because they are tied."""
    published = LLAVA_PUBLISHED.rename if isinstance(model, LlavaForConditionalGeneration) else str
    tied = ("lm_head.weight",) if getattr(config, "tie_word_embeddings", False) else ()
    return {
        published(name): tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }, tied


def _write_convllava(
    writer: "_Writer",
    content: dict,
    tower: Tower,
    language: LanguageModel,
    projector_type: str,
    image_size: int,
    fresh: tuple[str, ...] = (),
) -> ConversionReport:
    """Joins a ConvNeXt and a language model. Tensors whose names begin with one of `fresh` are initialised."""

    def build() -> tuple[PreTrainedConfig, ProcessorMixin]:
        tokenizer = language.tokenizer
        config = ConvLlavaConfig(
            vision_config=tower.config,
            text_config=language.config,
            image_token_id=tokenizer.convert_tokens_to_ids(language.image_token),
            projector_type=projector_type,
            vocab_padding=language.config.vocab_size - count_ids(tokenizer),
        )
        config.num_image_tokens(image_size, image_size)
        image_processor = ConvLlavaImageProcessor(
            image_aspect_ratio="pad",
            size={"height": image_size, "width": image_size},
            downsampling_factor=config.downsampling_factor,
            image_mean=tower.image_mean,
            image_std=tower.image_std,
            resample=tower.resample,
        )
        processor = ConvLlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
            image_token=language.image_token,
            chunk_prefix_space="".join(tokenizer.tokenize("a")).startswith("\u2581"),  # SentencePiece's leading space
        )
        return config, processor

    def make(model: PreTrainedModel, name: str) -> Callable[[], torch.Tensor] | None:
        return (lambda: _make_fresh(model, name, content["seed"])) if name.startswith(fresh) else None

    tower.source.rename(VISION_TOWER)
    return _write_model(writer, content, tower, language, ConvLlavaForConditionalGeneration, build, make)


def _make_identity(model: PreTrainedModel, name: str) -> Callable[[], torch.Tensor] | None:
    """The second layer of a projector that has one layer in the original."""
    width = model.config.text_config.hidden_size
    if model.config.projector_hidden_act == "linear" and name.startswith("multi_modal_projector.linear_2."):
        return lambda: torch.eye(width) if name.endswith("weight") else torch.zeros(width)
    return None


def _write_model(
    writer: "_Writer",
    content: dict,
    tower: Tower,
    language: LanguageModel,
    model_class: type[PreTrainedModel],
    build: Callable[[], tuple[PreTrainedConfig, ProcessorMixin]],
    fresh: Callable[[PreTrainedModel, str], Callable[[], torch.Tensor] | None],
) -> ConversionReport:
    """Joins a tower and a language model.

    Args:
        writer, content, tower, language: the parts; both sources have the names that the new model stores.
        model_class: class of the new model.
        build: makes its configuration and processor, after the tokenizer has all its tokens.
        fresh: gives for the model and a name that no source has a function that makes the tensor, or `None`.
    """
    vocabulary = add_tokens(language)
    tokenizer = language.tokenizer
    # The tokenizer and the processor keep their template in one file.
    tokenizer.chat_template = build_chat_template(tokenizer, language.chat_template, language.image_tag)
    language.config.vocab_size = vocabulary.rows_after
    language.config.pad_token_id = tokenizer.pad_token_id
    try:
        config, processor = build()
        with torch.device("meta"):
            model = model_class(config)
    except ValueError as error:
        raise ConversionError(f"{tower.source.name} and {language.source.name} make no model: {error}") from error
    generation_config = _build_generation_config(language)
    sources = [language.source, tower.source]
    shapes, tied = list_shapes(model, config)
    tensors, records = plan_weights(
        shapes,
        sources,
        dtype=writer.dtype,
        vocabulary=vocabulary,
        fresh=lambda name: fresh(model, name),
        tied=tied,
    )
    for part in (config, config.text_config, config.vision_config):
        part.dtype = next(tensor.dtype for tensor in tensors if tensor.name == language.embeddings)
    config.architectures = [model_class.__name__]

    def save(folder: Path):
        config.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        for transient in ("is_local", "local_files_only"):  # how the tokenizer was loaded is none of its settings
            tokenizer.init_kwargs.pop(transient, None)
        processor.save_pretrained(folder)
        if model_class is ConvLlavaForConditionalGeneration:
            for name in HUB_FILES:
                shutil.copyfile(Path(__file__).with_name(name), folder / name)

    def check(folder: Path) -> list[str]:
        """Loads what was saved, from the files alone, and compares the parts with each other."""
        saved = type(config).from_pretrained(folder)
        with torch.device("meta"):
            _check_stored(folder, model_class(saved), saved)
        loaded = type(processor).from_pretrained(folder)
        ids = {token: loaded.tokenizer.convert_tokens_to_ids(token) for token in vocabulary.added}
        sample = "A question. <image>\nAn answer.</s>And another."
        for what, found, expected in (
            ("new tokens", ids, vocabulary.added),
            ("image_token_id", saved.image_token_id, loaded.tokenizer.convert_tokens_to_ids(language.image_token)),
            ("pad_token_id", saved.text_config.pad_token_id, loaded.tokenizer.pad_token_id),
            ("padding_side", loaded.tokenizer.padding_side, "left"),
            ("model_max_length", loaded.tokenizer.model_max_length, tokenizer.model_max_length),
            ("number of tokens", len(loaded.tokenizer), len(tokenizer)),
            ("vocab_size", saved.text_config.vocab_size, vocabulary.rows_after),
            ("tokens of a sample", loaded.tokenizer(sample)["input_ids"], tokenizer(sample)["input_ids"]),
            ("chat template", loaded.chat_template, tokenizer.chat_template),
            ("image processor", loaded.image_processor.to_dict(), processor.image_processor.to_dict()),
        ):
            if found != expected:
                raise ConversionError(f"{what}: read back as {found!r}, expected {expected!r}. Please report this.")
        return ["the model has exactly these tensors", "configuration, tokenizer and processor load and agree"]

    content["architecture"] = model_class.__name__
    content["image_tokens"] = list_image_tokens(config)
    content["vocabulary"] = {
        "rows_before": vocabulary.rows_before,
        "rows_after": vocabulary.rows_after,
        "added": vocabulary.added,
    }
    return writer.write(content, sources, tensors, records, save, check)


def _write_tower(writer: "_Writer", tower: Tower) -> ConversionReport:
    """Writes a tower alone, as a ConvNextModel with the image processor that its original comes with."""
    config = tower.config
    with torch.device("meta"):
        shapes, _ = list_shapes(ConvNextModel(config), config)
    # The released towers lack the norm of the pooled output. With one they load without a warning.
    pooled = {"layernorm.weight": torch.ones, "layernorm.bias": torch.zeros}
    tensors, records = plan_weights(
        shapes,
        [tower.source],
        dtype=writer.dtype,
        fresh=lambda name: (lambda: pooled[name](shapes[name])) if name in pooled else None,
    )
    config.dtype = tensors[0].dtype
    config.architectures = [ConvNextModel.__name__]
    processor = CLIPImageProcessor(
        size={"shortest_edge": tower.image_size},
        crop_size={"height": tower.image_size, "width": tower.image_size},
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        resample=tower.resample,
    )

    def save(folder: Path):
        config.save_pretrained(folder)
        processor.save_pretrained(folder)

    def check(folder: Path) -> list[str]:
        saved = ConvNextConfig.from_pretrained(folder)
        with torch.device("meta"):
            _check_stored(folder, ConvNextModel(saved), saved)
        return ["ConvNextModel has exactly these tensors"]

    return writer.write({"kind": "vision tower"}, [tower.source], tensors, records, save, check)


def _check_stored(folder: Path, model: nn.Module, config: PreTrainedConfig):
    """Compares names and shapes of what was saved with those of a model that the saved configuration describes."""
    shapes, _ = list_shapes(model, config)
    stored = {name: tensor.shape for name, tensor in CheckpointReader(folder).tensors.items()}
    if stored != shapes:
        wrong = sorted(name for name in {*stored, *shapes} if stored.get(name) != shapes.get(name))
        raise ConversionError(f"the saved config.json does not describe the saved {wrong[0]!r}. Please report this.")


class _Writer:
    """Where and how to write. Mistakes in these arguments are found before anything is read or fetched.

    Args: as for [`convert_checkpoint`].
    """

    def __init__(self, output: str | Path, dtype: str, max_shard_size: int | str, force: bool):
        if dtype not in DTYPES:
            raise ConversionError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}.")
        self.started = time.monotonic()
        self.output = Path(os.path.expanduser(output)).resolve()
        self.dtype = DTYPES[dtype]
        self.max_shard_size = parse_size(max_shard_size)
        self.force = force
        check_output(self.output, force)

    def write(
        self,
        content: dict,
        sources: Sequence[Source],
        tensors: Sequence[TensorToWrite],
        records: list[dict],
        save: Callable[[Path], None],
        check: Callable[[Path], list[str]],
    ) -> ConversionReport:
        """Writes a checkpoint into a folder of its own, reads it back, and only then gives it its name.

        Args:
            content: first entries of the report.
            sources, tensors, records: see `plan_weights`.
            save: writes everything but the weights into a folder.
            check: reads a folder back; returns what it found right.
        """
        for source in sources:
            if self.output == source.folder or self.output in source.folder.parents:
                raise ConversionError(f"{self.output} is, or holds, a source as well. Choose another --output.")
        actions = Counter(record["action"] for record in records)
        num_read = sum(len(source.tensors) for source in sources)
        if num_read != sum(actions[key] for key in ACTIONS[:3]):
            raise ConversionError(
                f"{num_read} tensors were read, but {dict(actions)} accounted for. Please report this."
            )
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        to_check = num_bytes + sum(path.stat().st_size for source in sources for path in source.reader.files)
        with stage_output(self.output, num_bytes, self.force) as folder:
            with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="writing", disable=None) as progress:
                files = write_checkpoint(folder, tensors, self.max_shard_size, progress)
            save(folder)
            with tqdm(total=to_check, unit="B", unit_scale=True, desc="checking", disable=None) as progress:
                hashed = [source.describe(progress) for source in sources]
                for source in sources:
                    if (source.folder / DELTA_REPORT).is_file():
                        merged = read_json(source.folder / DELTA_REPORT)["sources"]
                        hashed += [{**part, "role": f"{part['role']} of {source.name}"} for part in merged]
                for file in files:
                    file.check(folder, progress)
            dtypes = {name: stored.dtype for name, stored in CheckpointReader(folder).tensors.items()}
            if dtypes != {tensor.name: tensor.dtype for tensor in tensors}:
                raise ConversionError("the tensors read back have other names or dtypes. Please report this.")
            content = {
                "convllava_hf": __version__,
                **content,
                "dtype": "dtypes as stored" if self.dtype is None else _name(self.dtype),
                "sources": hashed,
                "counts": {"read": num_read, **{key: actions[key] for key in ACTIONS}, "written": len(tensors)},
                "dropped": dict(Counter(record["reason"] for record in records if record["action"] == "dropped")),
                "files": [file.describe() for file in files],
                "checks": ["files read back with the hashes of what was written", *check(folder)],
                "seconds": round(time.monotonic() - self.started, 3),
                "peak_memory_bytes": measure_peak_memory(),
                "tensors": records,
            }
            card = build_model_card(self.output.name, content)
            (folder / "README.md").write_text(card, encoding="utf-8")
            (folder / "conversion_report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return ConversionReport(self.output, content)
