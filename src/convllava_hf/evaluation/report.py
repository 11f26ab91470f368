"""One HTML page about evaluations: numbers beside the published ones, intervals, categories, wrong answers."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment

from ..checkpoints.cards import read_facts
from ..images import encode_thumbnail, load_image
from .answering import open_images
from .files import read_json, read_json_lines, read_rows
from .grounding import draw_boxes, parse_box, place_box
from .questions import PROMPT_STYLES
from .results import hash_checkpoint
from .tasks import find_task


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
TEMPLATE = Path(__file__).with_name("report.html.jinja")


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
        results, run = read_json(folder / "results.json"), read_json(folder / "run.json")
        published, name = find_published(results["task"], run)
        first = results["numbers"].get(name) or next(iter(results["numbers"].values()), {})
        bars = [measure_bar(*item) for item in results["numbers"].items()]
        outcomes = read_json_lines(folder / "outcomes.jsonl") if Path(run["questions"]).is_file() else []
        outcomes = [row for row in outcomes if row["ours"] is not None and row["ours"] < 0.5]
        shown = {"results": results, "published": published, "first": first, "bars": bars, "all_wrong": len(outcomes)}
        runs.append({"name": folder.name, "wrong": list_wrong(folder, run, outcomes[:wrong]), **shown})
    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(runs=runs)


def measure_bar(name: str, numbers: dict) -> dict:
    """A number as a bar: where it ends and its interval lies, in percent of the whole."""
    rule = "ours" if "ours" in numbers else "original"
    low, high = numbers.get(f"{rule}_interval") or (0, 0)
    full = next((int(words.rstrip(")")) for words in name.split("(of ")[1:]), 100)
    places = {"left": low, "width": max(high - low, 0), "end": min(numbers[rule], full)}
    places = {key: round(100 * number / full, 2) for key, number in places.items()}
    return {"name": name.removeprefix("category: "), "value": numbers[rule], **places}


def list_wrong(folder: Path, run: dict, outcomes: list[dict]) -> list[dict]:
    """Wrong answers with their images; of RefCOCO the target in green and the answer in red."""
    if not outcomes:
        return []
    name, style, file = run["asked"]["task"], PROMPT_STYLES[run["asked"]["prompt_style"]], Path(run["questions"])
    asked = find_task(name)[1].read(file, style)
    questions = {(str(q.question_id), q.prompt): q for q in asked} | {str(q.question_id): q for q in asked}
    predictions = read_json_lines(folder / "predictions.jsonl")
    answers = {str(row["question_id"]): row["text"] for row in predictions}
    targets = [row["bbox"] for row in read_rows(file)] if name == "refcoco" else None
    figures = []
    for outcome in outcomes:
        key = str(outcome["question_id"])
        question, said = questions.get(key), answers.get(key, "no answer")
        if outcome["prediction"] is not None:  # of tasks that tell questions about one image by their text
            row = predictions[outcome["prediction"]]
            question, said = questions.get((str(row["question_id"]), row["prompt"])), row["text"]
        figure = {"question": question.prompt if question else key, "said": said, "truth": outcome["truth"]}
        try:
            images = open_images(question, run["images"] and Path(run["images"])) if question else []
            for source in images[:1]:
                image = load_image(source)
                if targets:
                    boxes = {"#1a8f4a": targets[outcome["question_id"]]}
                    if (box := parse_box(said)) is not None:
                        boxes["#d42a20"] = place_box(box, image.height, image.width)
                    image = draw_boxes(image, boxes)
                figure["picture"] = encode_thumbnail(image, THUMBNAIL)
        except ValueError:  # an image that is gone since
            figure["lost"] = True
        figures.append(figure)
    return figures


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
