"""Answers that carry loss: the same tokens as transformers marks, in a fraction of the time."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin

from convllava_hf.shipped import list_chat_templates, read_chat_template
from convllava_hf.training.masks import mark_answers, mark_tokens, shift_spans


RNG = random.Random(0)
needs_place = pytest.mark.skipif(
    not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"),
    reason="this version of transformers marks answers in one piece with the rest, so nothing takes its place",
)


def mark_by_transformers(encoded: dict, answers: list) -> list:
    return ProcessorMixin._adjust_assistant_masks_indices(None, encoded, answers)["assistant_masks"]


def draw_row() -> tuple[list, list, list]:
    """Places of tokens with gaps, tokens of no width and padding; answers; placeholders that grow or shrink."""
    places, position = [], 0
    for _ in range(RNG.randrange(60)):
        position += RNG.choice([0, 0, 1])
        places.append((position, position := position + RNG.choice([0, 1, 1, 2, 3])))
    edges = sorted(RNG.randrange(80) for _ in range(2 * RNG.randrange(5)))
    replacements, end, gained = [], 0, 0
    for _ in range(RNG.randrange(3)):
        start = end + RNG.randrange(10)
        end, length = start + RNG.randrange(1, 5), RNG.randrange(1, 8)
        replacements.append({"span": (start, end), "new_span": (start + gained, start + gained + length)})
        gained += length - (end - start)
    return places + [(0, 0)] * 3, list(zip(edges[::2], edges[1::2], strict=True)), replacements


@needs_place
def test_random_rows_are_marked_as_by_transformers():
    for _ in range(100):
        places, answers, replacements = zip(*(draw_row() for _ in range(3)), strict=True)
        encoded = {"input_ids": places, "offset_mapping": places, "text_replacement_offsets": replacements}
        expected = mark_by_transformers({**encoded}, answers)
        assert mark_answers({**encoded}, list(answers))["assistant_masks"] == expected
        without = {key: value for key, value in encoded.items() if key != "text_replacement_offsets"}
        assert mark_answers({**without}, list(answers))["assistant_masks"] == mark_by_transformers({**without}, answers)


def test_spans_in_any_order_may_overlap():
    places = np.array([[0, 2], [2, 4], [4, 6], [6, 8], [8, 8]])
    assert mark_tokens(places, np.array([[5, 7], [0, 1], [5, 6]])).tolist() == [True, False, True, True, False]
    assert not mark_tokens(places, shift_spans([], [])).any()


@needs_place
@pytest.mark.parametrize("template", list_chat_templates())
def test_every_template_is_marked_as_by_transformers(template, converted):
    processor = AutoProcessor.from_pretrained(converted)
    text = lambda role, value: {"role": role, "content": [{"type": "text", "text": value}]}  # noqa: E731
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    asked = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Größe 日本?"}]}
    rows = [[asked, text("assistant", "Eins 😀.")]]
    if template != "plain":
        rows += [[text("user", "Q"), text("assistant", "A b c.")] * 3, [asked, text("assistant", "x")]]
    marked = []
    for replaced in (False, True):
        if replaced:
            processor._adjust_assistant_masks_indices = mark_answers
        encoded = processor.apply_chat_template(
            rows,
            chat_template=read_chat_template(template),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        marked.append(encoded["assistant_masks"])
    assert marked[0].any() and torch.equal(*marked) and marked[0].dtype == marked[1].dtype
