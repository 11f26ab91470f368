"""Draws the pictures of docs/concepts.md: `python docs/draw_pictures.py` writes them into docs/pictures."""

from pathlib import Path


FOLDER = Path(__file__).with_name("pictures")
# Readable on light and on dark ground.
INK, DIM, BLUE, GREY, GREEN, PAPER = "#3b4657", "#7a8699", "#4f7bea", "#c9d1dd", "#3f9d6b", "#f4f6fa"


def wrap(width: int, height: int, title: str, body: str) -> str:
    """A picture on its own ground, with a title for those who do not see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-size="13" '
        f'font-family="system-ui, sans-serif">\n<title>{title}</title>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n{body}</svg>\n'
    )


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>\n'


def text(x: float, y: float, words: str, anchor: str = "middle", fill: str = INK, size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">{words}</text>\n'


def grid(x: float, y: float, width: float, height: float, columns: int, rows: int) -> str:
    """Lines of a grid, at most a few."""
    lines = [f"M{x + width * i / columns:g} {y:g}v{height:g}" for i in range(columns + 1)]
    lines += [f"M{x:g} {y + height * i / rows:g}h{width:g}" for i in range(rows + 1)]
    return f'<path d="{"".join(lines)}" stroke="{BLUE}" stroke-width="0.6" fill="none"/>\n'


def draw_tokens() -> str:
    """How an image of 1536 pixels shrinks to 24 x 24 cells."""
    body, x = "", 30.0
    stages = [("image", 1536, 3), *((f"stage {i}", 1536 // 2 ** (i + 1), 192 * 2 ** (i - 1)) for i in range(1, 6))]
    for name, cells, channels in stages:
        side = 40 + 80 * cells**0.5 / 1536**0.5
        body += box(x, 150 - side, side, side, "#ffffff", BLUE)
        body += grid(x, 150 - side, side, side, *[max(2, round(24 * cells**0.3 / 1536**0.3))] * 2)
        body += text(x + side / 2, 172, name)
        body += text(x + side / 2, 190, f"{cells} x {cells}", fill=DIM, size=12)
        body += text(x + side / 2, 206, "pixels" if name == "image" else f"{channels} wide", fill=DIM, size=12)
        x += side + 30
    body += text(x - 10, 118, "24 x 24 =", "start")
    body += text(x - 10, 138, "576 tokens", "start", BLUE, 15)
    return wrap(round(x) + 90, 226, "A 1536 pixel image becomes 576 tokens in five stages", body)


def draw_stages() -> str:
    """What each training stage changes."""
    parts = ["vision 1-2", "vision 3-4", "vision 5", "projector", "language model"]
    trained = {
        "stage 1: the new parts": {"vision 5", "projector"},
        "stage 2: seeing and reading": {"vision 3-4", "vision 5", "projector", "language model"},
        "stage 3: instructions": {"projector", "language model"},
    }
    body = ""
    for column, part in enumerate(parts):
        body += text(255 + 115 * column, 30, part)
    for row, (name, changed) in enumerate(trained.items()):
        y = 46 + 46 * row
        body += text(16, y + 22, name, "start")
        for column, part in enumerate(parts):
            body += box(202 + 115 * column, y, 106, 34, GREEN if part in changed else GREY)
            state, ink = ("trained", "#ffffff") if part in changed else ("frozen", INK)
            body += text(255 + 115 * column, y + 22, state, fill=ink)
    return wrap(790, 196, "What is trained and what is frozen in each stage", body)


def draw_aspect_ratio() -> str:
    """One wide photo under the three settings."""
    body = ""
    for index, (name, note) in enumerate(
        (
            ("pad", "576 tokens, 44% of them margin"),
            ("native", "336 tokens, all of the photo"),
            ("squash", "576 tokens"),
        )
    ):
        x = 30 + 230 * index
        width, height = (172, 98) if name == "native" else (172, 172)
        y = 40 + (172 - height) / 2
        body += text(x + 86, 26, name, size=15)
        body += box(x, y, width, height, "#ffffff" if name != "pad" else GREY, BLUE)
        photo = (x, y + 38, 172, 96) if name == "pad" else (x, y, width, height)
        body += box(*photo, "#dbe6ff")
        px, py, pw, ph = photo
        body += f'<ellipse cx="{px + pw / 2:g}" cy="{py + ph / 2:g}" rx="{ph * 0.3 if name != "squash" else 29:g}" '
        body += f'ry="{ph * 0.3:g}" fill="{GREEN}"/>\n'
        body += grid(x, y, width, height, 8, 8 if name != "native" else 5)
        body += text(x + 86, 236, note, fill=DIM, size=12)
    return wrap(720, 254, "A wide photo, padded, in its own shape, and stretched", body)


PICTURES = {"tokens.svg": draw_tokens, "stages.svg": draw_stages, "aspect_ratio.svg": draw_aspect_ratio}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
