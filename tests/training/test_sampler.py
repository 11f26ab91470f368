"""Grouped batches: every row once, one modality and similar lengths per batch, the same order on every rank."""

import random

import pytest
from tiny_data import make_rows

from convllava_hf.training.sampler import ModalityLengthSampler, describe_long_rows, measure_lengths


RNG = random.Random(0)
LENGTHS = [RNG.randrange(20, 800) for _ in range(1003)]
HAS_IMAGES = [RNG.random() > 0.07 for _ in LENGTHS]


def get_batches(sampler, size):
    rows = list(sampler)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def test_every_row_once_and_one_modality_per_batch():
    sampler = ModalityLengthSampler(LENGTHS, HAS_IMAGES, 16, seed=1)
    batches = get_batches(sampler, 16)
    assert sorted(row for batch in batches for row in batch) == list(range(1003)) and len(sampler) == 1003
    mixed = [batch for batch in batches if len({HAS_IMAGES[row] for row in batch}) > 1]
    assert len(mixed) <= 2  # what is left over of both
    assert [len(batch) for batch in batches] == [16] * 62 + [11]


def test_padding_is_a_small_part_of_random_batches():
    def count_padding(batches):
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches) - sum(LENGTHS)

    grouped = count_padding(get_batches(ModalityLengthSampler(LENGTHS, HAS_IMAGES, 16), 16))
    rows = random.Random(2).sample(range(1003), 1003)
    assert grouped < 0.2 * count_padding([rows[i : i + 16] for i in range(0, 1003, 16)])


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = ModalityLengthSampler(LENGTHS, HAS_IMAGES, 16, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_longest_batch_comes_first():
    first, *others = get_batches(ModalityLengthSampler(LENGTHS, HAS_IMAGES, 16), 16)
    assert sum(LENGTHS[row] for row in first) >= max(sum(LENGTHS[row] for row in batch) for batch in others)


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (4, 4), (5, 4), (3, 1)])
def test_small_data(count, size):
    for has_images in ([True] * count, [False] * count, [bool(i % 2) for i in range(count)]):
        assert sorted(ModalityLengthSampler(list(range(count)), has_images, size)) == list(range(count))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from tiny_checkpoint import save_tiny_checkpoint
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))
    processor.image_processor.image_aspect_ratio = "native"
    return processor


def test_lengths_come_from_headers_without_decoding(monkeypatch, processor):
    rows = make_rows(6)
    from PIL import ImageFile

    def refuse(self):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    lengths, has_images = measure_lengths(rows, processor)
    assert has_images == [True, True, True, True, False, True]
    monkeypatch.undo()
    count = processor.image_processor.num_image_tokens
    for index, row in enumerate(rows):
        tokens = sum(count(image.height, image.width) for image in row["images"])
        assert lengths[index] == sum(len(message["content"]) for message in row["messages"]) // 4 + tokens


def test_lengths_come_from_the_builds_columns_without_reading_images(monkeypatch, processor):
    rows = make_rows(6)
    sizes = [[[image.height, image.width] for image in row["images"]] for row in rows]
    built = rows.add_column("image_sizes", sizes).add_column("text_tokens", list(range(6)))
    monkeypatch.setattr("convllava_hf.training.sampler.read_size", None)
    monkeypatch.setattr("convllava_hf.training.sampler.list_parts", None)
    lengths, has_images = measure_lengths(built, processor)
    count = processor.image_processor.num_image_tokens
    assert lengths == [index + sum(count(*size) for size in row) for index, row in enumerate(sizes)]
    assert has_images == [bool(row) for row in sizes]


def test_the_trainer_gives_the_sampler_columns_that_batches_do_not_need(monkeypatch, processor):
    """transformers removes them from what it hands to the sampler."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from convllava_hf.training.trainer import ConvLlavaTrainer

    rows = make_rows(6)
    sizes = [[[image.height, image.width] for image in row["images"]] for row in rows]
    built = rows.add_column("image_sizes", sizes).add_column("text_tokens", [5, 3, 1, 9, 2, 7])
    monkeypatch.setattr("convllava_hf.training.sampler.read_size", None)
    arguments = {"group_by_modality_length": True, "max_length": None, "train_batch_size": 1, "world_size": 1}
    arguments |= {
        "data_seed": None,
        "seed": 0,
        "train_sampling_strategy": "random",
        "main_process_first": lambda desc: nullcontext(),
    }
    trainer = SimpleNamespace(
        train_dataset=built, args=SimpleNamespace(**arguments), data_collator=SimpleNamespace(processor=processor)
    )
    sampler = ConvLlavaTrainer._get_train_sampler(trainer, rows)
    count = processor.image_processor.num_image_tokens
    images = [sum(count(*size) for size in row) for row in sizes]
    assert sampler.lengths == [text + image for text, image in zip([5, 3, 1, 9, 2, 7], images, strict=True)]


def test_rows_that_are_cut_are_named_and_those_that_cannot_be_stop(processor):
    from convllava_hf.tokens import count_image_tokens, tokenize_row

    rows = make_rows(6)
    exact = []
    for row in rows:
        sizes = [(image.height, image.width) for image in row["images"]]
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]
        messages[0]["content"] = [{"type": "image"}] * len(sizes) + messages[0]["content"]
        exact.append((len(tokenize_row(messages, sizes, processor)), sum(count_image_tokens(sizes, processor))))
    most = sorted(length for length, _ in exact)[3]
    lengths, has_images = measure_lengths(rows, processor, most)
    long = [row for row, (length, _) in enumerate(exact) if length > most]
    assert [lengths[row] for row in long] == [exact[row][0] for row in long] and long
    message = describe_long_rows(rows, lengths, has_images, processor, most)
    named = (f"{len(long)} rows ({', '.join(map(str, long))})", f"max_length={most}", f"{max(lengths)} tokens")
    assert all(value in message for value in named)
    assert describe_long_rows(rows, lengths, has_images, processor, max(lengths)) is None
    lengths, has_images = measure_lengths(rows, processor, 3)
    stuck = [row for row, (_, images) in enumerate(exact) if images]
    with pytest.raises(ValueError, match=rf"max_length=3 .*5 rows .{', '.join(map(str, stuck))}."):
        describe_long_rows(rows, lengths, has_images, processor, 3)


def test_broken_image_counts_as_one(processor):
    rows = make_rows(1)
    broken = rows.from_dict(
        {"messages": rows["messages"][:], "images": [[{"bytes": b"no image", "path": None}]]}, features=rows.features
    )
    assert measure_lengths(broken, processor)[1] == [True]
