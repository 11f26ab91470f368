"""The ViT-based members of the family: LLaVA v0 to v1.5, LLaVAR and TinyLLaVA, as transformers' own `llava`.

Nothing of ours is in what they become. What transformers' classes do not do by default is expressed in settings:

- a single linear projector is two layers with `projector_hidden_act="linear"`, the second one the identity;
- SigLIP without its last layer and its final norm is a tower of one layer fewer, read at `vision_feature_layer=-1`
  (transformers takes hidden states before that norm) with `vision_feature_select_strategy="full"` (no class token);
- padding to a square is `do_pad=True`, and stretching to one is a `size` with height and width and no crop;
- the originals tokenise chunk by chunk between images. The saved tokenizer does that by itself (`split_at_images`).

Notation: `V` words of the tokenizer, `D` width of the language model, sizes in pixels.

Sources: haotian-liu/LLaVA, `llava/model/llava_arch.py`, `llava/mm_utils.py` and `llava/model/builder.py`;
SALT-NLP/LLaVAR, `LLaVA/llava/model/llava.py`; DLCV-BUAA/TinyLLaVABench, `tinyllava/model/multimodal_encoder/
siglip_encoder.py`. The v0 code runs on transformers 4.28, `tokenization_utils.py`.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipVisionConfig,
    StableLmConfig,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..checkpoints.reading import read_json
from ..checkpoints.weight_maps import FACTORY, LLAVA, LLAVA_WITH_TOWER, OWN_TOWER, VIT, ConversionError
from .models import JoinedModel
from .sources import (
    BICUBIC,
    LLAMA_CONFIG_KEYS,
    LanguageModel,
    Source,
    Tower,
    build_config,
    check_setting,
    load_tokenizer,
    read_clip_processor,
)


PHI_CONFIG_KEYS = (
    *("attention_dropout", "bos_token_id", "embd_pdrop", "eos_token_id", "hidden_act", "hidden_size"),
    *("initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "partial_rotary_factor", "qk_layernorm", "resid_pdrop"),
    *("rope_scaling", "rope_theta", "tie_word_embeddings"),
)
STABLELM_CONFIG_KEYS = (
    *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_dropout", "hidden_size"),
    *("initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "partial_rotary_factor", "rope_scaling", "rope_theta"),
    *("tie_word_embeddings", "use_qkv_bias"),
)
# Names that the StableLM configuration of the release has for two of them.
STABLELM_OLD_KEYS = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
MISTRAL_CONFIG_KEYS = (*LLAMA_CONFIG_KEYS, "head_dim", "sliding_window")
# Architecture -> configuration of the language model, what is read for it, and the default chat template.
LANGUAGE_MODELS = {
    "LlavaLlamaForCausalLM": (LlamaConfig, LLAMA_CONFIG_KEYS, "vicuna_v1"),
    "TinyLlavaLlamaForCausalLM": (LlamaConfig, LLAMA_CONFIG_KEYS, "vicuna_v1"),
    "TinyLlavaPhiForCausalLM": (PhiConfig, PHI_CONFIG_KEYS, "phi"),
    "TinyLlavaStablelmForCausalLM": (StableLmConfig, STABLELM_CONFIG_KEYS, "phi"),
    "LlavaMistralForCausalLM": (MistralConfig, MISTRAL_CONFIG_KEYS, "mistral_instruct"),
}
VIT_CONFIG_KEYS = (
    *("attention_dropout", "hidden_act", "hidden_size", "image_size", "initializer_range", "intermediate_size"),
    *("layer_norm_eps", "num_attention_heads", "num_channels", "num_hidden_layers", "patch_size"),
)
# `model_type` of a tower's repository -> configuration of the tower.
VITS = {
    "clip": CLIPVisionConfig,
    "clip_vision_model": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
}
# What a configuration names that LLaVA's code saved beside a LoRA or a projector: the base's class, not its own.
BASE_ARCHITECTURES = {
    "LlamaForCausalLM": "LlavaLlamaForCausalLM",
    "MistralForCausalLM": "LlavaMistralForCausalLM",
    "PhiForCausalLM": "TinyLlavaPhiForCausalLM",
    "StableLmForCausalLM": "TinyLlavaStablelmForCausalLM",
}
# `model_type` of the language model in a checkpoint of TinyLLaVA Factory -> the architecture with the same arithmetic.
FACTORY_TYPE = "tinyllava"
FACTORY_ARCHITECTURES = {
    "llama": "TinyLlavaLlamaForCausalLM",
    "phi": "TinyLlavaPhiForCausalLM",
    "stablelm": "TinyLlavaStablelmForCausalLM",
}
NO_COUNTERPART = "There is no exact counterpart to it in transformers' llava; convert another checkpoint."
LLAMA_CLASSES = (LlamaConfig, MistralConfig)
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head"
# How the code of 2023 writes an image where `mm_use_im_start_end` is set.
IMAGE_START, IMAGE_PATCH, IMAGE_END = "<im_start>", "<im_patch>", "<im_end>"
V0_PAD_TOKEN = "[PAD]"
FINAL_NORM = "model.norm.weight"


def is_vit(source: Source) -> bool:
    """Says whether a repository is that of a tower of this family, by the `model_type` in its `config.json`."""
    path = source.folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in VITS


def read_vit(source: Source) -> Tower:
    """Reads a CLIP or SigLIP tower, alone or in the repository of the whole model, under its names in a llava.

    SigLIP's last layer and head are dropped, as the original does: its repositories count that layer even where they no
    longer hold it.

    Raises:
        ConversionError: weights of another model, or files that are missing or damaged.
    """
    settings = read_json(source.folder / "config.json")
    config_class = VITS[settings["model_type"]]
    if settings["model_type"] in ("clip", "siglip"):
        settings = settings.get("vision_config", {})
    source.open()
    config = build_config(config_class, settings, VIT_CONFIG_KEYS, source)
    if "embeddings.patch_embedding.weight" in source.tensors:  # as newer versions of transformers save a tower alone
        source.targets = {f"vision_model.{name}": name for name in source.tensors}
    source.rename(VIT)
    _cut_siglip(source, config)
    processor = source.folder / "preprocessor_config.json"
    if config_class is SiglipVisionConfig and not processor.is_file():  # the original's own copies have none
        mean, std, resample = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, BICUBIC
    else:
        side, mean, std, resample = read_clip_processor(processor)
        if side != config.image_size:
            raise ConversionError(
                f"{processor} has size {side}; expected {config.image_size} pixels, the image_size of config.json. "
                "Correct the wrong one."
            )
    return Tower(source, config, config.image_size, list(mean), list(std), resample)


def _cut_siglip(source: Source, config: PreTrainedConfig):
    """Takes the last layer off SigLIP: the features are those before it."""
    if isinstance(config, SiglipVisionConfig):
        config.num_hidden_layers -= 1
        config.vision_use_head = False
        last = f"vision_tower.vision_model.encoder.layers.{config.num_hidden_layers}."
        for target in [target for target in source.targets if target.startswith(last)]:
            source.dropped[source.targets.pop(target)] = "last layer; the features are those before it"


def looks_like_delta(source: Source) -> bool:
    """Whether a checkpoint, which is open, holds differences to a LLaMA. Weights of trained norms are positive."""
    return FINAL_NORM in source.tensors and (source.reader.read(FINAL_NORM) <= 0).float().mean().item() > 0.25


def read_llava_family(source: Source, config: dict, tower: Tower) -> LanguageModel:
    """Reads the language model and the projector of a checkpoint, under their published names.

    Raises:
        ConversionError: a setting that has no counterpart, or files that are missing or damaged.
    """
    architectures = config.get("architectures")
    if source.also and isinstance(architectures, list):
        config["architectures"] = [BASE_ARCHITECTURES.get(name, name) for name in map(str, architectures)]
    is_siglip = isinstance(tower.config, SiglipVisionConfig)
    tiles = config.get("image_aspect_ratio") == "anyres"
    for key, accepted in (
        ("architectures", [[name] for name in LANGUAGE_MODELS]),
        ("mm_projector_type", ["linear", "mlp2x_gelu"]),
        ("mm_vision_select_layer", [-2]),
        ("mm_vision_select_feature", ["patch"] if is_siglip else ["patch", "cls_patch"]),
        ("image_aspect_ratio", ["square", "pad", "anyres"]),
        ("mm_patch_merge_type", ["spatial_unpad"] if tiles else ["flat"]),
        ("mm_hidden_size", [tower.config.hidden_size]),
        ("tie_word_embeddings", [False]),
    ):
        # The originals read `null` as they do what is not there; tiles are then arranged as nothing here does.
        if config.get(key) is None and key != "architectures" and not (tiles and key == "mm_patch_merge_type"):
            continue
        fix = NO_COUNTERPART
        if key in ("mm_hidden_size", "mm_vision_select_feature"):
            fix = f"The tower is {tower.source.name}: pass the right --vision-tower, or convert another checkpoint."
        check_setting(source, key, config.get(key), accepted, fix)
    source.open()
    if looks_like_delta(source):
        raise ConversionError(
            f"{source.name} holds a delta, differences to a LLaMA, by its {FINAL_NORM!r}; merge them first: convllava "
            "apply-delta."
        )
    if config.get("unfreeze_mm_vision_tower") and any(name.startswith(OWN_TOWER) for name in source.tensors):
        if is_siglip:
            raise ConversionError(
                f"{source.name} holds a SigLIP tower that was trained (unfreeze_mm_vision_tower in config.json); "
                "expected a CLIP tower, or a checkpoint of TinyLLaVA Factory. Convert another checkpoint."
            )
        source.rename(LLAVA_WITH_TOWER)
        for target in list(tower.source.targets):
            tower.source.dropped[tower.source.targets.pop(target)] = f"trained further; {source.name} holds the result"
    else:
        source.rename(LLAVA)
    if not tiles and "image_newline" in source.targets:
        source.dropped[source.targets.pop("image_newline")] = "only tiles (anyres) are divided by it"
    return _read_language_model(source, config)


def read_factory(source: Source, config: dict) -> tuple[Tower, LanguageModel, dict]:
    """Reads a checkpoint of TinyLLaVA Factory, which holds everything, its tower and the tower's settings included.

    Returns:
        The tower, the language model, and the settings under the names that the other checkpoints have for them.

    Raises:
        ConversionError: a part that has no counterpart, or files that are missing or damaged.
    """
    text, vision = config.get("text_config"), config.get("vision_config")
    parts = [part.get("model_type") if isinstance(part, dict) else None for part in (text, vision)]
    connector, layer = config.get("connector_type"), config.get("vision_feature_layer", -2)
    feature, ratio = config.get("vision_feature_select_strategy", "patch"), config.get("image_aspect_ratio", "square")
    for what, value, accepted in (
        ("text_config.model_type", parts[0], tuple(FACTORY_ARCHITECTURES)),
        ("vision_config.model_type", parts[1], ("clip_vision_model", "siglip_vision_model")),
        ("connector_type", connector, ("linear", "mlp2x_gelu")),
        ("vision_feature_layer", layer, (-2,)),
        ("vision_feature_select_strategy", feature, ("patch", "cls_patch")),
        ("image_aspect_ratio", ratio, ("square", "pad")),
        ("text_config.tie_word_embeddings", bool(text and text.get("tie_word_embeddings")), (False,)),
    ):
        check_setting(source, what, value, accepted, NO_COUNTERPART)
    source.open()
    source.rename(FACTORY)
    source.rename(LLAVA_WITH_TOWER)
    tower_config = build_config(VITS[parts[1]], vision, VIT_CONFIG_KEYS, source)
    _cut_siglip(source, tower_config)
    is_siglip = isinstance(tower_config, SiglipVisionConfig)
    mean, std = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD) if is_siglip else (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    tower = Tower(source, tower_config, tower_config.image_size, list(mean), list(std), BICUBIC)
    settings = {
        **text,
        "architectures": [FACTORY_ARCHITECTURES[parts[0]]],
        "mm_projector_type": connector,
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": feature,
        # Here SigLIP loses its first patch where CLIP loses the class token.
        "first_patch_dropped": is_siglip and feature == "patch",
        "image_aspect_ratio": ratio,
        "tokenizer_model_max_length": config.get("tokenizer_model_max_length"),
    }
    return tower, _read_language_model(source, settings), settings


def _read_language_model(source: Source, config: dict) -> LanguageModel:
    """Reads the rest of a checkpoint whose tensors have their new names: configuration, tokenizer, template."""
    layers = 1 if (config.get("mm_projector_type") or "linear") == "linear" else 2
    if found := sum(f"multi_modal_projector.linear_{number}.weight" in source.targets for number in (1, 2)) - layers:
        raise ConversionError(
            f"{source.name} has a projector of {found + layers} linear layers; expected {layers}, as its config.json "
            f"has mm_projector_type = {config.get('mm_projector_type')!r}. Correct config.json, or get both again."
        )
    config_class, keys, default_template = LANGUAGE_MODELS[config["architectures"][0]]
    # Without its files transformers makes a tokenizer of three words, and the tables would be cut to them.
    folder = source.tokenizer_folder or source.folder
    files = ("tokenizer.model",) if config_class in LLAMA_CLASSES else ("tokenizer.json", "vocab.json")
    if not any((folder / name).is_file() for name in files):
        fix = "Get its files again."
        if config_class is StableLmConfig:
            fix = "Where the release has its tokenizer as code, put the tokenizer.json of the language model's own in."
        raise ConversionError(f"the tokenizer of {source.name} is missing; expected {' or '.join(files)}. {fix}")
    renamed = {STABLELM_OLD_KEYS.get(key, key): value for key, value in config.items()}
    text_config = build_config(config_class, renamed, keys, source)
    limit = config.get("tokenizer_model_max_length")
    tokenizer = load_tokenizer(source, text_config, **({"model_max_length": limit} if limit else {}))
    model = LanguageModel(source, text_config, tokenizer, EMBEDDINGS, HEAD, default_template, cut_vocabulary=True)
    names = f"{source.name} {Path(config.get('_name_or_path') or '').name}".lower()
    if config_class is LlamaConfig and "llama-2" in names:  # as the original's `run_llava.py` goes by the name
        model.chat_template = "llava_llama_2"
    elif config_class is LlamaConfig and "v1.6-34b" in names:
        model.chat_template = "chatml_direct"
    if config.get("mm_use_im_start_end"):
        # Only the first generation trained with a padding token of its own, and with "###" between the turns.
        model.chat_template = "llava_v0" if tokenizer.pad_token == V0_PAD_TOKEN else "llavar"
        model.image_token, model.image_tag = IMAGE_PATCH, IMAGE_START + IMAGE_PATCH + IMAGE_END
    if config_class in LLAMA_CLASSES:
        # Versions that know no `legacy` behave as it says.
        legacy = read_json(folder / "tokenizer_config.json").get("legacy") is not False
        strip = model.image_token == IMAGE_PATCH
        model.finish_tokenizer = partial(split_at_images, image_token=model.image_token, strip=strip, legacy=legacy)
    return model


def split_at_images(
    tokenizer: PreTrainedTokenizerBase, image_token: str, strip: bool, legacy: bool
) -> PreTrainedTokenizerFast:
    """Makes a SentencePiece tokenizer give the original's ids around images, and around ends of turns, by itself.

    Args:
        tokenizer: with `image_token` as a token.
        image_token: the placeholder.
        strip: as tokenizers of 2023 do, added tokens take the white space around them away. Otherwise text after an
            image begins with SentencePiece's leading space, as it is tokenised on its own.
        legacy: text after any special token, an end of turn too, begins with the leading space.

    Returns:
        A tokenizer of the general class: that one keeps these rules when it is saved and loaded.

    Source: `tokenizer_image_token` of haotian-liu/LLaVA; `PreTrainedTokenizer.tokenize` of transformers 4.28.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if legacy:
        backend["pre_tokenizer"]["prepend_scheme"] = "always"
    for token in backend["added_tokens"]:
        if strip and token["content"] not in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token):
            token.update(lstrip=True, rstrip=True, normalized=False, special=True)
        elif token["content"] == image_token and not strip:
            token["normalized"] = True  # found after the normalizer, which sees what follows it
    if not strip:
        token = re.escape(image_token)
        pattern = {"Regex": rf"{token}(?!{token}|\z)"}
        backend["normalizer"] = {"type": "Replace", "pattern": pattern, "content": f"{image_token} "}
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=tokenizer.extra_special_tokens,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
    )


