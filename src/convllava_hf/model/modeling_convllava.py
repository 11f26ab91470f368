# Copyright 2026 The convllava-hf authors. Licensed under the Apache License, Version 2.0.
"""ConvLLaVA: a hierarchical vision tower, an MLP projector and a causal language model.

Notation: `B` rows of text, `S` tokens per row, `I` images in the batch (over all rows, in reading order), `H, W`
pixels, `F` downsampling factor, `N = (H / F) * (W / F)` tokens of an image, `C` width of the tower's last map, `D`
width of the language model, `V` vocabulary.

Source of the original behaviour: alibaba/conv-llava, `llava/model/multimodal_encoder/convnext_encoder.py` (the last
stage's map, row-major, no final norm, no class token) and `llava/model/llava_arch.py` (features replace the
placeholder).
"""

import inspect
import re
import sys
from dataclasses import dataclass

from .configuration_convllava import ConvLlavaConfig  # which checks the version of transformers


# isort: split
import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.models.convnext import modeling_convnext
from transformers.models.convnextv2 import modeling_convnextv2
from transformers.models.dinov3_convnext import modeling_dinov3_convnext
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging, torch_compilable_check


logger = logging.get_logger(__name__)


# The towers' blocks with activation checkpointing, which transformers' own lack. They keep the names of their bases:
# `_no_split_modules` (device maps, FSDP wrapping) finds classes by name.
class ConvNextLayer(GradientCheckpointingLayer, modeling_convnext.ConvNextLayer):
    """A ConvNeXt block whose activations can be recomputed in the backward pass."""


class ConvNextV2Layer(GradientCheckpointingLayer, modeling_convnextv2.ConvNextV2Layer):
    """A ConvNeXt V2 block whose activations can be recomputed in the backward pass."""


class DINOv3ConvNextLayer(GradientCheckpointingLayer, modeling_dinov3_convnext.DINOv3ConvNextLayer):
    """A DINOv3 ConvNeXt block whose activations can be recomputed in the backward pass."""


# Of ids that only round the vocabulary up: below every score that a language model gives. The lowest number of the
# dtype would overflow where scores are averaged or divided, by label smoothing and by temperatures.
PADDED_ID_SCORE = -1e3
# Each was compared with its own causal language model class: scores, generation with a cache, saving.
TESTED_TEXT_MODELS = tuple(
    """
    bailing_hybrid bloom codegen cohere cohere2 deepseek_v3 ernie4_5 exaone4 falcon gemma gemma2 gemma3_text glm
    glm4 gpt2 gpt_neo gpt_neox gpt_oss gptj granite granitemoe helium hyperclovax kimi_linear lfm2 llama minicpm3
    mistral mixtral mpt nemotron nemotron_h olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3
    qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 stablelm starcoder2
    """.split()
)
# Their output layer is a linear one, but never shares the embeddings, which is where its name is read otherwise.
UNTIED_TEXT_MODELS = ("bailing_hybrid", "kimi_linear", "nemotron_h")
CHECKPOINTED_BLOCKS = {
    modeling_convnext.ConvNextLayer: ConvNextLayer,
    modeling_convnextv2.ConvNextV2Layer: ConvNextV2Layer,
    modeling_dinov3_convnext.DINOv3ConvNextLayer: DINOv3ConvNextLayer,
}


def check_text_model(config: ConvLlavaConfig) -> None:
    """Refuses text models that cannot run behind an output layer of ours; read off their classes, nothing is built.

    Args:
        config: the model's configuration.

    Raises:
        ValueError: no causal language model of transformers, or one of another shape.
    """
    text = config.text_config
    name = f"text_config.model_type={text.model_type!r}"
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name} is not a causal language model of transformers; expected a type that AutoModelForCausalLM knows, "
            "for example 'llama', 'qwen3', 'phi'. For a multimodal model pass its text configuration."
        )
    obstacle = None
    headless = MODEL_MAPPING.get(type(text), None)
    inputs = inspect.signature(headless.forward).parameters if headless else {}
    if getattr(text, "is_encoder_decoder", False):
        obstacle = "it has an encoder"
    elif "lm_head.weight" not in (MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]._tied_weights_keys or {}):
        if text.model_type not in UNTIED_TEXT_MODELS:
            obstacle = "its output layer is not a linear layer named lm_head"
    if not obstacle and (not {"inputs_embeds", "past_key_values"}.issubset(inputs) or "decoder_input_ids" in inputs):
        obstacle = "without its output layer it is no decoder that takes inputs_embeds and past_key_values"
    if obstacle:
        raise ValueError(
            f"{name} is not supported: {obstacle}. Expected a decoder that takes embeddings and ends in one linear "
            "layer, for example 'llama', 'qwen3', 'phi'."
        )
    if text.model_type not in TESTED_TEXT_MODELS:
        logger.warning_once(
            f"{name} is not among the {len(TESTED_TEXT_MODELS)} language models that were compared with their own "
            "class behind this one: compare its answers without images with those of AutoModelForCausalLM."
        )


