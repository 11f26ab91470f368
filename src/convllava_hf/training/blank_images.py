"""Every rank runs the vision tower equally often: blank passes for those whose batch needs fewer than another's.

Sharded parameters (FSDP2, ZeRO-3) are gathered by all ranks together whenever a module runs; a rank that runs the tower
once less waits for the others for ever. DDP stops at parameters without a gradient. The tower runs once per size of a
batch's images, so text-only batches and batches of images in their own shapes differ from rank to rank.

ConvLLaVA runs idle passes by itself when it is told their number. For other models a blank image rides along, whose
placeholders attention does not see and the loss does not count: it changes no gradient. In a batch without padding it
is a row of its own.

Notation: `B` rows, `S` tokens per row.
"""

import torch
from PIL import Image as PILImage
from torch.nn.functional import pad
from transformers import PreTrainedConfig, ProcessorMixin

from ..model.modeling_convllava import count_vision_passes
from .collator import mark_rows


TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def count_passes(batch: dict, config: PreTrainedConfig) -> int:
    """How often a model runs its tower for a batch."""
    return count_vision_passes(batch) if config.model_type == "convllava" else int("pixel_values" in batch)


def add_passes(batch: dict, passes: int, processor: ProcessorMixin, config: PreTrainedConfig) -> dict:
    """Makes a model run its tower `passes` times for a batch.

    Args:
        batch: `input_ids`, `attention_mask`, `labels` `(B, S)`; or rows without padding, see `join_rows`.
        passes: of the rank that needs most; 1 where the model is no ConvLLaVA.
        processor: of the model.
        config: of the model.

    Returns:
        The batch with the number, or with a blank image where it had none, and with more columns where its padding does
        not hold the placeholders.
    """
    if config.model_type == "convllava":
        return {**batch, "vision_passes": passes}
    is_joined = "cu_seq_lens_q" in batch
    if count_passes(batch, config) or not (is_joined or "attention_mask" in batch):
        return batch
    blank = PILImage.new("RGB", (32, 32))
    images = processor(images=[blank], text=[processor.image_token], return_tensors="pt")
    count = (images["input_ids"] == config.image_token_id).sum().item()
    device = batch["input_ids"].device
    images = {key: value.to(device) for key, value in images.items() if key not in TEXT_KEYS}
    add = _add_row if is_joined else _add_placeholders
    return {**add(batch, count, config.image_token_id), **images}


def _add_columns(batch: dict, columns: int, input_ids: int = 0) -> dict:
    """Pads all tensors `(B, S)` on the right; labels with what carries no loss, the others with 0."""
    fill = {"input_ids": input_ids, "labels": -100}
    places = batch["input_ids"].shape
    return {
        key: pad(value, (0, columns), value=fill.get(key, 0))
        if isinstance(value, torch.Tensor) and value.shape == places
        else value
        for key, value in batch.items()
    }


def _add_row(batch: dict, count: int, image_token_id: int) -> dict:
    """Adds a row of placeholders at the end of rows that are joined without padding."""
    batch = _add_columns(batch, count, input_ids=image_token_id)
    batch["position_ids"][:, -count:] = torch.arange(count)
    return mark_rows(batch)


def _add_placeholders(batch: dict, count: int, image_token_id: int) -> dict:
    """Writes placeholders over the padding of a batch without images, and over new columns where that is too little."""
    rows = len(batch["input_ids"])
    lacking = count - (batch["attention_mask"] == 0).sum().item()
    batch = _add_columns(batch, max(0, -(-lacking // rows)))
    places = (batch["attention_mask"] == 0).flatten().nonzero().flatten()[:count]
    input_ids = batch["input_ids"].flatten().clone()
    input_ids[places] = image_token_id
    return {**batch, "input_ids": input_ids.view(rows, -1)}
