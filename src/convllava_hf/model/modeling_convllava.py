# Copyright 2026 The convllava-hf authors. Licensed under the Apache License, Version 2.0.
"""ConvLLaVA: a hierarchical vision tower, an MLP projector and a causal language model.

Notation: `B` rows of text, `S` tokens per row, `I` images in the batch (over all rows, in reading order), `H, W`
pixels, `F` downsampling factor, `N = (H / F) * (W / F)` tokens of an image, `C` width of the tower's last map, `D`
width of the language model, `V` vocabulary.

Source of the original behaviour: alibaba/conv-llava, `llava/model/multimodal_encoder/convnext_encoder.py` (the last
stage's map, row-major, no final norm, no class token) and `llava/model/llava_arch.py` (features replace the
placeholder).
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.models.convnext import modeling_convnext
from transformers.models.convnextv2 import modeling_convnextv2
from transformers.models.dinov3_convnext import modeling_dinov3_convnext
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_convllava import ConvLlavaConfig


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
CHECKPOINTED_BLOCKS = {
    modeling_convnext.ConvNextLayer: ConvNextLayer,
    modeling_convnextv2.ConvNextV2Layer: ConvNextV2Layer,
    modeling_dinov3_convnext.DINOv3ConvNextLayer: DINOv3ConvNextLayer,
}


def build_vision_tower(config: ConvLlavaConfig) -> PreTrainedModel:
    """Builds the tower of `config.vision_config`, without the weights that its map does not depend on.

    Args:
        config: the model's configuration.

    Returns:
        A model of transformers. Blocks support activation checkpointing. The layer norm over ConvNeXt's pooled output
        and the head of a timm model are identities: they never get a gradient, so DDP would stop at them, and the
        released checkpoints do not hold them.
    """
    # Convolutions have no attention; asking them for the text model's kernel (sdpa, flash) would be refused.
    tower = AutoModel.from_config(config.vision_config, attn_implementation="eager")
    for module in tower.modules():
        module.__class__ = CHECKPOINTED_BLOCKS.get(type(module), type(module))
    if config.vision_config.model_type == "timm_wrapper":
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
    """

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class ConvLlavaCausalLMOutputWithPast(ModelOutput):
    """Output of [`ConvLlavaForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): mean next-token cross-entropy in nats, with `labels`.
        logits (`torch.Tensor` of shape `(B, S, V)`): scores before the softmax.
        past_key_values (`Cache`, *optional*): keys and values of the language model.
        hidden_states, attentions (`tuple`, *optional*): of the language model, when asked for.
        image_hidden_states (`torch.Tensor` of shape `(sum of N over images, D)`, *optional*): projected features.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None


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


def set_trainable(model: nn.Module, patterns: list[str]) -> None:
    r"""Makes exactly the parameters trainable whose names match, and freezes all others.

    Args:
        model: any module.
        patterns: regular expressions, searched in the names of the parameters: `"multi_modal_projector"`,
            `r"vision_tower.*stages\.4\."`.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    found = find_names([name for name, _ in model.named_parameters()], patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found)


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
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if trainable is not None:
            set_trainable(loaded[0] if isinstance(loaded, tuple) else loaded, trainable)
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

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def _encode(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ModelOutput]:
        """Runs the tower on images of one size: `(I, 3, H, W)` to features `(I, N, C)` and the tower's own output."""
        if self.config.vision_config.model_type == "timm_wrapper":
            kwargs["do_pooling"] = False
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if features.ndim == 3:  # dinov3_convnext gives a normalised sequence that starts with its class token
            return features[:, 1:], outputs  # (I, N, C)
        return features.flatten(2).transpose(1, 2), outputs  # (I, C, h, w) -> (I, N, C)

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
            kwargs: `output_hidden_states=True` adds the tower's maps when all images have one size.

        Returns:
            `last_hidden_state`: the tower's features, `(I, N, C)` for images of one size, else `(sum of N, C)`.
            `pooler_output`: one tensor `(N_i, D)` of projected features per image.
            `hidden_states`: the tower's maps, if asked for.

        Raises:
            ValueError: a size that is no multiple of the downsampling factor, is larger than `pixel_values`, or a
                number of sizes that is not the number of images.
        """
        full = tuple(pixel_values.shape[-2:])
        sizes = (
            [full] * len(pixel_values)
            if image_sizes is None
            else [tuple(s) for s in torch.as_tensor(image_sizes).tolist()]
        )
        if not sizes or len(sizes) != len(pixel_values):
            raise ValueError(
                f"image_sizes has {len(sizes)} entries for {len(pixel_values)} images in pixel_values; expected at "
                "least one image, and one (height, width) per image."
            )
        for height, width in set(sizes):
            self.config.num_image_tokens(height, width)
            if height > full[0] or width > full[1]:
                raise ValueError(
                    f"image_sizes names an image of {height}x{width} pixels, larger than pixel_values of "
                    f"{full[0]}x{full[1]}; pass the image_sizes that the image processor gave with these pixel_values."
                )
        tower_kwargs = {key: kwargs[key] for key in ("output_hidden_states",) if kwargs.get(key) is not None}
        if len(set(sizes)) == 1:
            height, width = sizes[0]
            features, outputs = self._encode(pixel_values[..., :height, :width], **tower_kwargs)
            return BaseModelOutputWithPooling(
                last_hidden_state=features,
                pooler_output=tuple(self.multi_modal_projector(features)),
                hidden_states=outputs.hidden_states,
            )
        groups = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        features, projected = [None] * len(sizes), [None] * len(sizes)
        for (height, width), members in groups.items():
            group, _ = self._encode(pixel_values[members, :, :height, :width])
            for index, feature, embedding in zip(members, group, self.multi_modal_projector(group), strict=True):
                features[index], projected[index] = feature, embedding
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(features), pooler_output=tuple(projected))

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

    def _idle_vision_pass(self) -> torch.Tensor:
        """Zero, through the tower and the projector on one blank cell.

        In training with several processes every rank must join the collectives of the vision parameters, also one
        whose batch has no image: FSDP2 deadlocks and DDP stops otherwise.
        """
        side = self.config.downsampling_factor
        channels = getattr(self.config.vision_config, "num_channels", 3)
        blank = torch.zeros(1, channels, side, side, device=self.vision_tower.device)
        # Batch norms (of some timm towers) refuse to train on one cell, and must not learn from a blank.
        modes = {module: module.training for module in self.vision_tower.modules()}
        self.vision_tower.eval()
        features, _ = self._encode(blank)
        for module, mode in modes.items():
            module.training = mode
        return self.multi_modal_projector(features).sum() * 0.0

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
        vision_features: torch.FloatTensor | None = None,
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
            image_sizes: `(I, 2)` heights and widths in pixels.
            vision_features: `(sum of N, C)`, the tower's features of all images in reading order, in the place of
                `pixel_values`: the tower does not run.

        Returns:
            Hidden states `(B, S, D)` and what [`ConvLlavaModelOutputWithPast`] lists.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; placeholders that do not match the images.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, S, D)

        image_features = None
        if pixel_values is not None or vision_features is not None:
            if vision_features is None:
                image_features = self.get_image_features(pixel_values, image_sizes, return_dict=True).pooler_output
                image_features = torch.cat(image_features)  # (sum of N, D)
            else:
                weight = self.multi_modal_projector.linear_1.weight
                image_features = self.multi_modal_projector(vision_features.to(weight.device, weight.dtype))
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)  # (sum of N, D)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)  # (B, S, 1)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                inputs_embeds = inputs_embeds + self._idle_vision_pass().to(inputs_embeds.device, inputs_embeds.dtype)

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
        )


class ConvLlavaForConditionalGeneration(ConvLlavaPreTrainedModel, GenerationMixin):
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

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

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
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConvLlavaCausalLMOutputWithPast:
        r"""Next-token scores, and the loss with `labels`.

        Args:
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds, image_sizes:
                see [`ConvLlavaModel.forward`].
            labels: `(B, S)` token ids, -100 where no loss is taken (image placeholders included).
            logits_to_keep: compute scores for the last positions only; 0 keeps all.

        Returns:
            What [`ConvLlavaCausalLMOutputWithPast`] lists.

        Raises:
            ValueError: see [`ConvLlavaModel.forward`].

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
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (B, S, V)
        if self.config.text_logit_scale != 1.0:
            logits = logits * self.config.text_logit_scale
        if (softcap := getattr(self.config.text_config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if self.config.vocab_padding:
            logits[..., -self.config.vocab_padding :] = PADDED_ID_SCORE

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return ConvLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        """Repeats each row `expand_size` times (beams, samples) together with all images of that row.

        The images of a batch lie in one list over all rows, so repeating image by image would pair the second image of
        a row with the wrong text.
        """
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size == 1 or pixel_values is None:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        images = {key: model_kwargs.pop(key, None) for key in ("pixel_values", "image_sizes")}
        sizes = images["image_sizes"]
        if sizes is None:
            sizes = [tuple(pixel_values.shape[-2:])] * len(pixel_values)
        tokens_per_image = [self.config.num_image_tokens(int(height), int(width)) for height, width in sizes]
        if input_ids is None or input_ids.shape[1] == 0:
            raise ValueError(
                "inputs_embeds with pixel_values cannot be repeated for beams or several samples: which image belongs "
                "to which row is read off input_ids. Pass input_ids."
            )
        order, image = [], 0
        for tokens_in_row in (input_ids == self.config.image_token_id).sum(-1).tolist():
            row = []
            while tokens_in_row > 0 and image < len(tokens_per_image):
                tokens_in_row -= tokens_per_image[image]
                row.append(image)
                image += 1
            order.extend(row * expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        model_kwargs.update({key: value[order] for key, value in images.items() if value is not None})
        return input_ids, model_kwargs


__all__ = ["ConvLlavaForConditionalGeneration", "ConvLlavaModel", "ConvLlavaPreTrainedModel"]
