"""Batches of similar rows: text-only rows apart from rows with images, and rows of similar length together.

A batch that mixes them pads every row to the longest, and a rank whose batch is short waits for the others.

Source of the idea: haotian-liu/LLaVA, `llava/train/llava_trainer.py` (`group_by_modality_length`). There a batch is
drawn from a group as large as itself; here from `POOL` of them, as transformers' `LengthGroupedSampler` does.
"""

import random
from collections.abc import Iterator

from datasets import Dataset
from torch.utils.data import Sampler

from ..images import list_images, read_size, undecode_images


POOL = 50  # global batches that are sorted by length together: more pads less and shuffles less
CHARACTERS_PER_TOKEN = 4  # English text; only the order of the lengths matters
DEFAULT_IMAGE_TOKENS = 576


class ModalityLengthSampler(Sampler[int]):
    """Order of the rows in an epoch, so that consecutive batches hold one modality and similar lengths.

    The order depends on the seed and the epoch alone: it is the same on every rank and after a resumption.

    Args:
        lengths: tokens of every row, about.
        has_images: whether every row has an image.
        batch_size: rows of one step over all ranks; ranks take consecutive parts of it.
        seed: of the order.

    Raises:
        ValueError: lists of different lengths, or a batch size below 1.
    """

    def __init__(self, lengths: list[int], has_images: list[bool], batch_size: int, seed: int = 0):
        if len(lengths) != len(has_images) or batch_size < 1:
            raise ValueError(
                f"got {len(lengths)} lengths, {len(has_images)} modalities and batch_size={batch_size}; expected "
                "one of each per row, and a batch size of at least 1."
            )
        self.lengths, self.has_images, self.batch_size, self.seed = lengths, has_images, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        rows = rng.sample(range(len(self)), len(self))
        batches, rest = [], []
        for modality in (True, False):
            members = [row for row in rows if self.has_images[row] == modality]
            for start in range(0, len(members), POOL * self.batch_size):
                pool = sorted(members[start : start + POOL * self.batch_size], key=lambda row: -self.lengths[row])
                whole = len(pool) // self.batch_size * self.batch_size
                batches += [pool[i : i + self.batch_size] for i in range(0, whole, self.batch_size)]
                rest += pool[whole:]
        rest = [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]
        last = (
            [rest.pop()] if rest and len(rest[-1]) < self.batch_size else []
        )  # an incomplete batch must end the epoch
        batches += rest
        rng.shuffle(batches)
        if batches:  # what does not fit into memory shows at the first step
            longest = max(range(len(batches)), key=lambda i: sum(self.lengths[row] for row in batches[i]))
            batches.insert(0, batches.pop(longest))
        for batch in batches + last:
            yield from batch


def measure_lengths(
    dataset: Dataset, image_processor=None, num_proc: int | None = None
) -> tuple[list[int], list[bool]]:
    """About how many tokens every row has, without decoding an image: from characters, and sizes in image headers.

    Args:
        dataset: columns `messages`, and `images` or `image`.
        image_processor: has `num_image_tokens(height, width)`; without that, every image counts 576 tokens.
        num_proc: processes.

    Returns:
        Lengths, and whether the rows have images.
    """
    dataset = undecode_images(dataset)
    count_tokens = getattr(image_processor, "num_image_tokens", None)

    def measure(row: dict) -> dict:
        characters = 0
        for message in row["messages"]:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
            characters += sum(map(len, parts))
        tokens = sum(_count_image_tokens(image, count_tokens) for image in list_images(row))
        return {"length": characters // CHARACTERS_PER_TOKEN + tokens, "has_images": tokens > 0}

    measured = dataset.map(
        measure,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc="Measuring rows",
        load_from_cache_file=True,
    )
    return list(measured["length"]), list(measured["has_images"])


def _count_image_tokens(image: dict, count_tokens) -> int:
    """Tokens of an undecoded image of `datasets`, from its header; the default where it cannot be read."""
    if count_tokens is None:
        return DEFAULT_IMAGE_TOKENS
    try:
        return count_tokens(*read_size(image))
    except ValueError:  # the collator names the row when it comes to it
        return DEFAULT_IMAGE_TOKENS
