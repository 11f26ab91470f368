"""Batches of rows of images and text: long rows are cut without cutting images, and a row that is wrong is named.

Notation: `B` rows of a batch, `S` tokens per row, `T` tokens of all rows without padding, `I` images of a batch,
`H, W` pixels.
"""

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..images import COLUMNS, GetSize, decode_image, list_images
from ..model.modeling_convllava import count_vision_passes
from .masks import mark_answers
from .vision_cache import CachedImageProcessor, VisionCache, make_stand_in


logger = logging.get_logger(__name__)


@dataclass
class ConvLlavaCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, which cuts long rows without cutting images and names the row where something is wrong.

    Args:
        max_tokens: longest row; `None` cuts nothing. (TRL's `max_length` also cuts through images.)
        image_token_id: id of the placeholder.
        raw_pixels: leave `pixel_values` as bytes, 0 to 255.
        draft: shrink large JPEG photos while they are decoded, see `load_image`.
        vision_cache: give features of the tower instead of pixels; images must come undecoded.
        padding_free: join all rows to one without padding, see `join_rows`.
        counts_passes: add `vision_passes` for the model, which would else read the images' sizes from the device.

    Raises:
        ValueError: a row whose images do not fit into `max_tokens`, or that cannot be prepared.
    """

    max_tokens: int | None = None
    image_token_id: int | None = None
    raw_pixels: bool = False
    vision_cache: VisionCache | None = None
    draft: GetSize | None = None
    padding_free: bool = False
    counts_passes: bool = False
    is_cached: bool = field(default=False, init=False)

    def __post_init__(self):
        self.processor = copy.copy(self.processor)
        self.processor._adjust_assistant_masks_indices = mark_answers
        if self.vision_cache is not None:
            self.processor.image_processor = CachedImageProcessor(self.processor.image_processor, self.vision_cache)
            self.vision_cache = None
            self.is_cached = True
        elif self.raw_pixels:
            self.processor = copy.deepcopy(self.processor)
            self.processor.image_processor.do_rescale = self.processor.image_processor.do_normalize = False

    def torch_call(self, examples: list[dict]) -> dict:
        """Prepares a batch: `input_ids`, `attention_mask`, `labels` `(B, S)`, `pixel_values` `(I, 3, H, W)`, ...

        With `padding_free` what is `(B, S)` is `(1, T)`, and `position_ids` are in the place of the mask.
        """
        examples = [self._prepare_images(example) for example in examples]
        try:
            batch = super().torch_call(examples)
        except (ValueError, OSError) as error:
            for example in examples:
                try:
                    super().torch_call([example])
                except (ValueError, OSError) as cause:
                    raise ValueError(f"cannot prepare {describe_row(example)}: {cause}") from cause
            raise error
        self._cut(batch, examples)
        if self.counts_passes:
            batch["vision_passes"] = count_vision_passes(batch)
        for example, labels in zip(examples, batch["labels"], strict=True):
            if not (labels != -100).any():
                logger.warning(f"no token to train on in {describe_row(example)}; it only takes time.")
        return join_rows(batch) if self.padding_free else batch

    def _prepare_images(self, example: dict) -> dict:
        """Decodes the images of a row, which come as bytes or path, or lets pictures of one pixel stand for them."""
        if not set(COLUMNS) & example.keys():
            return example
        original_rgb = getattr(self.processor.image_processor, "original_rgb", False)
        decode = partial(decode_image, original_rgb=original_rgb, draft=self.draft)
        decode = make_stand_in if self.is_cached else decode
        try:
            images = [decode(image) for image in list_images(example)]
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read an image of {describe_row(example)}: {error}") from error
        return {**{key: value for key, value in example.items() if key not in COLUMNS}, "images": images}

    def _cut(self, batch: dict, examples: list[dict]) -> None:
        """Cuts the batch to `max_tokens` columns; padding is on the right."""
        length = batch["input_ids"].shape[1]
        if self.max_tokens is None or length <= self.max_tokens:
            return
        cut_images = (batch["input_ids"][:, self.max_tokens :] == self.image_token_id).any(1)
        for example, is_cut in zip(examples, cut_images.tolist(), strict=True):
            if is_cut:
                raise ValueError(
                    f"max_length={self.max_tokens} would cut an image of {describe_row(example)}: raise max_length, "
                    "give images fewer tokens (image_size), or leave the row out."
                )
        for key, value in batch.items():
            if isinstance(value, torch.Tensor) and value.shape[:2] == (len(examples), length):
                batch[key] = value[:, : self.max_tokens]


def join_rows(batch: dict) -> dict:
    """Joins the rows of a padded batch to one without padding, in which every row attends to itself alone.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, other tensors `(B, S)`; what belongs to images stays as it is.

    Returns:
        The batch with tensors `(1, T)`, `position_ids` that start at 0 in each row, and what `mark_rows` adds. A row's
        first token carries no label: the token before it belongs to another row.
    """
    kept = batch["attention_mask"].bool()  # (B, S)
    joined = {
        key: value[kept][None] if isinstance(value, torch.Tensor) and value.shape == kept.shape else value
        for key, value in batch.items()
        if key != "attention_mask"
    }
    joined["position_ids"] = (kept.cumsum(1) - 1)[kept][None]  # (1, T)
    joined["labels"][joined["position_ids"] == 0] = -100
    return mark_rows(joined)


def mark_rows(batch: dict) -> dict:
    """Adds where rows begin, in the form that flash attention takes.

    Args:
        batch: `position_ids` `(1, T)`.

    Returns:
        The batch with `cu_seq_lens_q` and `cu_seq_lens_k`, `(B + 1,)`, and the longest row as `max_length_q` and
        `max_length_k`.
    """
    places = batch["position_ids"][0]
    starts = (places == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(places)])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {
        **batch,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def describe_row(example: dict) -> str:
    """A row by the beginning of its first message, and its number of images."""
    content = (example.get("messages") or example.get("prompt") or [{}])[0]
    content = content.get("content", "") if isinstance(content, dict) else content
    if not isinstance(content, str):
        content = " ".join(part.get("text") or "" for part in content)
    return f"the row that begins {content[:60]!r} ({len(list_images(example))} images)"
