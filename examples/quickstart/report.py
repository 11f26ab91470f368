"""The report page: one HTML file without scripts or outside files, with the curves as SVG and the pages as PNG."""

import base64
import html
import math
import os
import platform
from importlib.metadata import version
from io import BytesIO


STYLE = """
:root { --ink: #1c2330; --dim: #667085; --line: #dfe3ea; --card: #fff; --ground: #f6f7f9; --main: #2f5bea;
        --good: #16794c; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebf0; --dim: #98a2b3; --line: #333b48; --card: #1d232d; --ground: #14181f; --main: #84a5ff;
          --good: #5fd39a; --bad: #ff8a7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 40px 20px 64px; background: var(--ground); color: var(--ink);
       font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; color: var(--dim); max-width: 75ch; }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(var(--least, 150px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
.card h3 { font-size: 13px; font-weight: 600; margin: 0 0 6px; }
.card b { display: block; font-size: 26px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card img { display: block; width: 100%; border-radius: 6px; margin-bottom: 10px; image-rendering: auto; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px; margin: 0; font-size: 14px; }
.wide { overflow-x: auto; }
dt, small, .axis { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
.right { color: var(--good); font-weight: 600; }
.wrong { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-size: 13px; color: var(--dim); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr.sum td { font-weight: 700; }
.bar { position: relative; width: 100%; min-width: 140px; height: 14px; border-radius: 4px; background: var(--line); }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--main); }
.bar u { position: absolute; top: -2px; bottom: -2px; width: 3px; background: var(--bad); }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
@media (max-width: 600px) {
  body { padding: 24px 14px 48px; }
  h1 { font-size: 23px; }
  h2 { margin-top: 30px; }
  .cards { gap: 10px; --least: 130px !important; }
  .cards.curves { grid-template-columns: 1fr; }
  .card { padding: 10px; }
  .card b { font-size: 21px; }
  th, td { padding: 6px 6px; white-space: normal; }
  th, .card dl { font-size: 12px; }
  table { font-size: 13px; }
  .bar { min-width: 44px; }
}
"""
# Wrong answers that the page shows at most, and logged values of a running mean.
SHOWN_WRONG = 12
RUNNING_MEAN = 20
PACKAGES = ("torch", "transformers", "trl")


def write_report(
    path: str, results: dict, losses: dict[str, list[tuple[int, float]]], samples: list[dict], wrong: list[dict]
) -> None:
    """Write the page.

    Args:
        path: file to write.
        results: what `results.json` holds.
        losses: for each part of the training, pairs of step and loss.
        samples: `task`, `image` (Pillow image or None), `question`, `answer` and `truth` of some test questions, drawn
            without regard to their answers.
        wrong: the same of all questions whose answer is wrong.
    """
    accuracy, targets = results["accuracy"], results["targets"]
    verdict = "met" if results["targets_met"] else "not met"
    head = [
        ("held-out questions answered exactly", percent(accuracy["overall"])),
        ("the same, images swapped", percent(accuracy["overall_images_swapped"])),
        ("questions", f"{results['questions']['overall']:,}"),
        ("seconds in all", f"{results['seconds']['total']['wall']:.0f}"),
        ("parameters", f"{results['parameters']:,}"),
        (f"targets {verdict}", f"{percent(targets['overall'], 0)} / {percent(targets['each_image_task'], 0)}"),
    ]
    curves = "".join(draw_curve(title, points) for title, points in losses.items())
    body = f"""
<h1>A ConvLLaVA trained from nothing</h1>
<p>Seed {results["seed"]}. A model with five convolutional stages sees each page of 128 x 128 pixels as four tokens. It
was trained on {results["training_pages"]:,} pages and asked about pages that it never saw, with handwriting that it
never saw.</p>
<div class="cards">{draw_head(head)}</div>
<h2>Accuracy on held-out questions</h2>
<p>Exact match of the greedy answer, as <code>convllava eval</code> asks and scores. The red mark is the control: the
same questions, each with the page of another question of its task. What is left there is guessing.</p>
<div class="wide">{draw_table(results)}</div>
<h2>Training</h2>
<p>Loss over steps: faint as logged, strong the mean of the last {RUNNING_MEAN} values. Stage 0 stands in for
pretrained parts, which cannot be had without a network; stages 1 to 3 are those of ConvLLaVA.</p>
<div class="cards curves" style="--least: 300px">{curves}</div>
<h2>Some of the questions</h2>
<p>Of each task the first three that were drawn from the test split, whatever was answered.</p>
<div class="cards" style="--least: 170px">{"".join(draw_sample(sample) for sample in samples)}</div>
<h2>Wrong answers</h2>
{draw_wrong(wrong, results["questions"]["overall"])}
<h2>Time</h2>
<p>Wall-clock seconds, and processor seconds of all threads beside them.</p>
<div class="wide">{draw_times(results["seconds"])}</div>
<p>{html.escape(describe_machine())}</p>
"""
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>ConvLLaVA quickstart, seed {results['seed']}</title>\n<style>{STYLE}</style>\n</head>\n"
            f"<body>{body}</body>\n</html>\n"
        )