def build_vision_tower(config: ConvLlavaConfig) -> PreTrainedModel:
    """Builds the tower of `config.vision_config`, without the weights that its map does not depend on.

    Args:
        config: the model's configuration.

    Returns:
        A model of transformers. Blocks support activation checkpointing. The layer norm over ConvNeXt's pooled output
        and the head of a timm model are identities: they never get a gradient, so DDP would stop at them, and the
        released checkpoints do not hold them.
    """
    # Convolutions have no attention; asking them for the text model's kernel (sdpa, flash) would be refused. timm
    # chooses its own, and warns of being asked for eager.
    is_timm = config.vision_config.model_type == "timm_wrapper"
    tower = AutoModel.from_config(config.vision_config, attn_implementation="sdpa" if is_timm else "eager")
    for module in tower.modules():
        module.__class__ = CHECKPOINTED_BLOCKS.get(type(module), type(module))
    if is_timm:
        for name in ("head", "fc"):
            if hasattr(tower.timm_model, name):
                setattr(tower.timm_model, name, nn.Identity())
    elif config.vision_config.model_type != "dinov3_convnext":
        tower.layernorm = nn.Identity()
    return tower


@dataclass
class ConvLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`ConvLlavaModel`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(sum of N over images, D)`, *optional*):
            Projected image features in reading order; `None` without images.
        router_logits (`tuple`, *optional*): of a mixture-of-experts language model, with `output_router_logits`.
    """

    image_hidden_states: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None


@dataclass
class ConvLlavaCausalLMOutputWithPast(ModelOutput):
    """Output of [`ConvLlavaForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): mean next-token cross-entropy in nats, with `labels`; of a
            mixture of experts with `output_router_logits` plus `router_aux_loss_coef` times `aux_loss`.
        logits (`torch.Tensor` of shape `(B, S, V)`): scores before the softmax.
        past_key_values (`Cache`, *optional*): keys and values of the language model.
        hidden_states, attentions (`tuple`, *optional*): of the language model, when asked for.
        image_hidden_states (`torch.Tensor` of shape `(sum of N over images, D)`, *optional*): projected features.
        aux_loss (`torch.Tensor` of shape `()`, *optional*), router_logits (`tuple`, *optional*): how unevenly the
            experts of a mixture are used, and the scores that choose them, with `output_router_logits`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None


