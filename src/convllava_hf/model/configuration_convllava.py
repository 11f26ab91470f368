# Copyright 2026 The convllava-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of ConvLLaVA: a hierarchical vision tower, a projector and a causal language model.

Notation: `H, W` height and width in pixels; `F` downsampling factor of the tower in pixels per cell, so an image has
`(H / F) * (W / F)` tokens; `C` width of the tower's last stage.
"""

import inspect
import json
import re
from functools import lru_cache

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING


# The released tower: ConvNeXt-L of LAION CLIP with a fifth stage of six blocks (paper, section 3.2).
RELEASED_VISION_TOWER = {
    "model_type": "convnext",
    "num_stages": 5,
    "depths": [3, 3, 27, 3, 6],
    "hidden_sizes": [192, 384, 768, 1536, 3072],
    "image_size": 1536,
}
SUPPORTED_VISION_TOWERS = ("convnext", "convnextv2", "dinov3_convnext", "timm_wrapper")
# These families build their output layer with a bias and have no configuration field that says so.
TEXT_MODELS_WITH_HEAD_BIAS = ("codegen", "ctrl", "gptj", "phi")
# These families keep what they have read in a cache of their own, where `past_key_values` does not reach.
TEXT_MODELS_WITH_OWN_CACHE = ("minimax", "recurrent_gemma")
PROJECTOR_TYPE = re.compile(r"linear|mlp([1-9]\d*)x_gelu")
# Where transformers finds the classes in a checkpoint's own code files.
AUTO_MAP = {
    "AutoConfig": "configuration_convllava.ConvLlavaConfig",
    "AutoModel": "modeling_convllava.ConvLlavaModel",
    "AutoModelForImageTextToText": "modeling_convllava.ConvLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_convllava.ConvLlavaForConditionalGeneration",
}
# The stem of DINOv3's ConvNeXt is fixed at a stride of 4 in its modelling code.
DINOV3_STEM_STRIDE = 4


@lru_cache(maxsize=32)
def _probe_timm_map(architecture: str, model_args: str) -> tuple[int, int]:
    """Width and downsampling factor of a timm model, read off a forward pass on the meta device (no memory, no data).

    Args:
        architecture: timm's name of the model.
        model_args: keyword arguments for timm as a JSON object (a string, so that it can be cached).

    Returns:
        `(C, F)`: channels and pixels per cell of the last feature map.

    Raises:
        ValueError: the model's features are not one map in (batch, channels, height, width) layout.
    """
    from transformers import TimmWrapperConfig, TimmWrapperModel

    side = 256
    expected = "expected one map of shape (batch, channels, height, width), as timm's ConvNeXt models give."
    with torch.device("meta"):
        config = TimmWrapperConfig(architecture=architecture, model_args=json.loads(model_args), do_pooling=False)
        tower = TimmWrapperModel(config).eval()
        try:
            features = tower(torch.empty(1, 3, side, side)).last_hidden_state
        except (AssertionError, RuntimeError) as error:  # towers of a fixed image size, such as ViTs
            raise ValueError(
                f"vision_config.architecture={architecture!r} does not take a {side}x{side} image ({error}); {expected}"
            ) from error
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 4 or shape[2] != shape[3] or side % shape[2]:
        raise ValueError(
            f"vision_config.architecture={architecture!r} gives features of shape {shape} for a {side}x{side} image; "
            f"{expected}"
        )
    return shape[1], side // shape[2]


@strict
class ConvLlavaConfig(PreTrainedConfig):
    r"""
    Configuration of [`ConvLlavaModel`] and [`ConvLlavaForConditionalGeneration`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            A hierarchical tower whose output is a map: `convnext`, `convnextv2`, `dinov3_convnext`, or a convolutional
            timm model through `timm_wrapper`; four stages (32x) or five (64x). Default: the released five-stage
            ConvNeXt-L at 1536 pixels.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any causal language model of transformers. Default: Llama.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the `<image>` placeholder; one placeholder stands for one image token.
        projector_type (`str`, *optional*, defaults to `"mlp2x_gelu"`):
            `"linear"`, or `"mlpNx_gelu"` for N linear layers with GELU between them.
        vocab_padding (`int`, *optional*, defaults to 0):
            Number of ids at the end of the vocabulary that stand for no token, because the vocabulary was rounded up.
            Their scores are set to the lowest number, so they take no probability and are never generated.
            `resize_token_embeddings` to another size sets this to 0.
        lm_head_bias (`bool`, *optional*):
            Whether the output layer has a bias. Default: what the text model's own causal LM class has.
        tie_word_embeddings (`bool`, *optional*):
            Whether the output layer shares the input embeddings. Default: what `text_config` says.

    Raises:
        ValueError: an unsupported or inconsistent tower, text model, projector or image token.

    Example:

    ```python
    >>> from convllava_hf import ConvLlavaConfig

    >>> config = ConvLlavaConfig()
    >>> config.downsampling_factor, config.vision_feature_size, config.num_image_tokens(1536, 1536)
    (64, 3072, 576)
    ```
    """

    model_type = "convllava"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    projector_type: str = "mlp2x_gelu"
    vocab_padding: int = 0
    lm_head_bias: bool | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = RELEASED_VISION_TOWER
        if self.text_config is None:
            # One id beyond Vicuna's 32000 words for the placeholder, rounded up to a multiple of 64.
            self.text_config = {"model_type": "llama", "vocab_size": 32064}
        for name, default in (("vision_config", "convnext"), ("text_config", "llama")):
            value = getattr(self, name)
            if isinstance(value, dict):
                value = dict(value)
                setattr(self, name, AutoConfig.for_model(value.pop("model_type", default), **value))
        if self.lm_head_bias is None:
            default = self.text_config.model_type in TEXT_MODELS_WITH_HEAD_BIAS
            self.lm_head_bias = bool(getattr(self.text_config, "lm_head_bias", default))
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        # Servers and the stock trainer read other entries than the class that a checkpoint was saved from.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        self._validate_projector()
        self._validate_text()
        self._vision_map()

    def _validate_projector(self):
        if not PROJECTOR_TYPE.fullmatch(self.projector_type):
            raise ValueError(
                f"projector_type={self.projector_type!r} is not supported; expected 'linear' or 'mlpNx_gelu', "
                "N >= 1, for example 'mlp2x_gelu'."
            )

    def _validate_text(self):
        text = self.text_config
        if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or not hasattr(text, "vocab_size"):
            raise ValueError(
                f"text_config.model_type={text.model_type!r} is not a causal language model of transformers; expected "
                "a type that AutoModelForCausalLM knows, for example 'llama', 'qwen3', 'phi'. For a multimodal model "
                "pass its text configuration."
            )
        if obstacle := self._find_text_obstacle():
            raise ValueError(
                f"text_config.model_type={text.model_type!r} is not supported: {obstacle}. Expected a decoder that "
                "takes embeddings and ends in one linear layer, for example 'llama', 'qwen3', 'phi'."
            )
        if not 0 <= self.vocab_padding < text.vocab_size:
            raise ValueError(
                f"vocab_padding={self.vocab_padding}; expected 0 or more, and less than the text model's vocabulary of "
                f"{text.vocab_size}."
            )
        if not 0 <= self.image_token_id < text.vocab_size - self.vocab_padding:
            raise ValueError(
                f"image_token_id={self.image_token_id} is outside the text model's vocabulary of {text.vocab_size} ids "
                f"({self.vocab_padding} of them padding); add the '<image>' token to the tokenizer and set "
                "text_config.vocab_size to cover it."
            )

    def _find_text_obstacle(self) -> str | None:
        """What keeps the text model from running behind our output layer as it does behind its own; None if nothing.

        Read off its classes, not off an instance: nothing is built.
        """
        text = self.text_config
        if getattr(text, "is_encoder_decoder", False):
            return "it has an encoder"
        if "lm_head.weight" not in (MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]._tied_weights_keys or {}):
            return "its output layer is not a linear layer named lm_head"
        headless = MODEL_MAPPING.get(type(text), None)
        inputs = inspect.signature(headless.forward).parameters if headless else {}
        if not {"inputs_embeds", "past_key_values"}.issubset(inputs) or "decoder_input_ids" in inputs:
            return "without its output layer it is no decoder that takes inputs_embeds and past_key_values"
        if text.model_type in TEXT_MODELS_WITH_OWN_CACHE:
            return "it has a cache of its own"
        if text.model_type == "falcon_h1":
            return "it scales embeddings only where it looks them up itself"
        if getattr(text, "hidden_size_per_layer_input", None):
            return "its layers read token ids (hidden_size_per_layer_input), which images do not have"
        return None

    def _vision_map(self) -> tuple[int, int]:
        """Width `C` and downsampling factor `F` of the tower's last map; raises ValueError on an unsupported tower."""
        vision = self.vision_config
        if vision.model_type not in SUPPORTED_VISION_TOWERS:
            raise ValueError(
                f"vision_config.model_type={vision.model_type!r} is not supported; expected one of "
                f"{', '.join(SUPPORTED_VISION_TOWERS)}: hierarchical towers whose output is a map."
            )
        if vision.model_type == "timm_wrapper":
            return _probe_timm_map(vision.architecture, json.dumps(vision.model_args or {}, sort_keys=True))
        widths, depths = list(vision.hidden_sizes), list(vision.depths)
        if not len(widths) == len(depths) == vision.num_stages or len(depths) not in (4, 5):
            raise ValueError(
                f"vision_config has num_stages={vision.num_stages}, {len(depths)} depths and {len(widths)} "
                "hidden_sizes; expected four or five of each."
            )
        stem = DINOV3_STEM_STRIDE if vision.model_type == "dinov3_convnext" else vision.patch_size
        if not isinstance(stem, int):
            raise ValueError(f"vision_config.patch_size={stem!r} is not supported; expected one integer.")
        # Every stage after the first halves the map.
        return widths[-1], stem * 2 ** (len(depths) - 1)

    @property
    def vision_feature_size(self) -> int:
        """Width `C` of the tower's last map, the input width of the projector."""
        return self._vision_map()[0]

    @property
    def downsampling_factor(self) -> int:
        """Pixels per image token along each side: 64 for five stages, 32 for four."""
        return self._vision_map()[1]

    @property
    def num_projector_layers(self) -> int:
        """Number of linear layers of the projector."""
        depth = PROJECTOR_TYPE.fullmatch(self.projector_type).group(1)
        return int(depth) if depth else 1

    @property
    def text_logit_scale(self) -> float:
        """Factor on the logits in the text model's own causal LM class (Cohere, Granite, HyperCLOVA X), else 1."""
        text = self.text_config
        if text.model_type.startswith("cohere"):
            return text.logit_scale or 1.0
        if text.model_type == "hyperclovax":
            return text.logits_scaling
        return 1.0 / getattr(text, "logits_scaling", 1.0)

    def to_diff_dict(self) -> dict:
        """What config.json gets; parts keep neither the path they came from nor the dtype of the whole.

        transformers sets both on loading, so a checkpoint would change by being loaded and saved.
        """
        output = super().to_diff_dict()
        for name in self.sub_configs:
            output[name].pop("_name_or_path", None)
            if output[name].get("dtype") in (None, output.get("dtype")):
                output[name].pop("dtype", None)
        return output

    def num_image_tokens(self, height: int, width: int) -> int:
        """Number of image tokens of a processed image.

        Args:
            height, width: size in pixels of the processed image, multiples of `downsampling_factor`.

        Returns:
            `(height / F) * (width / F)`.

        Raises:
            ValueError: a side is not a positive multiple of the downsampling factor.
        """
        factor = self.downsampling_factor
        if height <= 0 or width <= 0 or height % factor or width % factor:
            raise ValueError(
                f"an image of {height}x{width} pixels cannot be split into cells of {factor}x{factor}; expected "
                f"positive multiples of {factor}, as ConvLlavaImageProcessor gives."
            )
        return (height // factor) * (width // factor)


__all__ = ["ConvLlavaConfig"]