def draw_head(entries: list[tuple[str, str]]) -> str:
    """A card for each pair of a name and a value."""
    return "".join(f'<div class="card"><b>{value}</b><small>{name}</small></div>' for name, value in entries)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; None, where there is nothing to measure, as a dash."""
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def draw_table(results: dict) -> str:
    """One row per task: number of questions, accuracy, the control, and both as a bar with a mark."""
    accuracy, rows = results["accuracy"], []
    for task, share in [*accuracy["tasks"].items(), ("overall", accuracy["overall"])]:
        control = accuracy["tasks_images_swapped"].get(task)
        if task == "overall":
            control = accuracy["overall_images_swapped"]
        mark = "" if control is None else f'<u style="left:calc({100 * control:.1f}% - 1px)"></u>'
        rows.append(
            f"<tr{' class=sum' if task == 'overall' else ''}><td>{task}</td><td>{results['questions'][task]}</td>"
            f"<td>{percent(share)}</td><td>{percent(control)}</td>"
            f'<td style="width:45%"><div class="bar"><i style="width:{100 * share:.1f}%"></i>{mark}</div></td></tr>'
        )
    names = ("task", "questions", "accuracy", "images swapped", "")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{''.join(rows)}</table>"


def draw_wrong(wrong: list[dict], count: int) -> str:
    """Wrong answers as cards, evenly from all of them, with how many there are; a sentence if there are none."""
    if not wrong:
        return f"<p>There are none: all {count} questions were answered exactly.</p>"
    step = max(1, math.ceil(len(wrong) / SHOWN_WRONG))
    shown = wrong[::step]
    which = "All of them" if len(shown) == len(wrong) else f"{len(shown)} of them, evenly from all tasks"
    cards = "".join(draw_sample(sample) for sample in shown)
    return (
        f"<p>{len(wrong)} of {count} answers are wrong. {which}:</p>"
        f'<div class="cards" style="--least: 170px">{cards}</div>'
    )


def describe_machine() -> str:
    """Versions and processor, without the name of the machine."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {versions}; {platform.machine()}, {os.cpu_count()} processor cores."


def average(points: list[tuple[int, float]], window: int = RUNNING_MEAN) -> list[tuple[int, float]]:
    """The mean of each value and those before it, `window` together, at most; starts where a window is full."""
    values = [loss for _, loss in points]
    window = min(window, len(points))
    return [(points[end - 1][0], sum(values[end - window : end]) / window) for end in range(window, len(points) + 1)]


def choose_ticks(top: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to `top`: steps of 1, 2 or 5 times a power of ten, about `count` of them."""
    rough = top / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(index * step, 10) for index in range(math.floor(top / step) + 1)]


def draw_curve(title: str, points: list[tuple[int, float]], width: int = 320, height: int = 160) -> str:
    """A card with one loss curve as SVG; the axes start at zero."""
    left, bottom = 34, 20  # pixels for the labels
    last, top = max(step for step, _ in points), max(loss for _, loss in points) * 1.05 or 1.0

    def place(step: float, loss: float) -> str:
        return f"{left + (width - left) * step / last:.1f},{(height - bottom) * (1 - loss / top):.1f}"

    grid = "".join(
        f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{max(y + 4, 9):.1f}" text-anchor="end" fill="var(--dim)">{value:g}</text>'
        for value, y in ((value, (height - bottom) * (1 - value / top)) for value in choose_ticks(top))
    )
    grid += "".join(
        f'<text x="{left + (width - left) * step / last:.1f}" y="{height - 4}" fill="var(--dim)" '
        f'text-anchor="{"start" if step == 0 else "middle"}">{step:g}</text>'
        for step in choose_ticks(last)
        if step < 0.72 * last
    )
    faint, strong = (" ".join(place(*point) for point in line) for line in (points, average(points)))
    return (
        f'<div class="card"><h3>{html.escape(title)}</h3><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="loss over steps, {html.escape(title)}">{grid}'
        f'<polyline points="{faint}" fill="none" stroke="var(--main)" stroke-opacity="0.3"/>'
        f'<polyline points="{strong}" fill="none" stroke="var(--main)" stroke-width="2" stroke-linejoin="round"/>'
        f'<text x="{width}" y="{height - 4}" text-anchor="end" fill="var(--dim)">{last} steps</text></svg></div>'
    )


def draw_sample(sample: dict) -> str:
    """A card with a page, the question, the answer and the truth."""
    picture = ""
    if sample["image"] is not None:
        buffer = BytesIO()
        sample["image"].save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="test page" src="data:image/png;base64,{data}">'
    right = "right" if sample["answer"] == sample["truth"] else "wrong"
    question, answer, truth = (html.escape(sample[key]) for key in ("question", "answer", "truth"))
    return (
        f'<div class="card">{picture}<h3>{question}</h3><dl><dt>answer</dt>'
        f'<dd class="{right}">{answer or "(none)"}</dd>'
        f"<dt>truth</dt><dd>{truth}</dd></dl></div>"
    )


def draw_times(seconds: dict[str, dict[str, float]]) -> str:
    """One row per phase with its seconds and a bar."""
    longest = max(entry["wall"] for phase, entry in seconds.items() if phase != "total")
    rows = "".join(
        f"<tr{' class=sum' if phase == 'total' else ''}><td>{html.escape(phase)}</td><td>{entry['wall']:.1f}</td>"
        f'<td>{entry["cpu"]:.1f}</td><td style="width:45%">'
        + (
            ""
            if phase == "total"
            else f'<div class="bar"><i style="width:{100 * entry["wall"] / longest:.1f}%"></i></div>'
        )
        + "</td></tr>"
        for phase, entry in seconds.items()
    )
    return f"<table><tr><th>phase</th><th>seconds</th><th>processor</th><th></th></tr>{rows}</table>"
