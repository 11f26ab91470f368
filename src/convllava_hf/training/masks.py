"""Which tokens of a conversation carry loss, from the characters that a chat template marks as answers.

Notation: `S` tokens of a row, `A` answers in it.

Source: transformers, `ProcessorMixin._adjust_assistant_masks_indices`, whose result this is. There every answer is
compared with every token in Python; here both are sorted and searched.
"""

import numpy as np


def mark_answers(encoded: dict, answers: list[list[tuple[int, int]]]) -> dict:
    """Replaces the places of tokens in the text by `assistant_masks`; takes the place of transformers' own method.

    Args:
        encoded: what a processor returns with `return_offsets_mapping` and `return_text_replacement_offsets`.
        answers: per row, the first character of every answer in the rendered text, and the one after its last.

    Returns:
        `encoded`, with a list of 0 and 1 per row as `assistant_masks`.
    """
    offsets = encoded.pop("offset_mapping")
    replacements = encoded.pop("text_replacement_offsets", None) or [[]] * len(answers)
    encoded["assistant_masks"] = [
        mark_tokens(np.asarray(places), shift_spans(spans, replaced)).astype(int).tolist()
        for places, spans, replaced in zip(offsets, answers, replacements, strict=True)
    ]
    return encoded


def shift_spans(spans: list[tuple[int, int]], replacements: list[dict]) -> np.ndarray:
    """Moves spans of the rendered text to where they are after placeholders were replaced before them.

    Args:
        spans: first character, and the one after the last.
        replacements: in order, `span` and `new_span` of each placeholder before and after.

    Returns:
        `(A, 2)`.
    """
    spans = np.array(spans, dtype=np.int64).reshape(-1, 2)  # (A, 2)
    ends = np.array([replaced["span"][1] for replaced in replacements], dtype=np.int64)
    gained = np.array([0] + [replaced["new_span"][1] - replaced["span"][1] for replaced in replacements])
    return spans + gained[np.searchsorted(ends, spans, side="right")]


def mark_tokens(places: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Whether each token has a character in any of the spans.

    Args:
        places: `(S, 2)`, the first character of every token, and the one after its last; both 0 for padding.
        spans: `(A, 2)`, in any order; they may overlap.

    Returns:
        Boolean, `(S,)`.
    """
    places, spans = places.reshape(-1, 2), spans[np.argsort(spans[:, 0], kind="stable")]
    # Of the spans that begin before a token ends, the one that reaches farthest.
    before = np.searchsorted(spans[:, 0], places[:, 1], side="left")  # (S,)
    reach = np.concatenate([[np.iinfo(np.int64).min], np.maximum.accumulate(spans[:, 1])])  # (A + 1,)
    return reach[before] > places[:, 0]
