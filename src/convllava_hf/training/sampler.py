"""Batches of similar rows: text-only rows apart from rows with images, and rows of similar length together.

A batch that mixes them pads every row to the longest, and a rank whose batch is short waits for the others.

Source of the idea: haotian-liu/LLaVA, `llava/train/llava_trainer.py` (`group_by_modality_length`). There a batch is
drawn from a group as large as itself; here from `POOL` of them, as transformers' `LengthGroupedSampler` does.
"""

import random
from collections.abc import Iterator

from datasets import Dataset
from torch.utils.data import Sampler

from ..images import COLUMNS, list_images, read_size, undecode_images
from ..tokens import count_image_tokens, list_parts, tokenize_row


POOL = 50  # global batches that are sorted by length together: more pads less and shuffles less
CHARACTERS_PER_TOKEN = 4  # English text; only the order of the lengths matters
DEFAULT_IMAGE_TOKENS = 576
SHOWN = 20  # rows that are named in a message


class ModalityLengthSampler(Sampler[int]):
    """Order of the rows in an epoch, so that consecutive batches hold one modality and similar lengths.

    The order depends on the seed and the epoch alone: it is the same on every rank and after a resumption.

    Args:
        lengths: tokens of every row, about.
        has_images: whether every row has an image.
        batch_size: rows of one step over all ranks; ranks take consecutive parts of it.
        seed: of the order.
    """

    def __init__(self, lengths: list[int], has_images: list[bool], batch_size: int, seed: int = 0):
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
        is_incomplete = bool(rest) and len(rest[-1]) < self.batch_size
        last = [rest.pop()] if is_incomplete else []  # must end the epoch
        batches += rest
        rng.shuffle(batches)
        if batches:  # what does not fit into memory shows at the first step
            longest = max(range(len(batches)), key=lambda i: sum(self.lengths[row] for row in batches[i]))
            batches.insert(0, batches.pop(longest))
        for batch in batches + last:
            yield from batch


class RowMeasure:
    """About how many tokens a row has, and exactly how many if they may be more than are kept.

    Args:
        processor: of the model; without one that tells tokens from sizes, every image counts 576 tokens.
        max_length: most tokens of a row that are trained on; `None` for all.
    """

    def __init__(self, processor=None, max_length: int | None = None):
        self.processor = processor if hasattr(processor, "_get_num_multimodal_tokens") else None
        self.max_length, self.image_tokens = max_length, {}
        self.overhead = 0
        if self.processor is not None and max_length is not None:
            round_ = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
            self.overhead = len(self.processor.apply_chat_template(round_, tokenize=False).encode())

    def __call__(self, row: dict) -> dict:
        sizes = self.list_sizes(row)
        tokens = sum(map(self.count_image, sizes))
        if row.get("text_tokens") is not None:
            length = row["text_tokens"] + tokens
        else:
            messages = list_parts(row["messages"], len(sizes))
            texts = [part.get("text") or "" for message in messages for part in message["content"]]
            length = sum(map(len, texts)) // CHARACTERS_PER_TOKEN + tokens
            # A token is a byte at least.
            most = sum(len(text.encode()) for text in texts) + self.overhead * len(messages) + tokens
            if self.overhead and most > self.max_length and None not in sizes:
                length = len(tokenize_row(messages, sizes, self.processor))
        return {"length": length, "has_images": bool(sizes)}

    def list_sizes(self, row: dict) -> list[tuple[int, int] | None]:
        """Heights and widths of a row's images in pixels: as the build wrote them, or from the images' headers."""
        if row.get("image_sizes") is not None:
            return [tuple(size) for size in row["image_sizes"]]
        sizes = []
        for image in list_images(row):
            try:
                sizes.append(read_size(image))
            except ValueError:  # the collator names the row when it comes to it
                sizes.append(None)
        return sizes

    def count_image(self, size: tuple[int, int] | None) -> int:
        if self.processor is None or size is None:
            return DEFAULT_IMAGE_TOKENS
        if size not in self.image_tokens:
            (self.image_tokens[size],) = count_image_tokens([size], self.processor)
        return self.image_tokens[size]

    def cuts_image(self, row: dict) -> bool:
        """Whether `max_length` ends inside or before an image of a row."""
        sizes = self.list_sizes(row)
        messages = list_parts(row["messages"], len(sizes))
        parts = [part for message in messages for part in message["content"]]
        last = max(index for index, part in enumerate(parts) if part["type"] == "image")
        most = sum(len((part.get("text") or "").encode()) for part in parts[:last])
        most += self.overhead * len(messages) + sum(map(self.count_image, sizes))
        if most <= self.max_length or None in sizes:
            return False
        ids = tokenize_row(messages, sizes, self.processor)
        return self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token) in ids[self.max_length :]


def measure_lengths(
    dataset: Dataset, processor=None, max_length: int | None = None, num_proc: int | None = None
) -> tuple[list[int], list[bool]]:
    """About how many tokens every row has, without decoding an image.

    From the columns that `convllava data build` writes; where they are missing, from characters and image headers.

    Args:
        dataset: columns `messages`, and `images` or `image`.
        processor, max_length: see `RowMeasure`.
        num_proc: processes.

    Returns:
        Lengths, exact where they are more than `max_length`, and whether the rows have images.
    """
    dataset = _keep_columns(dataset, "text_tokens" if "text_tokens" in dataset.column_names else "messages")
    measured = dataset.map(
        RowMeasure(processor, max_length),
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc="Measuring rows",
        load_from_cache_file=True,
    )
    return list(measured["length"]), list(measured["has_images"])


def _keep_columns(dataset: Dataset, text: str) -> Dataset:
    """A column that tells the text of the rows, and those that tell the sizes of their images."""
    images = ["image_sizes"] if "image_sizes" in dataset.column_names else COLUMNS
    return undecode_images(dataset.select_columns([text, *(name for name in images if name in dataset.column_names)]))


def describe_long_rows(
    dataset: Dataset, lengths: list[int], has_images: list[bool], processor, max_length: int | None
) -> str | None:
    """Says which rows are cut; arguments as above.

    Returns:
        A sentence with the rows' numbers; `None` where no row is cut.

    Raises:
        ValueError: rows that cannot be cut, because an image would be.
    """
    measure = RowMeasure(processor, max_length)
    if max_length is None or measure.processor is None:
        return None
    long = [row for row, length in enumerate(lengths) if length > max_length]
    with_images = [row for row in long if has_images[row]]
    rows = _keep_columns(dataset.select(with_images), "messages")
    if stuck := [number for number, row in zip(with_images, rows, strict=True) if measure.cuts_image(row)]:
        raise ValueError(
            f"max_length={max_length} would cut an image of {_name_rows(stuck)}: raise max_length, give images fewer "
            "tokens (image_size), or leave the rows out."
        )
    if not long:
        return None
    return (
        f"{_name_rows(long)} of {len(lengths):,} are longer than max_length={max_length} and lose their end; the "
        f"longest has {max(lengths):,} tokens. `convllava data build --max-length` cuts whole rounds instead."
    )


def _name_rows(numbers: list[int]) -> str:
    more = f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else ""
    return f"{len(numbers):,} rows ({', '.join(map(str, numbers[:SHOWN]))}{more})"
