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
from functools import partial
from pathlib import Path

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaProcessor,
    PhiConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    StableLmConfig,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from ..checkpoints.reading import read_json
from ..checkpoints.weight_maps import LLAVA, VIT, ConversionError
from .sources import (
    BICUBIC,
    LLAMA_CONFIG_KEYS,
    LanguageModel,
    Source,
    Tower,
    load_tokenizer,
    read_clip_processor,
    read_settings,
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
# Architecture -> configuration of the language model, what is read for it, and the default chat template.
LANGUAGE_MODELS = {
    "LlavaLlamaForCausalLM": (LlamaConfig, LLAMA_CONFIG_KEYS, "vicuna_v1"),
    "TinyLlavaLlamaForCausalLM": (LlamaConfig, LLAMA_CONFIG_KEYS, "vicuna_v1"),
    "TinyLlavaPhiForCausalLM": (PhiConfig, PHI_CONFIG_KEYS, "phi"),
    "TinyLlavaStablelmForCausalLM": (StableLmConfig, STABLELM_CONFIG_KEYS, "phi"),
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
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head"
# How the code of 2023 writes an image where `mm_use_im_start_end` is set.
IMAGE_START, IMAGE_PATCH, IMAGE_END = "<im_start>", "<im_patch>", "<im_end>"
V0_PAD_TOKEN = "[PAD]"
FINAL_NORM = "model.norm.weight"
OWN_TOWER = "model.vision_tower."


def is_vit(source: Source) -> bool:
    """Says whether a repository is that of a tower of this family, by the `model_type` in its `config.json`."""
    path = source.folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in VITS


def read_vit(source: Source) -> Tower:
    """Reads a CLIP or SigLIP tower, alone or in the repository of the whole model.

    Args:
        source: the repository.

    Returns:
        The tower under its published names in a llava checkpoint. SigLIP's last layer and head are dropped, as the
        original does: its repositories count that layer even where they no longer hold it.

    Raises:
        ConversionError: weights of another model, or files that are missing or damaged.
    """
    settings = read_json(source.folder / "config.json")
    config_class = VITS[settings["model_type"]]
    if settings["model_type"] in ("clip", "siglip"):
        settings = settings.get("vision_config", {})
    config = config_class(**read_settings(settings, VIT_CONFIG_KEYS))
    source.open()
    source.rename(VIT)
    if config_class is SiglipVisionConfig:
        config.num_hidden_layers -= 1
        config.vision_use_head = False
        last = f"vision_tower.vision_model.encoder.layers.{config.num_hidden_layers}."
        for target in [target for target in source.targets if target.startswith(last)]:
            source.dropped[source.targets.pop(target)] = "last layer; the features are those before it"
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


def looks_like_delta(source: Source) -> bool:
    """Whether a checkpoint holds differences to a LLaMA, told by its final norm: trained ones are positive.

    Args:
        source: the repository, open. Without that norm the answer is no.
    """
    if FINAL_NORM not in source.tensors:
        return False
    return (source.reader.read(FINAL_NORM) <= 0).float().mean().item() > 0.25


def read_llava_family(source: Source, config: dict, tower: Tower) -> LanguageModel:
    """Reads the language model and the projector of a checkpoint.

    Args:
        source: the repository.
        config: its `config.json`.
        tower: its vision tower.

    Returns:
        The language model with the projector's tensors, under their published names.

    Raises:
        ConversionError: a setting that has no counterpart, or files that are missing or damaged.
    """
    is_siglip = isinstance(tower.config, SiglipVisionConfig)
    for key, accepted in (
        ("architectures", [[name] for name in LANGUAGE_MODELS]),
        ("mm_projector_type", ["linear", "mlp2x_gelu"]),
        ("mm_vision_select_layer", [-2]),
        ("mm_vision_select_feature", ["patch"] if is_siglip else ["patch", "cls_patch"]),
        ("image_aspect_ratio", ["square", "pad"]),
        ("mm_patch_merge_type", ["flat"]),
        ("mm_hidden_size", [tower.config.hidden_size]),
        ("tie_word_embeddings", [False]),
    ):
        if config.get(key) is None and key != "architectures":
            continue  # the originals read `null` as they do what is not there
        if config.get(key) not in accepted:
            expected = " or ".join(repr(value) for value in accepted)
            fix = "There is no exact counterpart to it in transformers' llava; convert another checkpoint."
            if key in ("mm_hidden_size", "mm_vision_select_feature"):
                expected += f" with the tower {tower.source.name}"
                fix = "Pass the right --vision-tower, or convert another checkpoint."
            raise ConversionError(
                f"config.json of {source.name} has {key} = {config.get(key)!r}; expected {expected}. {fix}"
            )
    source.open()
    if looks_like_delta(source):
        raise ConversionError(
            f"{source.name} holds a delta, differences to a LLaMA, by its {FINAL_NORM!r}; merge them first: convllava "
            "apply-delta."
        )
    if config.get("unfreeze_mm_vision_tower") and any(name.startswith(OWN_TOWER) for name in source.tensors):
        raise ConversionError(
            f"{source.name} holds a vision tower that was trained (unfreeze_mm_vision_tower in config.json); "
            "expected a frozen one, which lies in the tower's own repository. Convert another checkpoint."
        )
    source.rename(LLAVA)
    layers = 1 if (config.get("mm_projector_type") or "linear") == "linear" else 2
    if found := sum(f"multi_modal_projector.linear_{number}.weight" in source.targets for number in (1, 2)) - layers:
        raise ConversionError(
            f"{source.name} has a projector of {found + layers} linear layers; expected {layers}, as its config.json "
            f"has mm_projector_type = {config.get('mm_projector_type')!r}. Correct config.json, or get both again."
        )
    config_class, keys, default_template = LANGUAGE_MODELS[config["architectures"][0]]
    # Without its files transformers makes a tokenizer of three words, and the tables would be cut to them.
    files = ("tokenizer.model",) if config_class is LlamaConfig else ("tokenizer.json", "vocab.json")
    if not any((source.folder / name).is_file() for name in files):
        fix = "Get its files again."
        if config_class is StableLmConfig:
            fix = "Where the release has its tokenizer as code, put the tokenizer.json of the language model's own in."
        raise ConversionError(f"the tokenizer of {source.name} is missing; expected {' or '.join(files)}. {fix}")
    renamed = {STABLELM_OLD_KEYS.get(key, key): value for key, value in config.items()}
    text_config = config_class(**read_settings(renamed, keys))
    limit = config.get("tokenizer_model_max_length")
    tokenizer = load_tokenizer(source, text_config, **({"model_max_length": limit} if limit else {}))
    model = LanguageModel(source, text_config, tokenizer, EMBEDDINGS, HEAD, default_template)
    names = f"{source.name} {Path(config.get('_name_or_path') or '').name}".lower()
    if config_class is LlamaConfig and "llama-2" in names:  # as the original's `run_llava.py` goes by the name
        model.chat_template = "llava_llama_2"
    if config.get("mm_use_im_start_end"):
        # Only the first generation trained with a padding token of its own, and with "###" between the turns.
        model.chat_template = "llava_v0" if tokenizer.pad_token == V0_PAD_TOKEN else "llavar"
        model.image_token, model.image_tag = IMAGE_PATCH, IMAGE_START + IMAGE_PATCH + IMAGE_END
    if config_class is LlamaConfig:
        # Versions that know no `legacy` behave as it says.
        legacy = read_json(source.folder / "tokenizer_config.json").get("legacy") is not False
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


def build_llava(tower: Tower, language: LanguageModel, source_config: dict) -> tuple[LlavaConfig, LlavaProcessor]:
    """Builds configuration and processor.

    Args:
        tower, language: the parts; the tokenizer has all its tokens.
        source_config: `config.json` of the original.

    Returns:
        The configuration and the processor of transformers.
    """
    side, patch = tower.image_size, tower.config.patch_size
    is_siglip = isinstance(tower.config, SiglipVisionConfig)
    with_class_token = is_siglip or source_config.get("mm_vision_select_feature") == "cls_patch"
    strategy = "full" if with_class_token else "default"
    extra = 0 if is_siglip else 1
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=language.tokenizer.convert_tokens_to_ids(language.image_token),
        image_seq_length=(side // patch) ** 2 + (extra if strategy == "full" else 0),
        projector_hidden_act="gelu" if source_config.get("mm_projector_type") == "mlp2x_gelu" else "linear",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1 if is_siglip else source_config.get("mm_vision_select_layer") or -2,
    )
    image_processor = LlavaImageProcessor(
        do_pad=source_config.get("image_aspect_ratio") == "pad",
        size={"height": side, "width": side} if is_siglip else {"shortest_edge": side},
        do_center_crop=not is_siglip,
        crop_size={"height": side, "width": side},  # where nothing is cropped, servers read it all the same
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        resample=tower.resample,
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=language.tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        chat_template=language.tokenizer.chat_template,
        image_token=language.image_token,
        num_additional_image_tokens=extra,
    )
    return config, processor
