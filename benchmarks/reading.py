"""What a visual token is worth for reading: accuracy over the size of the text, at several budgets of tokens.

    python benchmarks/reading.py --model CHECKPOINT --budgets 144 256 576 --plot reading.png

Draws documents (a lone digit, lines, tables, receipts, bar charts) in this machine's fonts (Debian: fonts-dejavu,
fonts-liberation, fonts-freefont-ttf), asks for one word or number of each, and counts an answer as right that contains
it. The bands are 95% intervals (Wilson). Nothing is downloaded.
"""

import argparse
import random
from pathlib import Path

from machine import describe_machine, print_machine, print_table, write_json


FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "/Library/Fonts", "C:/Windows/Fonts")
NAMES = (
    "Apple Bread Candle Drill Envelope Flour Glass Hammer Iron Jacket Kettle Lamp Mirror Needle Orange Paper".split()
)
KINDS = ("digit", "line", "table", "receipt", "chart")


def find_fonts() -> list[Path]:
    """Upright text fonts of this machine, one style of each family; without any the one that matplotlib brings."""
    found = {}
    for folder in map(Path, FONT_FOLDERS):
        for file in sorted(folder.expanduser().rglob("*.ttf")):
            if not any(word in file.stem for word in ("Bold", "Oblique", "Italic", "Math", "Condensed", "Light")):
                found.setdefault(file.stem.split("-")[0], file)
    if not found:
        import matplotlib

        found["DejaVuSans"] = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return list(found.values())


def draw_document(kind: str, size: int, side: int, font_file: Path, rng: random.Random):
    """A page with a question about it.

    Args:
        kind: one of `KINDS`.
        size: of the font (its em) in pixels; a digit is about 0.7 of it high.
        side: of the page in pixels.
        font_file: of a TrueType font.
        rng: source of all that is random.

    Returns:
        The page (RGB, `side` x `side`), the question and the truth.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(font_file), size)
    page = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(page)
    step = round(size * 1.5)
    rows = max(2, min(8, (side - 2 * step) // step))
    names = rng.sample(NAMES, rows)
    numbers = rng.sample(range(10, 1000), rows)
    chosen = rng.randrange(rows)
    left, top = rng.randint(size // 2, max(size // 2, side // 8)), rng.randint(size // 2, max(size // 2, side // 12))
    if kind == "digit":  # in the middle of a quarter, as on the pages of the quickstart
        digit = str(rng.randrange(10))
        place = (rng.choice((side // 4, side * 3 // 4)), rng.choice((side // 4, side * 3 // 4)))
        draw.text(place, digit, "black", font, anchor="mm")
        return page, "Which digit is on the page?", digit
    if kind == "line":
        draw.text((left, rng.randint(top, max(top, side - 2 * step))), f"{names[0]} {numbers[0]}", "black", font)
        return page, f"Which number stands after {names[0]}?", str(numbers[0])
    if kind == "chart":
        width = max(2, (side - 2 * left) // rows)
        for place, number in enumerate(numbers):
            height = round(number / 1000 * max(1, side - 4 * step))
            x, bottom = left + place * width, side - 2 * step
            draw.rectangle((x, bottom - height, x + width * 0.7, bottom), fill="#4a78b0")
            draw.text((x, bottom - height - step), str(number), "black", font)
            draw.text((x, bottom + size // 4), chr(ord("A") + place), "black", font)
        return page, f"Which number is above bar {chr(ord('A') + chosen)}?", str(numbers[chosen])
    for place, (name, number) in enumerate(zip(names, numbers, strict=True)):
        y = top + place * step
        draw.text((left, y), name, "black", font)
        text = f"{number / 100:.2f}" if kind == "receipt" else str(number)
        draw.text((left + size * 7, y), text, "black", font)
        if kind == "table":
            draw.line((left, y + step - 1, side - left, y + step - 1), fill="#888888")
    truth = f"{numbers[chosen] / 100:.2f}" if kind == "receipt" else str(numbers[chosen])
    question = (
        f"How much does {names[chosen]} cost?" if kind == "receipt" else f"Which number is in row {names[chosen]}?"
    )
    return page, question, truth


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for budget in dict.fromkeys(row["tokens"] for row in rows):
        chosen = [row for row in rows if row["tokens"] == budget]
        sizes = [row["text size"] for row in chosen]
        axes.plot(sizes, [row["accuracy"] for row in chosen], marker="o", label=f"{budget} token{'s' * (budget > 1)}")
        axes.fill_between(sizes, *([row[end] for row in chosen] for end in ("low", "high")), alpha=0.18)
    axes.set(xlabel="font size (em) in pixels of the page", ylabel="read right, %", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint")
    parser.add_argument("--device", help="such as cpu or cuda:1 (the best there is)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[6, 8, 10, 12, 16, 20, 28, 40], help="font sizes in pixels"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of documents (all)")
    parser.add_argument("--budgets", type=int, nargs="+", required=True, help="most tokens of an image")
    parser.add_argument("--side", type=int, default=1536, help="of the page in pixels (1536)")
    parser.add_argument("--documents", type=int, default=50, help="per size (50)")
    parser.add_argument("--batch", type=int, default=8, help="batch size (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents (0)")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    parser.add_argument("--json", type=Path, help="write all digits here")
    options = parser.parse_args(arguments)

    import torch
    from scipy.stats import binomtest

    import convllava_hf
    from convllava_hf.evaluation.answering import make_local_answerer
    from convllava_hf.evaluation.metrics import compare_contains
    from convllava_hf.evaluation.questions import PROMPT_STYLES, Question

    loaded = convllava_hf.load(options.model, device=options.device)
    fonts, rows = find_fonts(), []
    for size in options.sizes:
        rng = random.Random(f"{options.seed} {size}")
        documents = [
            draw_document(options.kinds[n % len(options.kinds)], size, options.side, fonts[n % len(fonts)], rng)
            for n in range(options.documents)
        ]
        for budget in options.budgets:
            settings = {"max_image_tokens": budget}
            answer = make_local_answerer(*loaded, None, PROMPT_STYLES["checkpoint"], 16, settings)
            texts = []
            for start in range(0, len(documents), options.batch):
                batch = documents[start : start + options.batch]
                texts += answer([Question(n, text, text, [page]) for n, (page, text, _) in enumerate(batch)])
            right = sum(compare_contains(text, truth) for text, (_, _, truth) in zip(texts, documents, strict=True))
            ends = binomtest(int(right), len(documents)).proportion_ci(method="wilson")
            row = {"tokens": budget, "text size": size, "accuracy": 100 * right / len(documents)}
            rows.append({**row, "low": 100 * ends.low, "high": 100 * ends.high, "documents": len(documents)})
    rows.sort(key=lambda row: (row["tokens"], row["text size"]))
    shown = [{key: f"{value:.1f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    print_table("Reading", shown)
    print(f"\n- fonts: {', '.join(font.stem for font in fonts)}")
    machine = describe_machine(torch.get_num_threads())
    print_machine(machine)
    write_json(options.json, {"machine": machine, "results": rows})
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
