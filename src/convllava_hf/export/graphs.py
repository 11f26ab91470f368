"""A checkpoint as three modules that can be traced: embeddings, image encoder, decoder with its cache.

Notation: see `inference.runtime`, which runs them. transformers' exporters trace and translate; what is here says where
to cut, which sizes vary, and what is refused before any work.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..checkpoints.weight_maps import ConversionError


# What varies from call to call; `AUTO` lets torch find out how sizes depend on each other.
VARIES = Dim.AUTO


@dataclass
class TracedPart:
    """One graph to be: the module, inputs to trace it with, and which of their sizes vary."""

    module: nn.Module
    inputs: dict
    dynamic_shapes: dict


class TokenEmbeddings(nn.Module):
    """`input_ids` (B, S) to `inputs_embeds` (B, S, D)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.embeddings = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.embeddings(input_ids)}


class ImageEncoder(nn.Module):
    """`pixel_values` (I, 3, H, W) to `image_features` (I, N, D): the tower and the projector.

    `get_image_features` of both classes ends in a tuple with an entry per image, whose number must not be fixed; so the
    projector is run on what it is run on there.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.config, self.vision_tower = model.config, model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.convolutional = model.config.model_type == "convllava"
        self.encode = [model.model._encode] if self.convolutional else []  # in a list it is no submodule

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.convolutional:
            features, _ = self.encode[0](pixel_values)  # (I, N, C)
        else:
            maps = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
            layers = self.config.vision_feature_layer
            first = int(self.config.vision_feature_select_strategy == "default")  # without the class token
            layers = [layers] if isinstance(layers, int) else layers
            features = torch.cat([maps[layer][:, first:] for layer in layers], dim=-1)  # (I, N, C)
        return {"image_features": self.projector(features)}


class DecoderWithCache(nn.Module):
    """Embeddings and the cache so far to scores of the last position and the longer cache.

    The model's own forward runs, so scale, soft cap and padded ids of the scores are what they are there.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.config, self.model = model.config, model

    def forward(self, inputs_embeds, attention_mask, position_ids, past_key_values) -> dict[str, torch.Tensor]:
        cache = DynamicCache()
        for index in range(len(past_key_values)):
            layer = DynamicLayer()
            layer.lazy_initialization(past_key_values[str(index)]["key"], past_key_values[str(index)]["value"])
            layer.keys, layer.values = past_key_values[str(index)]["key"], past_key_values[str(index)]["value"]
            cache.layers.append(layer)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        present = {str(i): {"key": layer.keys, "value": layer.values} for i, layer in enumerate(cache.layers)}
        return {"logits": outputs.logits, "present": present}


def check_exportable(model: PreTrainedModel) -> None:
    """Refuses what the graphs cannot hold, before anything is traced.

    Args:
        model: may be on the device `meta`.

    Raises:
        ConversionError: the language model keeps something else than keys and values.
    """
    text = model.config.get_text_config()
    types = {type(layer).__name__ for layer in DynamicCache(config=text).layers}
    # Layers with a sliding window hold keys and values too, and the mask does what their window does.
    if model._is_stateful or types - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise ConversionError(
            f"text_config.model_type={text.model_type!r} cannot be exported: its cache has {', '.join(sorted(types))}; "
            "expected layers of keys and values, as of llama, qwen3 or phi."
        )


@torch.no_grad()
def split_model(model: PreTrainedModel, side: int, variable: bool, largest: int | None = None) -> dict[str, TracedPart]:
    """Cuts a model into the parts of `inference.runtime.GRAPHS`.

    Args:
        model: from `inference.load`, on the CPU, in float32.
        side: of a square image in pixels.
        variable: whether the tower takes every multiple of `side`.
        largest: the longest of them; `None` for no limit.

    Returns:
        The parts by name.
    """
    embeddings = model.get_input_embeddings()
    rows, length, past = 2, 3, 5  # sizes of 0 and 1 would be taken for constants
    inputs_embeds = embeddings(torch.arange(rows * length).reshape(rows, length))  # (B, S, D)
    cache = model(inputs_embeds=torch.cat([inputs_embeds] * 2, dim=1)[:, :past], use_cache=True).past_key_values
    if any(layer.keys.shape[2] != past for layer in cache.layers):
        raise ConversionError(
            f"text_config.model_type={model.config.get_text_config().model_type!r} cannot be exported: its cache does "
            "not hold one key per token and layer."
        )
    pairs = {str(i): {"key": layer.keys, "value": layer.values} for i, layer in enumerate(cache.layers)}
    variable = variable and (largest is None or largest > 2 * side)  # a range of one size is a constant, too
    height, width = (2 * side, 3 * side) if variable else (largest or side, largest or side)
    rows_vary = {0: VARIES, 1: VARIES}
    # As multiples, else every stage's rounding down is carried along: minutes for a small tower.
    sides = {
        2 + axis: side * Dim(name, max=largest and largest // side) for axis, name in enumerate(("height", "width"))
    }
    return {
        "embed_tokens": TracedPart(
            TokenEmbeddings(model),
            {"input_ids": torch.zeros(rows, length, dtype=torch.long)},
            {"input_ids": rows_vary},
        ),
        "vision_encoder": TracedPart(
            ImageEncoder(model),
            {"pixel_values": torch.rand(2, 3, height, width)},
            {"pixel_values": {0: VARIES} | (sides if variable else {})},
        ),
        "decoder_model_merged": TracedPart(
            DecoderWithCache(model),
            {
                "inputs_embeds": inputs_embeds,
                "attention_mask": torch.ones(rows, past + length, dtype=torch.long),
                "position_ids": torch.arange(past, past + length).expand(rows, -1),
                "past_key_values": pairs,
            },
            {
                "inputs_embeds": rows_vary,
                "attention_mask": rows_vary,
                "position_ids": rows_vary,
                "past_key_values": {
                    index: {kind: {0: VARIES, 2: VARIES} for kind in pair} for index, pair in pairs.items()
                },
            },
        ),
    }
