"""What an image costs, and how it looks to the model: for the demonstration page.

Notation: `C, H, W` of pixels, `F` pixels a side of a cell.
"""

import json
import re
from functools import lru_cache

import torch
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModel, PreTrainedModel, ProcessorMixin


NUMBER = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


def show_cells(processor: ProcessorMixin, pixel_values: torch.Tensor, num_tokens: int) -> Image.Image:
    """The image as the model sees it, padded and resized, with a line around each cell, which is a token.

    Args:
        processor: of the model.
        pixel_values: `(1, C, H, W)`, normalised floats or bytes.
        num_tokens: tokens of the image.
    """
    pixels = pixel_values[0].cpu()  # (C, H, W)
    if pixels.dtype != torch.uint8:
        settings = processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
        pixels = ((pixels.float() * std + mean).clamp(0, 1) * 255).round().byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    cell = round((pixels.shape[1] * pixels.shape[2] / num_tokens) ** 0.5)
    draw = ImageDraw.Draw(picture)
    for x in (*range(0, picture.width, cell), picture.width - 1):
        draw.line([(x, 0), (x, picture.height)], fill=(255, 96, 0))
    for y in (*range(0, picture.height, cell), picture.height - 1):
        draw.line([(0, y), (picture.width, y)], fill=(255, 96, 0))
    return picture


def draw_boxes(picture: Image.Image, answer: str) -> Image.Image | None:
    """A picture with the boxes that an answer names as `[left, top, right, bottom]` from 0 to 1; `None` without any."""
    found = [tuple(map(float, numbers)) for numbers in BOX.findall(answer)]
    boxes = [box for box in found if 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1]
    if not boxes:
        return None
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    for box in boxes:
        corners = [share * side for share, side in zip(box, picture.size * 2, strict=True)]
        draw.rectangle(corners, outline=(0, 160, 255), width=max(2, picture.width // 150))
    return drawn


def count_operations(model: PreTrainedModel, height: int, width: int, num_tokens: int) -> tuple[float, float]:
    """TFLOP for an image, up to the first token: in the tower, and in the language model for the image's tokens.

    Args:
        model: the model.
        height, width: of the processed image in pixels.
        num_tokens: tokens of the image.
    """
    text = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    parameters -= model.get_input_embeddings().weight.numel()  # looked up, not multiplied
    attention = 4 * text.num_hidden_layers * text.hidden_size * num_tokens**2
    tower = _count_tower(model.config.vision_config.to_json_string(use_diff=False), height, width)
    return tower / 1e12, (2 * parameters * num_tokens + attention) / 1e12


def name_operations(tera: float) -> str:
    """A number of TFLOP in words, in the largest unit that leaves a number of at least 0.1."""
    for unit, scale in (("TFLOP", 1), ("GFLOP", 1e3)):
        if tera * scale >= 0.1:
            return f"{tera * scale:.3g} {unit}"
    return f"{tera * 1e6:.3g} MFLOP"


@lru_cache(maxsize=256)
def _count_tower(config: str, height: int, width: int) -> int:
    """Operations of the tower on one image, counted on tensors without content."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        settings = json.loads(config)
        tower = AutoModel.from_config(AutoConfig.for_model(**settings), attn_implementation="eager")
        pixels = torch.empty(1, 3, height, width, dtype=tower.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(pixels)
    return counter.get_total_flops()
