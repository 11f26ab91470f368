"""Pages of real handwritten digits and drawn shapes, with questions whose answers are known.

A page is a 128 x 128 RGB picture of four cells, two rows of two. A cell is empty, or holds one of scikit-learn's 1,797
handwritten digits (real scans, 8 x 8 pixels, shipped inside the package, so no download), or a drawn shape. Every
object is moved, scaled, turned and tinted at random, so no two pages are alike.

The split is by image, and for digits by handwriting too: a scan of the test split occurs on no training page. All
randomness comes from one seed.
"""

import hashlib
import math
import random
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits


PAGE_SIZE = 128  # pixels; with the downsampling of 64 a page becomes 2 x 2 image tokens
CELL_SIZE = 64  # pixels
CELLS = ("top left", "top right", "bottom left", "bottom right")  # the order of the image tokens
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (235, 200, 30),
    "purple": (140, 50, 170),
}
KINDS = ("number", "digit", "shape", "count", "mixed", "mixed")
IMAGE_TASKS = ("number", "digit", "shape", "colour", "position", "count")
TASKS = (*IMAGE_TASKS, "text")
SPLIT_SHARES = {"train": 0.75, "validation": 0.08, "test": 0.17}


@dataclass(frozen=True)
class Thing:
    """What one cell holds: a digit (`colour` is None, `scan` its row in scikit-learn's table) or a coloured shape."""

    name: str
    colour: str | None = None
    scan: int | None = None

    @property
    def is_digit(self) -> bool:
        return self.colour is None

    def __str__(self) -> str:
        return self.name if self.is_digit else f"{self.colour} {self.name}"