class JoinedLlava(JoinedModel):
    """A ViT, a projector and a language model as transformers' `llava`.

    Args:
        tower, language: the parts.
        source_config: `config.json` of the original.
    """

    model_class, config_class, processor_class = LlavaForConditionalGeneration, LlavaConfig, LlavaProcessor
    pinpoints: list[list[int]] | None = None

    def __init__(self, tower: Tower, language: LanguageModel, source_config: dict):
        super().__init__(tower, language)
        self.source_config = source_config

    def fresh(self, name: str) -> Callable[[], torch.Tensor] | None:
        """The second layer of a projector that has one layer in the original: the identity."""
        config = self.model.config
        if config.projector_hidden_act != "linear" or not name.startswith("multi_modal_projector.linear_2."):
            return None
        width = config.text_config.hidden_size
        return partial(torch.eye if name.endswith("weight") else torch.zeros, width)

    def build_image_processor(self, side: int, is_siglip: bool) -> BaseImageProcessor:
        """As the original prepares images, on a square of `side` pixels."""
        return LlavaImageProcessor(
            do_pad=self.source_config.get("image_aspect_ratio") == "pad",
            size={"height": side, "width": side} if is_siglip else {"shortest_edge": side},
            do_center_crop=not is_siglip,
            crop_size={"height": side, "width": side},  # where nothing is cropped, servers read it all the same
            image_mean=self.tower.image_mean,
            image_std=self.tower.image_std,
            resample=self.tower.resample,
        )

    def build(self) -> tuple[PreTrainedConfig, ProcessorMixin]:
        tower, language, settings = self.tower, self.language, self.source_config
        side, patch = tower.image_size, tower.config.patch_size
        is_siglip = isinstance(tower.config, SiglipVisionConfig)
        with_class_token = settings.get("mm_vision_select_feature") == "cls_patch"
        if is_siglip:
            with_class_token = not settings.get("first_patch_dropped")
        strategy = "full" if with_class_token else "default"
        extra = 0 if is_siglip else 1
        config = self.config_class(
            vision_config=tower.config,
            text_config=language.config,
            image_token_index=language.tokenizer.convert_tokens_to_ids(language.image_token),
            image_seq_length=(side // patch) ** 2 + extra - (1 if strategy == "default" else 0),
            projector_hidden_act="gelu" if settings.get("mm_projector_type") == "mlp2x_gelu" else "linear",
            vision_feature_select_strategy=strategy,
            vision_feature_layer=-1 if is_siglip else settings.get("mm_vision_select_layer") or -2,
            **({"image_grid_pinpoints": self.pinpoints} if self.pinpoints else {}),
        )
        processor = self.processor_class(
            image_processor=self.build_image_processor(side, is_siglip),
            tokenizer=language.tokenizer,
            patch_size=patch,
            vision_feature_select_strategy=strategy,
            chat_template=language.tokenizer.chat_template,
            image_token=language.image_token,
            num_additional_image_tokens=extra,
        )
        return config, processor


class JoinedLlavaNext(JoinedLlava):
    """LLaVA v1.6: the picture as a whole and in tiles, as transformers' `llava_next`.

    Raises:
        ConversionError: tiles that are not given in pixels, or are no multiples of the tower's square.
    """

    model_class = LlavaNextForConditionalGeneration
    config_class, processor_class = LlavaNextConfig, LlavaNextProcessor

    def __init__(self, tower: Tower, language: LanguageModel, source_config: dict):
        super().__init__(tower, language, source_config)
        pinpoints = source_config.get("image_grid_pinpoints")
        pairs = pinpoints if isinstance(pinpoints, list) else []
        sides = [side for pair in pairs for side in (pair if isinstance(pair, list) and len(pair) == 2 else [None])]
        if not sides or not all(isinstance(side, int) and side > 0 and side % tower.image_size == 0 for side in sides):
            raise ConversionError(
                f"config.json of {language.source.name} has image_grid_pinpoints = {str(pinpoints)[:200]}; expected "
                f"pairs of multiples of {tower.image_size}, the side of the tower's square. Correct config.json."
            )
        if isinstance(tower.config, SiglipVisionConfig) or source_config.get("mm_projector_type") != "mlp2x_gelu":
            raise ConversionError(
                f"{language.source.name} has image_aspect_ratio = 'anyres' with mm_projector_type = "
                f"{source_config.get('mm_projector_type')!r} and {type(tower.config).__name__}; expected 'mlp2x_gelu' "
                "and CLIPVisionConfig. There is no exact counterpart to it in transformers' llava_next."
            )
        # The original gives widths first, transformers heights. The order decides between equally good ones.
        self.pinpoints = [[height, width] for width, height in pairs]

    def build_image_processor(self, side: int, is_siglip: bool) -> BaseImageProcessor:
        return LlavaNextImageProcessor(
            image_grid_pinpoints=self.pinpoints,
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=self.tower.image_mean,
            image_std=self.tower.image_std,
            resample=self.tower.resample,
        )
