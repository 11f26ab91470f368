# Copyright 2026 The convllava-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of ConvLLaVA: a hierarchical vision tower, a projector and a causal language model.

Notation: `H, W` height and width in pixels; `F` downsampling factor of the tower in pixels per cell, so an image has
`(H / F) * (W / F)` tokens; `C` width of the tower's last stage.
"""

import re
from pathlib import Path

import transformers


# Older versions fail later, with a message about something else.
if [int(number) for number in re.findall(r"\d+", transformers.__version__)[:2]] < [5, 19]:
    raise ImportError(
        f"ConvLLaVA needs transformers 5.19 or newer, but {transformers.__version__} is installed: "
        "pip install -U 'transformers>=5.19,<6'"
    )

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


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
# Causal language models of transformers that run behind another class's output layer differently than behind their own.
UNSUPPORTED_TEXT_MODELS = {
    "deepseek_v4": "some of its layers choose experts by token ids, which images do not have",
    "falcon_h1": "it scales embeddings only where it looks them up itself",
    "minimax": "it has a cache of its own, where past_key_values does not reach",
    "recurrent_gemma": "it has a cache of its own, where past_key_values does not reach",
}
# What a configuration file may ask for. Building 200,000 layers, even without memory, never ends.
MAX_LAYERS = 1024
MAX_WIDTH = 65536
PROJECTOR_TYPE = re.compile(r"linear|mlp([1-9])x_gelu")
# Where transformers finds the classes in a checkpoint's own code files.
AUTO_MAP = {
    "AutoConfig": "configuration_convllava.ConvLlavaConfig",
    "AutoModel": "modeling_convllava.ConvLlavaModel",
    "AutoModelForImageTextToText": "modeling_convllava.ConvLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_convllava.ConvLlavaForConditionalGeneration",
}
# The stems of DINOv3's ConvNeXt and of timm's towers have a stride of 4.
STEM_STRIDE = 4
# timm's towers whose output is a map, by name without the tag of their weights, and the width of that map.
TIMM_CONVNEXT = re.compile(r"convnext(?:v2)?_([a-z]+)(?:_ols|_rms|_hnf|_mlp)*(?:\.\w+)?")
TIMM_CONVNEXT_WIDTHS = {
    "zepto": 256,
    "atto": 320,
    "femto": 384,
    "pico": 512,
    "nano": 640,
    "tiny": 768,
    "small": 768,
    "base": 1024,
    "large": 1536,
    "xlarge": 2048,
    "huge": 2816,
    "xxlarge": 3072,
}
TIMM_FASTVIT = re.compile(r"fastvit_([a-z]+\d+)(?:\.\w+)?")
TIMM_FASTVIT_WIDTHS = {
    "t8": 768,
    "t12": 1024,
    "s12": 1024,
    "sa12": 1024,
    "sa24": 1024,
    "sa36": 1024,
    "ma36": 1216,
    "mci0": 1024,
    "mci1": 1024,
    "mci2": 1280,
    "mci3": 3072,
    "mci4": 4096,
}
TIMM_FIVE_STAGES = ("mci3", "mci4")
# What timm may be told about a ConvNeXt: numbers, switches and names, no paths and no weights.
TIMM_ARGUMENTS = {
    "depths": list,
    "dims": list,
    "ls_init_value": float,
    "norm_eps": float,
    "drop_path_rate": float,
    "conv_mlp": bool,
    "use_grn": bool,
    "act_layer": str,
}


def check_stages(depths: list[int], widths: list[int]) -> None:
    """Bounds the stages of a tower.

    Raises:
        ValueError: more layers or wider ones than any tower has, or no positive integers.
    """
    for name, values, limit in (("depths", depths, MAX_LAYERS), ("widths", widths, MAX_WIDTH)):
        if not all(isinstance(value, int) and 0 < value <= limit for value in values):
            raise ValueError(
                f"vision_config has stages of {name} {list(values)!r}; expected integers from 1 to {limit}."
            )


def find_timm_map(architecture: str, arguments: dict) -> tuple[int, int]:
    """Width and downsampling factor of the map of a timm model, by its name.

    timm would fetch or unpickle what some names and arguments point to.

    Args:
        architecture: timm's name of the model.
        arguments: what timm would be told about it.

    Returns:
        `C` and `F`.

    Raises:
        ValueError: a name or an argument that is not known to be safe.
    """
    if not isinstance(architecture, str) or not isinstance(arguments, dict):
        raise ValueError(
            f"a vision_config of timm has architecture={architecture!r} and model_args={arguments!r}; expected a name "
            "and arguments by name."
        )
    convnext, fastvit = TIMM_CONVNEXT.fullmatch(architecture), TIMM_FASTVIT.fullmatch(architecture)
    width = TIMM_CONVNEXT_WIDTHS.get(convnext[1]) if convnext else None
    width = TIMM_FASTVIT_WIDTHS.get(fastvit[1]) if fastvit else width
    if width is None:
        raise ValueError(
            f"vision_config.architecture={architecture!r} is not supported; expected a ConvNeXt, ConvNeXt V2 or "
            "FastViT that timm ships, for example 'convnext_large', 'convnextv2_base', 'fastvit_mci3'."
        )
    for name, value in arguments.items():
        kind = TIMM_ARGUMENTS.get(name) if convnext else None
        if kind is None or not isinstance(value, (kind, int) if kind is float else kind):
            allowed = f"of {', '.join(TIMM_ARGUMENTS)}, with their own types" if convnext else "none for a FastViT"
            raise ValueError(f"vision_config.model_args of {architecture!r} has {name}={value!r}; expected {allowed}.")
    depths, widths = arguments.get("depths", [1] * 4), arguments.get("dims", [width] * 4)
    if not len(depths) == len(widths) == 4:
        raise ValueError(
            f"vision_config.model_args has {len(depths)} depths and {len(widths)} dims; expected four of "
            "each, as timm's ConvNeXt has."
        )
    check_stages(depths, widths)
    stages = 5 if fastvit and fastvit[1] in TIMM_FIVE_STAGES else 4
    return widths[-1], STEM_STRIDE * 2 ** (stages - 1)


@strict
class ConvLlavaConfig(PreTrainedConfig):
    r"""
    Configuration of [`ConvLlavaModel`] and [`ConvLlavaForConditionalGeneration`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            A hierarchical tower whose output is a map: `convnext`, `convnextv2`, `dinov3_convnext`, or timm's ConvNeXt,
            ConvNeXt V2 and FastViT through `timm_wrapper`; four stages (32x) or five (64x). Default: the released
            five-stage ConvNeXt-L at 1536 pixels.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any causal language model of transformers. Default: Llama.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the `<image>` placeholder; one placeholder stands for one image token.
        projector_type (`str`, *optional*, defaults to `"mlp2x_gelu"`):
            `"linear"`, or `"mlpNx_gelu"` for N linear layers, 9 at most, with GELU between them.
        vocab_padding (`int`, *optional*, defaults to 0):
            Number of ids at the end of the vocabulary that stand for no token, because the vocabulary was rounded up.
            Their scores are set to the lowest number, so they take no probability and are never generated.
            `resize_token_embeddings` to another size sets this to 0.
        lm_head_bias (`bool`, *optional*):
            Whether the output layer has a bias. Default: what the text model's own causal LM class has.
        tie_word_embeddings (`bool`, *optional*):
            Whether the output layer shares the input embeddings. Default: what `text_config` says.

    Nothing is built or imported to check a configuration; what only the text model's classes tell is checked where the
    model is built.

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
        super().__post_init__(**kwargs)
        self._validate_projector()
        self._validate_text()
        self._vision_map()

    def _validate_projector(self):
        if not PROJECTOR_TYPE.fullmatch(self.projector_type):
            raise ValueError(
                f"projector_type={self.projector_type!r} is not supported; expected 'linear' or 'mlpNx_gelu', "
                "N from 1 to 9, for example 'mlp2x_gelu'."
            )

    def _validate_text(self):
        text = self.text_config
        if not hasattr(text, "vocab_size") or not hasattr(text, "hidden_size"):
            raise ValueError(
                f"text_config.model_type={text.model_type!r} is not the configuration of a language model; for a "
                "multimodal model pass its text configuration."
            )
        obstacle = UNSUPPORTED_TEXT_MODELS.get(text.model_type)
        if getattr(text, "hidden_size_per_layer_input", None):
            obstacle = "its layers read token ids (hidden_size_per_layer_input), which images do not have"
        if obstacle:
            raise ValueError(f"text_config.model_type={text.model_type!r} is not supported: {obstacle}.")
        layers = getattr(text, "num_hidden_layers", 0) or 0
        if not 0 <= layers <= MAX_LAYERS or not 0 < text.hidden_size <= MAX_WIDTH:
            raise ValueError(
                f"text_config has num_hidden_layers={layers} and hidden_size={text.hidden_size}; expected at most "
                f"{MAX_LAYERS} and {MAX_WIDTH}."
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

    def _vision_map(self) -> tuple[int, int]:
        """Width `C` and downsampling factor `F` of the tower's last map; raises ValueError on an unsupported tower."""
        vision = self.vision_config
        if vision.model_type not in SUPPORTED_VISION_TOWERS:
            raise ValueError(
                f"vision_config.model_type={vision.model_type!r} is not supported; expected one of "
                f"{', '.join(SUPPORTED_VISION_TOWERS)}: hierarchical towers whose output is a map."
            )
        if vision.model_type == "timm_wrapper":
            return find_timm_map(vision.architecture, vision.model_args or {})
        widths, depths = list(vision.hidden_sizes), list(vision.depths)
        if not len(widths) == len(depths) == vision.num_stages or len(depths) not in (4, 5):
            raise ValueError(
                f"vision_config has num_stages={vision.num_stages}, {len(depths)} depths and {len(widths)} "
                "hidden_sizes; expected four or five of each."
            )
        check_stages(depths, widths)
        stem = STEM_STRIDE if vision.model_type == "dinov3_convnext" else vision.patch_size
        if not isinstance(stem, int) or not 0 < stem <= MAX_WIDTH:
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

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves config.json, see `PreTrainedConfig`; `auto_map` names the classes whose code lies beside it.

        A model that is saved puts its code there first. Servers and the stock trainer read other entries than that of
        the class which was saved, so all classes of a file are named.
        """
        folder = Path(save_directory)
        present = {
            name: target for name, target in AUTO_MAP.items() if (folder / f"{target.partition('.')[0]}.py").is_file()
        }
        vars(self).pop("auto_map", None)
        if present:
            self.auto_map = present
        return super().save_pretrained(save_directory, *args, **kwargs)

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