@dataclass
class Page:
    """Four cells and how they look. `style` seeds position, size, angle and tint, so a page draws the same each time.

    Args:
        things: four entries in the order of `CELLS`; None is an empty cell.
        numbers: True when each row is to be read as a two-digit number.
        style: any integer.
    """

    things: tuple[Thing | None, ...]
    kind: str
    style: int
    scans: np.ndarray = field(repr=False)

    @cached_property
    def image(self) -> Image.Image:
        """The drawn page: RGB, 128 x 128 pixels."""
        rng = random.Random(self.style)
        paper = tuple(rng.randint(238, 255) for _ in range(3))
        image = Image.new("RGB", (PAGE_SIZE, PAGE_SIZE), paper)
        for index, thing in enumerate(self.things):
            if thing is not None:
                draw_thing(image, thing, self.scans, CELL_SIZE * (index % 2), CELL_SIZE * (index // 2), rng)
        return image

    @cached_property
    def jpeg(self) -> bytes:
        """The page as a JPEG file; encoding PNG would take ten times as long."""
        buffer = BytesIO()
        self.image.save(buffer, "JPEG", quality=92)
        return buffer.getvalue()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the pixels; the splits share none."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    @property
    def words(self) -> str:
        """The cells in words, in the order of the image tokens: what a text-only row has in place of the picture."""
        return ", ".join(str(thing or "nothing") for thing in self.things)


def draw_thing(image: Image.Image, thing: Thing, scans: np.ndarray, left: int, top: int, rng: random.Random) -> None:
    """Draw one digit or shape into the 64 x 64 cell of `image` whose corner is (`left`, `top`) in pixels."""
    size = rng.uniform(44, 54) if thing.is_digit else rng.uniform(34, 52)
    slack = (CELL_SIZE - size) / 2
    x = left + CELL_SIZE / 2 + rng.uniform(-slack, slack)
    y = top + CELL_SIZE / 2 + rng.uniform(-slack, slack)
    if thing.is_digit:
        angle, shear = math.radians(rng.uniform(-8, 8)), rng.uniform(-0.1, 0.1)
        width = size * rng.uniform(0.85, 1.0)
        # Image.transform wants the inverse map: from pixels of the cell to pixels of the 8 x 8 scan.
        a, b = math.cos(angle) * 8 / width, (math.sin(angle) + shear) * 8 / width
        c, d = -math.sin(angle) * 8 / size, math.cos(angle) * 8 / size
        px, py = x - left, y - top
        coefficients = (a, b, 4 - a * px - b * py, c, d, 4 - c * px - d * py)
        mask = Image.fromarray(scans[thing.scan])
        mask = mask.transform((CELL_SIZE, CELL_SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
        ink = tuple(rng.randint(0, 60) for _ in range(3))
        image.paste(ink, (left, top), mask)
        return
    colour = tuple(min(255, max(0, value + rng.randint(-20, 20))) for value in COLOURS[thing.colour])
    radius, angle = size / 2, rng.uniform(-0.25, 0.25)
    draw = ImageDraw.Draw(image)
    if thing.name == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        outline = OUTLINES[thing.name]
        draw.polygon(
            [(x + radius * r * math.cos(t + angle), y + radius * r * math.sin(t + angle)) for r, t in outline],
            fill=colour,
        )


def _outline(*points: tuple[float, float]) -> list[tuple[float, float]]:
    """Corners (x, y) in units of the radius, as polar coordinates, which a rotation only shifts."""
    return [(math.hypot(x, y), math.atan2(y, x)) for x, y in points]


OUTLINES = {
    "square": _outline((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": _outline((0, -1), (0.95, 0.8), (-0.95, 0.8)),
    "star": [((1.05, 0.45)[k % 2], math.pi * (k / 5 - 0.5)) for k in range(10)],
    "cross": _outline(
        *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
        *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    ),
}


def split_scans(seed: int) -> dict[str, dict[str, list[int]]]:
    """Deal scikit-learn's digits out to the splits, digit by digit, so that no scan is in two of them.

    Returns:
        For each split and each digit "0" to "9" the rows of scikit-learn's table.
    """
    labels = load_digits().target
    splits = {split: {} for split in SPLIT_SHARES}
    rng = random.Random(f"scans {seed}")
    for digit in range(10):
        rows = [int(row) for row in np.flatnonzero(labels == digit)]
        rng.shuffle(rows)
        start = 0
        for split, share in SPLIT_SHARES.items():
            stop = len(rows) if split == "test" else start + round(share * len(rows))
            splits[split][str(digit)] = rows[start:stop]
            start = stop
    return splits


def make_pages(split: str, count: int, seed: int, kinds=KINDS) -> list[Page]:
    """Draw up `count` pages of one split; one in five is a page of numbers."""
    rng = random.Random(f"pages {split} {seed}")
    scans_of = split_scans(seed)[split]
    scans = (load_digits().images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    pages = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        cells = [None] * 4

        def draw_digit() -> Thing:
            digit = rng.choice("0123456789")
            return Thing(digit, scan=rng.choice(scans_of[digit]))

        if kind == "number":
            row = rng.randrange(2)
            cells[2 * row], cells[2 * row + 1] = draw_digit(), draw_digit()
        elif kind == "digit":
            cells[rng.randrange(4)] = draw_digit()
        elif kind == "mixed":
            for cell in range(4):
                if rng.random() < 0.9:
                    is_digit = rng.random() < 0.5
                    cells[cell] = (
                        draw_digit() if is_digit else Thing(rng.choice(SHAPES), colour=rng.choice(list(COLOURS)))
                    )
        else:
            filled = rng.sample(range(4), 1 if kind == "shape" else rng.randint(1, 4))
            for cell in filled:
                cells[cell] = Thing(rng.choice(SHAPES), colour=rng.choice(list(COLOURS)))
        pages.append(Page(tuple(cells), kind, rng.getrandbits(48), scans))
    return pages


def caption(page: Page) -> str:
    """Everything on the page, cell by cell: what stage 1 learns from."""
    return ", ".join(f"{cell} {thing or 'nothing'}" for cell, thing in zip(CELLS, page.things, strict=True))


def ask(page: Page, task: str, rng: random.Random) -> tuple[str, str] | None:
    """One question of `task` with its answer, or None where the page has nothing to ask about.

    Args:
        page: what the question is about.
        task: one of `IMAGE_TASKS`.
        rng: picks among the possible questions.
    """
    if task not in IMAGE_TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(IMAGE_TASKS)}")
    things = [(cell, thing) for cell, thing in zip(CELLS, page.things, strict=True) if thing]
    if page.kind == "mixed":
        return None
    cell, thing = things[0]
    if task == "number" and page.kind == "number":
        return "Which number is on the page?", "".join(thing.name for _, thing in things)
    if task == "digit" and page.kind == "digit":
        return "Which digit is on the page?", thing.name
    if task == "shape" and page.kind == "shape":
        return "Which shape is on the page?", thing.name
    if task == "colour" and page.kind == "shape":
        return f"Which colour is the {thing.name}?", thing.colour
    if task == "position" and page.kind in ("shape", "digit"):
        return f"Where is the {thing.name if page.kind == 'shape' else 'digit'}?", cell
    if task == "count" and page.kind == "count":
        return "How many shapes are there?", str(len(things))
    return None


def ask_in_words(page: Page, rng: random.Random) -> tuple[str, str]:
    """A question that needs no picture: about a page that is written out in words."""
    tasks = rng.sample(IMAGE_TASKS, len(IMAGE_TASKS))
    question, answer = next(filter(None, (ask(page, task, rng) for task in tasks)))
    return f"{page.words}. {question}", answer