class ConvLlavaMultiModalProjector(nn.Module):
    """Linear layers `linear_1 .. linear_n` with GELU (exact form) between them; the original's `mm_projector`."""

    def __init__(self, config: ConvLlavaConfig):
        super().__init__()
        self.num_layers = config.num_projector_layers
        width = config.text_config.hidden_size
        for i in range(self.num_layers):
            inputs = width if i else config.vision_feature_size
            setattr(self, f"linear_{i + 1}", nn.Linear(inputs, width))
        self.act = nn.GELU()

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Maps `(..., C)` to `(..., D)`."""
        hidden_states = self.linear_1(image_features)
        for i in range(1, self.num_layers):
            hidden_states = getattr(self, f"linear_{i + 1}")(self.act(hidden_states))
        return hidden_states


def count_vision_passes(batch: dict) -> int:
    """How often the tower runs for a batch: once for each size among its images.

    Args:
        batch: what the model's forward is called with. `image_sizes` is read, so count before it moves to a GPU.

    Returns:
        0 for text and for cached `vision_features`; see `vision_passes` in [`ConvLlavaModel.forward`].
    """
    if batch.get("pixel_values") is None:
        return 0
    sizes = batch.get("image_sizes")
    return 1 if sizes is None else len(sizes.unique(dim=0))


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Hidden states `(B, S, D)` at the positions to score, see [`ConvLlavaForConditionalGeneration.forward`].

    Source: transformers, `modeling_utils.py`, `slice_logits_to_keep`, which the oldest supported version lacks.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool and logits_to_keep.ndim == 2:
        return hidden_states[logits_to_keep]  # (true places, D)
    if logits_to_keep.ndim == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


def set_trainable(model: nn.Module, patterns: list[str]) -> None:
    r"""Makes exactly the parameters trainable whose names match, and freezes all others.

    Args:
        model: any module. A parameter that is tied has several names, and is trained if one of them matches: an output
            layer that shares the input embeddings is trained by `"lm_head"` as well as by `"language_model"`.
        patterns: regular expressions, searched in the names of the parameters: `"multi_modal_projector"`,
            `r"vision_tower.*stages\.4\."`.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    found = find_names([name for name, _ in named], patterns)
    trained = {id(parameter) for name, parameter in named if name in found}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def find_names(names: list[str], patterns: list[str]) -> set[str]:
    """Names that match any of the patterns.

    Args:
        names: of parameters.
        patterns: regular expressions, searched in the names.

    Raises:
        ValueError: a pattern that matches no name.
    """
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(
                f"trainable pattern {pattern!r} matches no parameter; expected regular expressions that occur in "
                f"parameter names, which begin with {', '.join(parts)}."
            )
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def check_skipped_modules(model: nn.Module) -> None:
    """Looks whether everything that a quantisation should leave alone is there, which quantisers themselves do not.

    They compare names from the top: `"vision_tower"` leaves nothing alone, `"model.vision_tower"` the tower.

    Args:
        model: with or without `config.quantization_config`.

    Raises:
        ValueError: a name in the skip list that matches no module.
    """
    settings = getattr(model.config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else vars(settings)
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        for skipped in settings.get(key) or ():
            if not any(
                re.match(skipped, name) or (isinstance(module, nn.Linear) and name.endswith(skipped))
                for name, module in model.named_modules()
            ):
                parts = ", ".join(sorted(f"model.{name}" for name, _ in model.base_model.named_children()))
                raise ValueError(
                    f"{key} names {skipped!r}, which matches no module, so what it should leave alone was quantised; "
                    f"expected names from the top: {parts}, lm_head."
                )


class ConvLlavaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation; see `PreTrainedModel`."""

    config_class = ConvLlavaConfig
    config: ConvLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, trainable: list[str] | None = None, **kwargs):
        """Loads a checkpoint, see `PreTrainedModel.from_pretrained`.

        Args:
            trainable: regular expressions of the parameters to train; all others are frozen, see [`set_trainable`].
                Nothing of it is saved. Training tools that only load a model and train it reach freezing this way:
                `model_init_kwargs: {trainable: [multi_modal_projector]}` in a recipe of TRL. Default: train all.

        Raises:
            ValueError: `trainable`, or the skip list of a quantisation, holds a name that matches nothing.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_skipped_modules(model)
        if trainable is not None:
            set_trainable(model, trainable)
        return loaded

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        super()._set_gradient_checkpointing(enable=enable, **kwargs)
        for module in self.modules():
            # timm models checkpoint by a switch of their own, which the wrapper only offers at the top of a model.
            if hasattr(module, "timm_model"):
                module.timm_model.set_grad_checkpointing(enable)


class ConvLlavaModel(ConvLlavaPreTrainedModel):
    """The tower, the projector and the language model without its output layer."""

    def __init__(self, config: ConvLlavaConfig):
        super().__init__(config)
        check_text_model(config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = ConvLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if self.get_input_embeddings().embedding_dim != config.text_config.hidden_size:
            raise ValueError(
                f"text_config.model_type={config.text_config.model_type!r} has embeddings of width "
                f"{self.get_input_embeddings().embedding_dim} and layers of width {config.text_config.hidden_size}; "
                "expected one width, that of the projected image features."
            )
        self.post_init()

    def train(self, mode: bool = True):
        """As always, but batch norms of a tower keep the statistics that they come with: a frozen tower stays what it
        was, and what an image gives does not depend on the images beside it."""
        super().train(mode)
        for module in self.vision_tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _encode(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ModelOutput]:
        """Runs the tower on images of one size: `(I, 3, H, W)` to features `(I, N, C)` and the tower's own output."""
        if self.config.vision_config.model_type == "timm_wrapper":
            kwargs["do_pooling"] = False
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if features.ndim == 3:  # dinov3_convnext gives a normalised sequence that starts with its class token
            return features[:, 1:], outputs  # (I, N, C)
        return features.flatten(2).transpose(1, 2), outputs  # (I, C, h, w) -> (I, N, C)

    def _list_sizes(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None, vision_passes: int | None
    ) -> list[tuple[int, int]] | None:
        """Heights and widths of the images; `None` where all fill `pixel_values`.

        `vision_passes=1` says so without a look at `image_sizes`, which would wait for a GPU. Without it a traced
        forward takes it for granted as well, and checks it when the program runs.
        """
        full = tuple(pixel_values.shape[-2:])
        if pixel_values.shape[0] == 0:
            raise ValueError("pixel_values holds no image; leave it out for text.")
        if not torch.compiler.is_compiling():
            self.config.num_image_tokens(*full)
        if image_sizes is None:
            return None
        if image_sizes.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"image_sizes has {len(image_sizes)} entries for {len(pixel_values)} images in pixel_values; expected "
                "one (height, width) per image."
            )
        if vision_passes == 1:
            return None
        if vision_passes is None and torch.compiler.is_compiling():
            for side in range(2):
                torch_compilable_check((image_sizes[:, side] == full[side]).all(), "images of one size")
            return None
        sizes = [tuple(size) for size in image_sizes.tolist()]
        for height, width in set(sizes):
            self.config.num_image_tokens(height, width)
            if height > full[0] or width > full[1]:
                raise ValueError(
                    f"image_sizes names an image of {height}x{width} pixels, larger than pixel_values of "
                    f"{full[0]}x{full[1]}; pass the image_sizes that the image processor gave with these pixel_values."
                )
        return None if set(sizes) == {full} else sizes

    def _run_tower(
        self, pixel_values: torch.Tensor, sizes: list[tuple[int, int]] | None
    ) -> tuple[tuple[torch.Tensor], int]:
        """Features of images in reading order, `(N, C)` each or joined, and how many passes of the tower that took."""
        if sizes is None:
            features, _ = self._encode(pixel_values)  # (I, N, C)
            return (features.flatten(0, 1),), 1
        features, groups = [None] * len(sizes), {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        for (height, width), members in groups.items():
            # Slices, as a list of indices would be copied to the device, which waits for that.
            encoded, _ = self._encode(torch.stack([pixel_values[index, :, :height, :width] for index in members]))
            for index, feature in zip(members, encoded, strict=True):
                features[index] = feature  # (N, C)
        return tuple(features), len(groups)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_sizes: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes and projects images; images of equal size run as one batch, and padding is never convolved.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, 3, H, W)`): images, padded to the largest at the right and
                the bottom. Cast to the tower's dtype.
            image_sizes (`torch.LongTensor` of shape `(I, 2)`, *optional*): height and width of each image in pixels
                without padding. Default: every image fills `(H, W)`.
            kwargs: `output_hidden_states=True` adds the tower's maps if all images fill `(H, W)`.

        Returns:
            `last_hidden_state`: the tower's features, `(I, N, C)` if all images fill `(H, W)`, else `(sum of N, C)`.
            `pooler_output`: one tensor `(N_i, D)` of projected features per image.
            `hidden_states`: the tower's maps, if asked for.

        Raises:
            ValueError: a size that is no multiple of the downsampling factor, is larger than `pixel_values`, or a
                number of sizes that is not the number of images.
        """
        sizes = self._list_sizes(pixel_values, image_sizes, None)
        if sizes is None:
            keep = {key: kwargs[key] for key in ("output_hidden_states",) if kwargs.get(key) is not None}
            features, outputs = self._encode(pixel_values, **keep)
            return BaseModelOutputWithPooling(
                last_hidden_state=features,
                pooler_output=tuple(self.multi_modal_projector(features)),
                hidden_states=outputs.hidden_states,
            )
        features, _ = self._run_tower(pixel_values, sizes)
        joined = torch.cat(features)  # (sum of N, C)
        projected = self.multi_modal_projector(joined).split([len(feature) for feature in features])
        return BaseModelOutputWithPooling(last_hidden_state=joined, pooler_output=projected)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor, image_features: torch.FloatTensor
    ) -> torch.BoolTensor:
        """Finds the image placeholders and checks that there is one for each feature.

        Args:
            input_ids: `(B, S)`, or `None`: placeholders are then the positions that hold their embedding.
            inputs_embeds: `(B, S, D)`.
            image_features: `(sum of N, D)`.

        Returns:
            `(B, S, 1)`, true at placeholders.

        Raises:
            ValueError: the number of placeholders is not the number of features.
        """
        if input_ids is None:
            placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)  # (B, S)
        else:
            mask = input_ids == self.config.image_token_id  # (B, S)
        num_placeholders = mask.sum()
        torch_compilable_check(
            num_placeholders == image_features.shape[0],
            lambda: (
                f"Image features and image tokens do not match: {num_placeholders} placeholders with id "
                f"{self.config.image_token_id} in the text, {image_features.shape[0]} features from the images. "
                "Prepare text and images with one call of the processor, and do not cut its input_ids."
            ),
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)  # (B, S, 1)

    def _run_idle_pass(self) -> torch.Tensor:
        """The tower's features of one blank cell, `(1, C)`."""
        side = self.config.downsampling_factor
        channels = getattr(self.config.vision_config, "num_channels", 3)
        blank = torch.zeros(1, channels, side, side, device=self.vision_tower.device)
        features, _ = self._encode(blank)
        return features[0]

    def _embed_images(
        self,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        vision_passes: int | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Projected features of all images `(sum of N, D)`, and a zero that went through idle passes; `None` for none.

        The tower runs `vision_passes` times and the projector once, whatever the batch holds.
        """
        features, passes = [], 0
        if vision_features is not None:
            features.append(vision_features)
        elif pixel_values is not None:
            sizes = self._list_sizes(pixel_values, image_sizes, vision_passes)
            encoded, passes = self._run_tower(pixel_values, sizes)
            features += encoded
        if vision_passes is None:
            in_company = self.training and torch.distributed.is_available() and torch.distributed.is_initialized()
            vision_passes = max(passes, int(in_company and torch.distributed.get_world_size() > 1))
        if passes > vision_passes:
            raise ValueError(
                f"vision_passes={vision_passes}, but the images of this batch have {passes} sizes, one pass each; pass "
                "the largest count_vision_passes of all processes."
            )
        # Idle passes come last, so that the backward passes of all processes meet in one order as well.
        idle = [self._run_idle_pass() for _ in range(vision_passes - passes)]
        if not features and not idle:
            return None, None
        projector = self.multi_modal_projector.linear_1.weight
        joined = torch.cat([part.to(projector.device, projector.dtype) for part in features + idle])
        projected = self.multi_modal_projector(joined)  # (sum of N + idle passes, D)
        num_features = joined.shape[0] - len(idle)
        zero = projected[num_features:].sum() * 0.0 if idle else None
        return projected[:num_features] if features else None, zero

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_passes: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConvLlavaModelOutputWithPast:
        """Replaces image placeholders by projected features and runs the language model.

        Args:
            input_ids: `(B, S)`; image placeholders expanded to one per image token, as the processor gives them.
            pixel_values: `(I, 3, H, W)`, see [`~ConvLlavaModel.get_image_features`]; `None` for text.
            attention_mask: `(B, S)`, 1 at tokens and 0 at padding.
            position_ids: `(B, S)`.
            past_key_values: cache of the language model.
            inputs_embeds: `(B, S, D)` in place of `input_ids`.
            image_sizes: `(I, 2)` heights and widths in pixels. A traced forward (torch.compile, torch.export) takes
                images of one size, unless `vision_passes` tells how many sizes there are.
            mm_encoder_outputs: `{"image": output of get_image_features}` in the place of `pixel_values`: what
                `generate` makes once before its first step.
            vision_features: `(sum of N, C)`, the tower's features of all images in reading order, in the place of
                `pixel_values`: the tower does not run, the projector does. For training on a cache of features.
            vision_passes: how many times the tower runs in this forward. It runs once for each size among the images
                (see [`count_vision_passes`]), and not at all for text and for `vision_features`. Where its weights are
                sharded over processes (FSDP2, ZeRO-3), each pass is a collective, so every process must make as many:
                pass the same number everywhere, the largest `count_vision_passes` of the processes' batches. Missing
                passes run idle, on one blank cell whose features are multiplied by zero. The projector runs once in
                any case, if there are images or passes. Default: what the batch needs, and in training with several
                processes at least one, which is enough where all images have one size. `vision_passes=1` also
                promises that all images fill `pixel_values`, so that `image_sizes` need not be read (and waited for).

        Returns:
            Hidden states `(B, S, D)` and what [`ConvLlavaModelOutputWithPast`] lists.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; images in more than one form; placeholders
                that do not match the images; fewer `vision_passes` than the images have sizes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(images is not None for images in (pixel_values, encoded, vision_features)) > 1:
            raise ValueError("You cannot specify more than one of pixel_values, mm_encoder_outputs and vision_features")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, S, D)

        if encoded is not None:
            image_features, zero = torch.cat(tuple(encoded.pooler_output)), None  # (sum of N, D)
        else:
            image_features, zero = self._embed_images(pixel_values, image_sizes, vision_features, vision_passes)
        if image_features is not None:
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)  # (sum of N, D)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)  # (B, S, 1)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        if zero is not None:
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds.device, inputs_embeds.dtype)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return ConvLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            router_logits=getattr(outputs, "router_logits", None),
        )


class ConvLlavaGenerationMixin(GenerationMixin):
    """Generation that never gives a placeholder: it would stand for an image that does not exist."""

    def _prepare_generation_config(self, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        suppressed = generation_config.suppress_tokens or []
        if self.config.image_token_id not in suppressed:
            generation_config.suppress_tokens = [*suppressed, self.config.image_token_id]
        return generation_config, model_kwargs


class ConvLlavaForConditionalGeneration(ConvLlavaPreTrainedModel, ConvLlavaGenerationMixin):
    """ConvLLaVA with the output layer of its language model: generation and training."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # of most text models
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ConvLlavaConfig):
        super().__init__(config)
        self.model = ConvLlavaModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        # Text models differ in how they name their embeddings (embed_tokens, wte, embed_in).
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self._is_stateful = self.model.language_model._is_stateful  # Mamba's layers cannot take tokens back
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Resizes the vocabulary, see `PreTrainedModel`; ids that were padding may then be tokens."""
        before = self.config.text_config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.text_config.vocab_size != before:
            self.config.vocab_padding = 0
        return embeddings

    def get_image_features(
        self, pixel_values: torch.FloatTensor, image_sizes: torch.LongTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See [`ConvLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_passes: int | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConvLlavaCausalLMOutputWithPast:
        r"""Next-token scores, and the loss with `labels`.

        Args:
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds, image_sizes,
                mm_encoder_outputs, vision_features, vision_passes: see [`ConvLlavaModel.forward`].
            labels: `(B, S)` token ids, -100 where no loss is taken (image placeholders included).
            output_router_logits: of a mixture-of-experts language model, add the auxiliary loss that balances its
                experts. Default: what `text_config` says.
            logits_to_keep: compute scores for the last positions only; 0 keeps all. A 1-D tensor of positions, a 2-D
                one of positions per row, or a boolean mask `(B, S)`, whose scores come flat, `(true places, V)`.

        Returns:
            What [`ConvLlavaCausalLMOutputWithPast`] lists.

        Raises:
            ValueError: see [`ConvLlavaModel.forward`]; `output_router_logits` of a language model without experts.

        Example:

        ```python
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> import convllava_hf

        >>> model = AutoModelForImageTextToText.from_pretrained("my-convllava")
        >>> processor = AutoProcessor.from_pretrained("my-convllava")
        >>> content = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is it?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     add_generation_prompt=True,
        ...     tokenize=True,
        ...     return_dict=True,
        ...     return_tensors="pt",
        ... )
        >>> output = model.generate(**inputs, max_new_tokens=32)
        >>> processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```"""
        text = self.config.text_config
        if output_router_logits is None:
            output_router_logits = getattr(text, "output_router_logits", False)
        if output_router_logits:
            kwargs["output_router_logits"] = True
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            vision_features=vision_features,
            vision_passes=vision_passes,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))  # (B, S, V)
        if self.config.text_logit_scale != 1.0:
            logits = logits * self.config.text_logit_scale
        if (softcap := getattr(text, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if self.config.vocab_padding:
            logits[..., -self.config.vocab_padding :] = PADDED_ID_SCORE

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
        if output_router_logits:
            aux_loss = self._balance_experts(outputs.router_logits, attention_mask)
            if loss is not None:
                loss = loss + text.router_aux_loss_coef * aux_loss.to(loss.device)
        return ConvLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
        )

    def _balance_experts(self, router_logits, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The loss that balances a mixture of experts, by the language model's own function.

        Raises:
            ValueError: a language model without such a loss.
        """
        text = self.config.text_config
        module = sys.modules[type(self.model.language_model).__module__]
        balance = getattr(module, "load_balancing_loss_func", None)
        if balance is None or not router_logits:
            raise ValueError(
                f"output_router_logits is not supported for text_config.model_type={text.model_type!r}, which gives "
                "no scores of experts to balance; leave it out."
            )
        num_experts = getattr(text, "num_experts", None) or text.num_local_experts
        return balance(router_logits, num_experts, text.num_experts_per_tok, attention_mask)


__all__ = ["ConvLlavaForConditionalGeneration", "ConvLlavaModel", "ConvLlavaPreTrainedModel"]
