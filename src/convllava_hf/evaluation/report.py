"""One HTML page about evaluations: numbers beside the published ones, intervals, categories, wrong answers."""

import html
import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..checkpoints.cards import read_facts
from ..images import encode_thumbnail, load_image
from .grounding import draw_boxes, parse_box, place_box
from .run import open_images
from .scores import read_json, read_json_lines
from .tasks import PROMPT_STYLES, find_task, read_rows


# Task -> label of the published results, and the number of ours that stands beside it.
PUBLISHED = {
    "mme": ("MME (perception)", "Perception (of 2000)"),
    "mmbench": ("MMBench", "accuracy"),
    "mmbench_cn": ("MMBench (Chinese)", "accuracy"),
    "seed_bench": ("SEED-Bench", "accuracy"),
    "textvqa": ("TextVQA", "accuracy"),
    "pope": ("POPE", "F1, mean of categories"),
    "scienceqa": ("ScienceQA (image)", "image accuracy"),
    "gqa": ("GQA", "accuracy"),
    "vqav2": ("VQAv2", "accuracy"),
    "vizwiz": ("VizWiz", "accuracy"),
    "mmvet": ("MM-Vet", "accuracy"),
    "gpt_review": ("LLaVA-Bench (in the wild)", "relative score"),
}
REFCOCO = {"refcoco+": "RefCOCO+", "refcocog": "RefCOCOg", "refcoco": "RefCOCO"}
THUMBNAIL = 420  # pixels
STYLE = """
:root { color-scheme: light; --line: #d8d8d4; --soft: #5d5f63; --ink: #1c1d20; --mark: #2b6cb0; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1.2rem; color: var(--ink);
  background: #fff; }
h1 { font-size: 1.35rem; margin: .4rem 0 1rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); } h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } .soft { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.bar { display: grid; grid-template-columns: minmax(7rem, 25%) 1fr 3.4rem; gap: .6rem; align-items: center;
  margin: .2rem 0; }
.bar span { overflow-wrap: anywhere; } .bar .number { text-align: right; font-variant-numeric: tabular-nums; }
.track { position: relative; background: #eef0f2; height: .9rem; border-radius: 2px; }
.fill { position: absolute; inset: 0 auto 0 0; background: var(--mark); border-radius: 2px; }
.range { position: absolute; top: 40%; height: 20%; background: #10253f; }
.wrong { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 4px; overflow: hidden; }
figure img { width: 100%; display: block; background: #f4f4f2; max-height: 18rem; object-fit: contain; }
figcaption { padding: .5rem .7rem; font-size: .86rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.warn { background: #fff6df; padding: .5rem .8rem; border-radius: 4px; margin: .4rem 0; }
.truth { color: #17643a; } .said { color: #a1261f; }
"""


def find_published(task: str, run: dict) -> tuple[dict[str, float], str]:
    """What the originals' READMEs say, model -> number, and the name of our number beside it."""
    label, number = PUBLISHED.get(task, (None, "accuracy"))
    split = None
    if task == "refcoco":
        name = Path(run["questions"]).stem
        family = next((key for key in REFCOCO if name.startswith(f"{key}_")), None)
        label = REFCOCO.get(family)
        split = {"testA": "test-A", "testB": "test-B"}.get(name.partition("_")[2], name.partition("_")[2])
    found = {}
    for model, facts in read_facts().items():
        for result in facts.get("results", []):
            if (result.dataset_name, result.dataset_split) == (label, split):
                found[model.removesuffix("-hf")] = result.metric_value
    return found, number


def render_report(folders: list[Path], wrong: int = 24) -> str:
    """The page.

    Args:
        folders: of `convllava eval`.
        wrong: most wrong answers to show of each.

    Raises:
        ValueError: a folder without results.
    """
    runs = []
    for folder in folders:
        if not (folder / "results.json").is_file():
            raise ValueError(f"{folder} has no results.json; expected a folder of `convllava eval`.")
        runs.append((folder, read_json(folder / "results.json"), read_json(folder / "run.json")))
    body = ["<h1>Evaluation</h1>", render_overview(runs)]
    for folder, results, run in runs:
        body.append(render_run(folder, results, run, wrong))
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    head += f"<title>Evaluation</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def render_overview(runs: list[tuple]) -> str:
    """Every run's first number, by both rules, beside the published ones."""
    rows = []
    for folder, results, run in runs:
        published, name = find_published(results["task"], run)
        numbers = results["numbers"].get(name) or next(iter(results["numbers"].values()), {})
        others = "; ".join(f"{model} {value:g}" for model, value in published.items()) or "none"
        cells = [folder.name, *(format_number(numbers, rule) for rule in ("ours", "original"))]
        cells += [results["questions"], results["task"], results["model"]]
        rows.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells))
        rows[-1] += f"<td class='soft' style='white-space: normal; min-width: 16rem'>{html.escape(others)}</td>"
    head = "".join(
        f"<th>{cell}</th>" for cell in ("run", "our rule", "original's rule", "questions", "task", "model", "published")
    )
    note = "In brackets: the middle 95% of resampled questions. Published: as the READMEs of the originals say."
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{table}</table></div><p class='soft'>{note}</p>"


def format_number(numbers: dict, rule: str) -> str:
    value, interval = numbers.get(rule), numbers.get(f"{rule}_interval")
    if value is None:
        return ""
    return f"{value:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def render_run(folder: Path, results: dict, run: dict, wrong: int) -> str:
    settings = ", ".join(f"{key}: {value}" for key, value in results["asked"].items() if key != "settings")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [f"<h2>{html.escape(folder.name)}: {html.escape(results['task'])}</h2>"]
    parts.append(f"<p class='soft'>{html.escape(settings)}<br>{html.escape(versions)}</p>")
    for kind, found in results["problems"].items():
        line = f"{kind}: {found['count']} ({', '.join(map(str, found['first']))})"
        parts.append(f"<p class='warn'>{html.escape(line)}</p>")
    parts += [render_bar(name, numbers) for name, numbers in results["numbers"].items()]
    parts.append(render_wrong(folder, run, wrong))
    return "".join(parts)


