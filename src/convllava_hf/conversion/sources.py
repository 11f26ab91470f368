"""The repositories that a conversion reads: where they are, what they hold, and what their tensors are called here.

Source of the original behaviour: alibaba/conv-llava, `llava/model/builder.py` and `llava/model/llava_arch.py` (the
language model and its tower lie in two repositories), `llava/model/multimodal_encoder/convnext_encoder.py` (the tower
and its image processor).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ConvNextConfig,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TimmWrapperConfig,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..checkpoints.architecture import check_source
from ..checkpoints.reading import WEIGHT_FILES, CheckpointReader, StoredTensor, describe_file, read_index, read_json
from ..checkpoints.shapes import check_counts
from ..checkpoints.staging import find_replaced
from ..checkpoints.weight_maps import (
    CONVLLAVA,
    CONVNEXT,
    OPEN_CLIP_CONVNEXT,
    TIMM_CONVNEXT,
    ConversionError,
    Dropped,
    WeightMap,
    build_causal_lm_map,
    describe_cause,
)
from ..model.configuration_convllava import ConvLlavaConfig


# What is read from the config.json of a released language model, whose `model_type` says "llava".
LLAMA_CONFIG_KEYS = (
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size"),
    *("initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta", "tie_word_embeddings"),
)
CONVNEXT_CONFIG_KEYS = (
    *("depths", "drop_path_rate", "hidden_act", "hidden_sizes", "image_size", "initializer_range", "layer_norm_eps"),
    *("layer_scale_init_value", "num_channels", "num_stages", "patch_size"),
)
# The first of these names that a checkpoint holds says whose names its tower has.
TOWER_MARKS = {
    "visual.trunk.stem.0.weight": OPEN_CLIP_CONVNEXT,
    "stem.0.weight": TIMM_CONVNEXT,
    "embeddings.patch_embeddings.weight": CONVNEXT,
    "convnext.embeddings.patch_embeddings.weight": CONVNEXT,
}
FINETUNED_FILES = ("adapter_model.*", "non_lora_trainables.bin", "mm_projector.bin")
# Other towers of transformers that a ConvLLaVA can have, by `model_type`.
OTHER_TOWERS = ("convnextv2", "dinov3_convnext", "timm_wrapper")
# What a name may begin with in a repository or in a model and lack in the other: the name of the part that it is.
TOWER_PREFIX = re.compile(r"^(model|timm_model|convnextv2|visual\.trunk)\.")
# What timm and transformers put behind the last map.
BEHIND_THE_MAP = re.compile(r"(head|fc|classifier|head_norm|layernorm|layer_norm)(\.|$)")
TOWERS_OF_INIT = f"for init, {', '.join(OTHER_TOWERS)} (ConvNeXt, ConvNeXt V2, FastViT of timm), CLIP or SigLIP"
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(eq=False)
class Source:
    """A repository that weights come from.

    Attributes:
        role: what it is for, in words.
        name: Hub id, or the name of the folder.
        folder: where its files are.
        revision: the commit, if it came from the Hub.
        tensors: everything that it holds.
        targets: new name -> original name.
        dropped: original name -> reason.
        also: other repositories that its tensors come from.
        tokenizer_folder: where the tokenizer is, if not in `folder`.
    """

    role: str
    name: str
    folder: Path
    revision: str | None = None
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    reader: CheckpointReader | None = None
    also: list["Source"] = field(default_factory=list)
    tokenizer_folder: Path | None = None

    @property
    def parts(self) -> list["Source"]:
        """All repositories that its tensors come from."""
        return [self, *self.also]

    def open(self):
        """Lists the tensors.

        Raises:
            ConversionError: see `CheckpointReader`.
        """
        if self.reader is None:
            self.reader = CheckpointReader(self.folder)
        self.tensors = self.reader.tensors
        self.targets = {name: name for name in self.tensors}

    def describe(self, progress: tqdm | None = None) -> dict:
        """What it is and what it consists of, for a report; `progress` counts the bytes of its weight files."""
        files = [describe_file(path, progress) for path in self.reader.files]
        return {"role": self.role, "name": self.name, "revision": self.revision, "files": files}

    def rename(self, table: WeightMap):
        """Looks the tensors' present names up in a table.

        Raises:
            ConversionError: an unknown name, or two tensors that get the same one.
        """
        before, self.targets = self.targets, {}
        for present, name in before.items():
            try:
                target = table.rename(present)
            except ConversionError as error:
                raise ConversionError(f"{self.role} {self.name}: {error}") from None
            if isinstance(target, Dropped):
                self.dropped[name] = target.reason
            elif target in self.targets:
                raise ConversionError(
                    f"{self.role} {self.name}: {self.targets[target]!r} and {name!r} both become {target!r}; expected "
                    "one of them. Remove the one that does not belong there."
                )
            else:
                self.targets[target] = name


@dataclass
class Tower:
    """A vision tower under the names of its class, and how images are prepared for it: side of the square in pixels,
    mean and standard deviation of values in 0..1, filter of `PIL.Image.Resampling`."""

    source: Source
    config: PreTrainedConfig
    image_size: int
    image_mean: list[float]
    image_std: list[float]
    resample: int


@dataclass
class LanguageModel:
    """A language model, with the projector if it has one, under the names of the new model.

    Attributes:
        source, config, tokenizer: the parts.
        embeddings, head: names of the input table and of the output layer.
        chat_template: name of its template, if the original says.
        image_token: the placeholder; added to the tokenizer if it is not there.
        cut_vocabulary: rows without a word are cut off, as the original's loader does.
        image_tag: what the template writes for an image, if more than the placeholder.
        added_tokens: words that the tokenizer was given and that the tables have no rows for.
        finish_tokenizer: makes the last changes, when all tokens are there.
    """

    source: Source
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    embeddings: str
    head: str = "lm_head"
    chat_template: str | None = None
    image_token: str = "<image>"
    image_tag: str | None = None
    cut_vocabulary: bool = False
    added_tokens: tuple[str, ...] = ()
    finish_tokenizer: Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase] = lambda tokenizer: tokenizer


def find_source(name: str | Path, revision: str | None, role: str, fix: str) -> Source:
    """Finds a repository: a folder as it is, else on the Hub or in its cache.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        role: for messages.
        fix: what to do if there is nothing, for messages.

    Returns:
        The source; its tensors are not listed yet.

    Raises:
        ConversionError: there is no such repository, or it cannot be fetched.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"{name} is a folder; revision {revision!r} needs a Hub id. Leave the revision out.")
        return Source(role, folder.resolve().name, folder.resolve())
    name = str(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        old = find_replaced(folder)
        hint = f"The model that was there before a run was killed is {old}; rename it. " if old else ""
        raise ConversionError(f"there is no folder {name!r} for the {role}, and it is no Hub id. {hint}{fix}")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.model", "*.txt"]))
        for file in WEIGHT_FILES:  # one format is enough
            files = [file]
            if file.endswith(".index.json"):
                files = read_index(folder / file).values() if (folder / file).is_file() else []
            if files:
                snapshot_download(name, revision=folder.name, allow_patterns=sorted({*map(str, files)}))
            if (folder / file).is_file():
                break
        else:  # what was trained on a base
            snapshot_download(name, revision=folder.name, allow_patterns=list(FINETUNED_FILES))
    except Exception as error:  # errors of the Hub, of HTTP and of sockets have no common base
        raise ConversionError(
            f"the {role} {name!r} is no folder here and cannot be fetched from the Hub: {describe_cause(error)} {fix}"
        ) from error
    return Source(role, name, folder, folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None)


def build_config(
    config_class: type[PreTrainedConfig], settings: dict, keys: Sequence[str], source: Source
) -> PreTrainedConfig:
    """A configuration of those of `settings` that are named in `keys` and are set.

    Raises:
        ConversionError: a setting of a wrong type, or more layers than there are tensors.
    """
    if not isinstance(settings, dict):
        raise ConversionError(f"config.json of {source.name} has {settings!r} for a configuration. Get it again.")
    settings = {key: settings[key] for key in keys if settings.get(key) is not None}
    try:
        check_counts(settings, len(source.tensors))
        return config_class(**settings)
    except ConversionError as error:
        raise ConversionError(f"config.json of {source.name}: {error}") from None
    except Exception as error:  # every class checks in its own way
        raise ConversionError(f"config.json of {source.name}: {describe_cause(error)} Get it again.") from error


def check_setting(source: Source, key: str, value: object, accepted: Sequence, fix: str) -> None:
    """Refuses a setting of a `config.json` that has no counterpart here.

    Raises:
        ConversionError: the value is none of those accepted.
    """
    if value not in accepted:
        expected = " or ".join(map(repr, accepted))
        raise ConversionError(f"config.json of {source.name} has {key} = {value!r}; expected {expected}. {fix}")


def read_tower(source: Source, others: bool = False) -> Tower:
    """Reads a ConvNeXt tower of transformers, timm or open_clip.

    Args:
        source: the repository of a ConvNextModel, alone or in a classifier, of a timm model, or of an open_clip CLIP.
        others: also take what a ConvNextModel cannot hold: ConvNeXt V2 and DINOv3's ConvNeXt of transformers, and the
            other ConvNeXts and FastViTs of timm, as `timm_wrapper`. Their tensors keep their own names.

    Returns:
        The tower. Classification heads, projections and the text tower are dropped.

    Raises:
        ConversionError: another kind of model, one whose arithmetic ConvNextModel does not have, or files that are
            missing or damaged.
    """
    source.open()
    path = source.folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    table = next((table for mark, table in TOWER_MARKS.items() if mark in source.tensors), None)
    if settings.get("model_type") in OTHER_TOWERS:
        return _read_other_tower(source, settings, others, f"its model_type is {settings['model_type']!r}")
    if table is None and "architecture" in settings:
        return _read_other_tower(source, settings, others, f"timm's {settings['architecture']} is no plain ConvNeXt")
    if table is None:
        raise ConversionError(
            f"{source.name} is no ConvNeXt; expected one of transformers, timm or open_clip, with a tensor named "
            f"{', '.join(map(repr, TOWER_MARKS))}; or, {TOWERS_OF_INIT}. Pass another vision tower; a language model "
            "without one (no mm_vision_tower in its config.json) is joined with a tower by init."
        )
    if table is OPEN_CLIP_CONVNEXT:
        settings = read_json(source.folder / "open_clip_config.json")
        vision = settings.get("model_cfg", {}).get("vision_cfg", {})
        architecture, arguments = vision.get("timm_model_name"), {}
        images, image_size = settings.get("preprocess_cfg", {}), vision.get("image_size", 224)
    elif table is TIMM_CONVNEXT:
        settings = read_json(path)
        architecture, arguments = settings.get("architecture"), settings.get("model_args", {})
        images = settings.get("pretrained_cfg", settings)
        image_size = images.get("input_size", [3, 224, 224])[-1]
    else:
        source.rename(table)
        config = build_config(ConvNextConfig, read_json(path), CONVNEXT_CONFIG_KEYS, source)
        return Tower(source, config, *read_clip_processor(source.folder / "preprocessor_config.json"))
    # ConvNextModel has one epsilon and the activation of its configuration; timm's names do not tell these.
    odd = next((f"model_args {key!r}" for key in ("act_layer", "norm_eps", "norm_layer") if key in arguments), None)
    if str(architecture).startswith("convnext_xxlarge"):
        odd = "layer norms with an epsilon of 1e-5"
    if odd and table is TIMM_CONVNEXT and others:
        return _read_other_tower(source, settings, others, odd)
    if odd:
        raise ConversionError(
            f"{source.name} ({architecture}) has {odd}; expected timm's defaults: layer norms with an epsilon of "
            "1e-6, and GELU. Pass another vision tower."
        )
    try:
        source.rename(table)
    except ConversionError as error:
        if table is not TIMM_CONVNEXT:
            raise
        return _read_other_tower(source, settings, others, f"timm's {architecture} is no plain ConvNeXt", error)
    mean = list(images.get("mean", OPENAI_CLIP_MEAN))  # open_clip's default; timm writes its own
    std = list(images.get("std", OPENAI_CLIP_STD))
    return Tower(source, _derive_convnext_config(source, image_size), image_size, mean, std, BICUBIC)


def _read_other_tower(
    source: Source, settings: dict, is_taken: bool, reason: str, error: ConversionError | None = None
) -> Tower:
    """Reads a tower that no ConvNextModel can hold, under the names of its own class."""
    if not is_taken:
        raise ConversionError(
            f"{source.name} does not fit a ConvNextModel ({reason}{f': {error}' if error else ''}). It can be a part "
            "of a new model: convllava init --vision."
        ) from error
    source.targets, source.dropped = {name: name for name in source.tensors}, {}
    named = settings.get("architecture") or settings.get("model_type")
    try:
        if "architecture" in settings:
            images = settings.get("pretrained_cfg", settings)
            arguments = settings.get("model_args") or {}
            config = TimmWrapperConfig(architecture=settings["architecture"], model_args=arguments, do_pooling=False)
        else:
            images, config = {}, AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        ConvLlavaConfig(vision_config=config)  # refuses names and arguments that timm would fetch or unpickle
        with torch.device("meta"):
            expected = AutoModel.from_config(config).state_dict()
    except (ImportError, RuntimeError, TypeError, ValueError) as failure:
        raise ConversionError(
            f"{source.name} names {named!r}, which cannot be built here: {describe_cause(failure)} Expected a "
            f"ConvNeXt; or, {TOWERS_OF_INIT}."
        ) from failure
    config._name_or_path = ""
    names = {TOWER_PREFIX.sub("", name): name for name in expected}
    targets = {}
    for name in source.targets:
        bare = TOWER_PREFIX.sub("", name)
        if BEHIND_THE_MAP.match(bare) and not (config.model_type == "dinov3_convnext" and bare in names):
            source.dropped[name] = "behind the last map, which is a tower's output"
        else:
            targets[names.get(bare, name)] = name
    source.targets = targets
    processor = source.folder / "preprocessor_config.json"
    if images or not processor.is_file():
        side = images.get("input_size", [3, 224, 224])[-1]
        mean, std = images.get("mean", IMAGENET_DEFAULT_MEAN), images.get("std", IMAGENET_DEFAULT_STD)
        return Tower(source, config, side, list(mean), list(std), BICUBIC)
    values = read_json(processor)
    side = values.get("size", {}).get("height") or values.get("size", {}).get("shortest_edge") or 224
    mean, std = values.get("image_mean", IMAGENET_DEFAULT_MEAN), values.get("image_std", IMAGENET_DEFAULT_STD)
    return Tower(source, config, side, list(mean), list(std), values.get("resample", BICUBIC))


def _derive_convnext_config(source: Source, image_size: int) -> ConvNextConfig:
    """Reads depths and widths off the shapes of a tower."""
    depths, widths = Counter(), {}
    for target, name in source.targets.items():
        if match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.\d+\.dwconv\.weight", target):
            depths[int(match[1])] += 1
            widths[int(match[1])] = source.tensors[name].shape[0]
    _, channels, patch, _ = source.tensors[source.targets["embeddings.patch_embeddings.weight"]].shape
    return ConvNextConfig(
        num_channels=channels,
        patch_size=patch,
        num_stages=len(depths),
        depths=[depths[stage] for stage in sorted(depths)],
        hidden_sizes=[widths[stage] for stage in sorted(widths)],
        layer_norm_eps=1e-6,
        image_size=image_size,
    )


def read_clip_processor(path: Path) -> tuple[int, list[float], list[float], int]:
    """Reads a CLIPImageProcessor: side of the square in pixels, mean, standard deviation, filter."""
    settings = read_json(path)
    sides = [settings.get(key) for key in ("size", "crop_size")]
    sides = [side.get("shortest_edge", side.get("height")) if isinstance(side, dict) else side for side in sides]
    if not isinstance(sides[0], int) or sides[0] != (sides[1] or sides[0]):
        raise ConversionError(
            f"{path} has size {settings.get('size')!r} and crop_size {settings.get('crop_size')!r}; expected the same "
            "side in both, in pixels: a padded square is then kept whole. Correct the file."
        )
    if not all(isinstance(settings.get(key), list) and len(settings[key]) == 3 for key in ("image_mean", "image_std")):
        raise ConversionError(f"{path} has no image_mean and image_std of three numbers each. Get the file again.")
    return sides[0], settings["image_mean"], settings["image_std"], settings.get("resample", BICUBIC)


def read_llava(source: Source, config: dict) -> tuple[LanguageModel, str]:
    """Reads a released language model with its projector, and the projector's type.

    Raises:
        ConversionError: a model of another family, a setting that ConvLLaVA's releases do not have, or files that are
            missing or damaged.
    """
    fix = "With a ConvNeXt tower only checkpoints of ConvLLaVA can be converted."
    for key, default, accepted in (
        ("architectures", None, ["LlavaLlamaForCausalLM"]),
        ("mm_vision_select_layer", -1, -1),  # the last map of the tower
        ("image_aspect_ratio", None, "pad"),
        ("mm_use_im_start_end", False, False),
    ):
        check_setting(source, key, config.get(key, default), [accepted], fix)
    source.open()
    source.rename(CONVLLAVA)
    text_config = build_config(LlamaConfig, config, LLAMA_CONFIG_KEYS, source)
    limit = config.get("tokenizer_model_max_length")
    tokenizer = load_tokenizer(source, text_config, **({"model_max_length": limit} if limit else {}))
    model = LanguageModel(source, text_config, tokenizer, "model.language_model.embed_tokens.weight")
    return model, config.get("mm_projector_type", "linear")


def read_causal_lm(source: Source) -> LanguageModel:
    """Reads any causal language model of transformers.

    Raises:
        ConversionError: transformers knows no such causal language model, or files are missing or damaged.
    """
    try:
        check_source(source.folder)
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        source.open()
        check_counts(config, len(source.tensors))
        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ConversionError as error:
        raise ConversionError(f"{source.name}: {error}") from None
    except Exception as error:  # configurations of other kinds fail in their own ways
        raise ConversionError(
            f"{source.name} is no causal language model that transformers knows: {describe_cause(error)} Pass another "
            "--text."
        ) from error
    config._name_or_path = ""  # else the folder's path would be saved with the new model
    names = {id(module): name for name, module in causal.named_modules()}
    table = build_causal_lm_map(causal.base_model_prefix, names[id(causal.get_output_embeddings())])
    source.rename(table)
    embeddings = table.rename(f"{names[id(causal.get_input_embeddings())]}.weight")
    return LanguageModel(source, config, load_tokenizer(source, config), embeddings)


def load_tokenizer(source: Source, config: PreTrainedConfig, **settings) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the language model was trained with; it pads on the left, as generation needs.

    AutoTokenizer loses SentencePiece's leading space on a repository whose model_type is "llava" and whose tokenizer
    is in the old format; LlamaTokenizer with `legacy=False` gives the original ids. Files of early 2023 leave special
    tokens empty in `tokenizer_config.json`; those of `special_tokens_map.json` count then, as in transformers 4.28.
    """
    settings["padding_side"] = "left"  # only what is given here is saved again
    folder = source.tokenizer_folder or source.folder
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    if all(path.is_file() for path in files):
        written, mapped = map(read_json, files)
        for key in ("bos_token", "eos_token", "unk_token"):
            token = mapped.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if written.get(key) == "" and token:
                settings[key] = token
    try:
        if config.model_type in ("llama", "mistral") and (folder / "tokenizer.model").is_file():
            return LlamaTokenizer.from_pretrained(folder, legacy=False, **settings)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)
    except Exception as error:  # errors of sentencepiece, tokenizers and transformers have no common base
        raise ConversionError(
            f"the tokenizer of {source.name} cannot be loaded: {describe_cause(error)} Get its files again."
        ) from error
