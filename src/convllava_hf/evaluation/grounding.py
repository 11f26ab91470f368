"""RefCOCO, RefCOCO+ and RefCOCOg: boxes as text, on the padded square and on the image, and their overlap.

Notation: a box is `(x1, y1, x2, y2)`; `h, w` are the pixels of an image. The models give fractions of the square that
an image is padded to, and the benchmarks have pixels of the image itself.
"""

import re
from collections import defaultdict

import numpy as np
from PIL import Image, ImageDraw

from .scores import Outcome, Score, score_means


PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {}."
PATTERN = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The first box of an answer as it stands there, or `None`.

    Source: alibaba/conv-llava, `llava/eval/evaluate_grounding.py`.
    """
    found = PATTERN.findall(text)
    try:
        return tuple(float(number) for number in found[0])
    except (IndexError, ValueError):
        return None


def place_box(box: tuple[float, float, float, float] | None, height: int, width: int) -> np.ndarray:
    """A box of an answer in pixels of the image, as the original computes it: float32, neither clipped nor ordered.

    Args:
        box: fractions of the square, or thousandths where they add up to 4 or more; `None` stands for zeros.
        height, width: of the image in pixels.

    Returns:
        Float32, (4,).

    Source: as above.
    """
    placed = np.array(box or (0, 0, 0, 0), dtype=np.float32)
    if placed.sum() >= 4:
        placed = placed / np.float32(1000)
    placed = placed * np.float32(max(height, width))
    if width > height:
        placed[1::2] -= (width - height) // 2
    elif height > width:
        placed[0::2] -= (height - width) // 2
    return placed


def pad_box(box, height: int, width: int) -> tuple[float, ...]:
    """The way back: pixels of the image to fractions of the padded square.

    Args:
        box: in pixels.
        height, width: of the image in pixels.
    """
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return tuple((number + shift) / side for number, shift in zip(box, (left, top, left, top), strict=True))


def measure_overlap(box: np.ndarray, target) -> float:
    """Intersection over union of two boxes in pixels, in float32 as torchvision computes it."""
    box, target = (np.asarray(value, dtype=np.float32) for value in (box, target))
    size = np.maximum(np.minimum(box[2:], target[2:]) - np.maximum(box[:2], target[:2]), 0)
    inside = size[0] * size[1]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, target)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(inside / (areas[0] + areas[1] - inside))


def score_refcoco(questions: list[dict], answers: list[str]) -> Score:
    """Share of boxes that overlap the target by at least half.

    The original takes a box whose corners are in the wrong order as it is; ours puts them in order.

    Args:
        questions: `bbox` (pixels), `width`, `height`, `sent`.
        answers: texts in the same order.

    Raises:
        ValueError: the numbers of questions and answers differ.

    Source: alibaba/conv-llava, `llava/eval/evaluate_grounding.py`.
    """
    if len(questions) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(questions)} questions; they belong together by their order.")
    problems, outcomes, per_sample = defaultdict(list), [], []
    for number, (question, text) in enumerate(zip(questions, answers, strict=True)):
        box = parse_box(text)
        if box is None:
            problems["answers without a box"].append(number)
        placed = place_box(box, question["height"], question["width"])
        overlap = measure_overlap(placed, question["bbox"])
        ordered = np.concatenate([np.minimum(placed[:2], placed[2:]), np.maximum(placed[:2], placed[2:])])
        ours = box is not None and measure_overlap(ordered, question["bbox"]) >= 0.5
        per_sample.append({"predicted_pixels": placed.tolist(), "iou": overlap, "correct": overlap >= 0.5})
        truth = str([round(value, 3) for value in pad_box(question["bbox"], question["height"], question["width"])])
        outcomes.append(Outcome(number, float(ours), float(overlap >= 0.5), text, truth))
    correct = sum(sample["correct"] for sample in per_sample)
    if not questions:
        return score_means({"error": "ZeroDivisionError: no answers"}, [], problems)
    original = {
        "precision_at_1": correct / len(questions),
        "correct": correct,
        "total": len(questions),
        "per_sample": per_sample,
    }
    return score_means(original, outcomes, problems)


def draw_boxes(image: Image.Image, boxes: dict[str, tuple]) -> Image.Image:
    """A copy of an image with boxes drawn on it.

    Args:
        image: RGB.
        boxes: colour -> box in pixels of the image; the parts outside are cut.
    """
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    width = max(2, round(max(image.size) / 200))
    for colour, (x1, y1, x2, y2) in boxes.items():
        xs = sorted(min(max(value, 0), image.width - 1) for value in (x1, x2))
        ys = sorted(min(max(value, 0), image.height - 1) for value in (y1, y2))
        draw.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=colour, width=width)
    return drawn