def render_bar(name: str, numbers: dict) -> str:
    rule = "ours" if "ours" in numbers else "original"
    value, interval = numbers[rule], numbers.get(f"{rule}_interval") or [0, 0]
    full = next((int(words.rstrip(")")) for words in name.split("(of ")[1:]), 100)
    left, width, end = (100 * number / full for number in (interval[0], interval[1] - interval[0], value))
    marks = f"<div class='fill' style='width: {min(end, 100):.2f}%'></div>"
    marks += f"<div class='range' style='left: {left:.2f}%; width: {max(width, 0):.2f}%'></div>"
    label = html.escape(name.removeprefix("category: "))
    track = f"<div class='track'>{marks}</div><span class='number'>{value:.1f}</span>"
    return f"<div class='bar'><span>{label}</span>{track}</div>"


def render_wrong(folder: Path, run: dict, most: int) -> str:
    """Wrong answers with their images; of RefCOCO the target in green and the answer in red."""
    outcomes = read_json_lines(folder / "outcomes.jsonl")
    outcomes = [row for row in outcomes if row["ours"] is not None and row["ours"] < 0.5]
    if not outcomes or not Path(run["questions"]).is_file():
        return ""
    name, style = run["asked"]["task"], PROMPT_STYLES[run["asked"]["prompt_style"]]
    asked = find_task(name)[1].read(Path(run["questions"]), style)
    questions = {(str(q.question_id), q.prompt): q for q in asked}
    questions |= {str(q.question_id): q for q in asked}
    predictions = read_json_lines(folder / "predictions.jsonl")
    said = {str(row["question_id"]): row["text"] for row in predictions}
    boxes = read_rows(Path(run["questions"])) if name == "refcoco" else []
    figures = []
    for outcome in outcomes[:most]:
        question = questions.get(str(outcome["question_id"]))
        answer = said.get(str(outcome["question_id"]), "no answer")
        if outcome["prediction"] is not None:  # of tasks that tell questions about one image by their text
            row = predictions[outcome["prediction"]]
            question, answer = questions.get((str(row["question_id"]), row["prompt"])), row["text"]
        picture = ""
        if question is not None:
            try:
                for source in open_images(question, run["images"] and Path(run["images"]))[:1]:
                    image = load_image(source)
                    if boxes:
                        row = boxes[outcome["question_id"]]
                        marked = {"#1a8f4a": row["bbox"]}
                        if (box := parse_box(answer)) is not None:
                            marked["#d42a20"] = place_box(box, image.height, image.width)
                        image = draw_boxes(image, marked)
                    picture = f"<img alt='' src='{encode_thumbnail(image, THUMBNAIL)}'>"
            except ValueError:  # an image that is gone since
                picture = "<p class='warn'>image not found</p>"
        text = html.escape(question.prompt if question else str(outcome["question_id"]))
        caption = f"{text}\n<span class='said'>{html.escape(answer) or '(empty)'}</span>\n"
        caption += f"<span class='truth'>{html.escape(outcome['truth'])}</span>"
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    title = f"<h3>Wrong answers: {len(figures)} of {len(outcomes)}; the answer in red, the truth in green</h3>"
    return f"{title}<div class='wrong'>{''.join(figures)}</div>"


def write_report(folders: list[Path], output: Path, wrong: int = 24) -> None:
    """Writes the page; arguments as above."""
    temporary = output.with_name(f"{output.name}.tmp")
    temporary.write_text(render_report(folders, wrong), encoding="utf-8")
    os.replace(temporary, output)


def add_to_card(folders: list[Path], checkpoint: Path) -> int:
    """Writes the results into the metadata of a checkpoint's model card, in place of those of the same folders.

    Args:
        folders: of `convllava eval`.
        checkpoint: folder with a README.md.

    Returns:
        How many numbers were written.

    Raises:
        ValueError: no card, or results of another checkpoint.
    """
    from .run import hash_checkpoint

    file = checkpoint / "README.md"
    if not file.is_file():
        raise ValueError(f"{checkpoint} has no README.md; write a card first (convllava push --dry-run shows one).")
    card, mark, results = ModelCard.load(file), hash_checkpoint(str(checkpoint)), []
    for folder in folders:
        content = read_json(folder / "results.json")
        if content["asked"]["checkpoint"] != mark:
            raise ValueError(f"{folder} holds results of another checkpoint than {checkpoint}; evaluate this one.")
        for name, numbers in content["numbers"].items():
            if name.startswith("category: "):
                continue
            for rule in ("original", "ours"):
                if numbers.get(rule) is not None:
                    results.append(
                        EvalResult(
                            task_type="image-text-to-text",
                            dataset_type=content["task"],
                            dataset_name=folder.name,
                            dataset_config=folder.name,  # without it the Hub's format joins results of one type
                            metric_type=name,
                            metric_name=f"{name} ({'the original scorer' if rule == 'original' else 'convllava-hf'})",
                            metric_value=round(numbers[rule], 4),
                            dataset_args={"questions": content["questions"], **content["asked"]["settings"]},
                        )
                    )
    names = {(result.dataset_type, result.dataset_name) for result in results}
    old = card.data.eval_results or []
    kept = [result for result in old if (result.dataset_type, result.dataset_name) not in names]
    card.data.eval_results = kept + results
    card.data.model_name = card.data.model_name or checkpoint.resolve().name
    card.save(file)
    return len(results)
