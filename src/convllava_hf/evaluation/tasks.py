"""The benchmarks by name: how their questions are read, and which files score their predictions."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import choices, gpt_review, grounding, metrics, mme
from .files import read_json, read_json_lines, read_rows
from .questions import (
    LETTER_CN,
    PromptStyle,
    Question,
    read_llava_questions,
    read_mmbench_questions,
    read_ocr_questions,
    read_refcoco_questions,
    read_scienceqa_questions,
)
from .scores import Score, join_answers


@dataclass(frozen=True)
class Files:
    """What a scorer reads.

    Args:
        predictions: JSON Lines with `question_id`, `prompt`, `text`, or what the task's own scorer reads.
        questions: the question file.
        annotations: the truths, where they are in another file or folder.
        asked: id -> prompts of the questions that were asked; `None` for all.
    """

    predictions: Path
    questions: Path | None = None
    annotations: Path | None = None
    asked: dict | None = None

    @property
    def answers(self) -> list[dict]:
        return read_json_lines(self.predictions)

    @property
    def given(self) -> list[Path]:
        """The files that may hold truths."""
        return [Path(file) for file in (self.annotations, self.questions) if file is not None]

    def need(self, what: str) -> Path:
        """The one file that a task needs beside the predictions; raises ValueError where there is none."""
        found = self.questions or self.annotations
        if found is None:
            raise ValueError(f"{what} is missing; pass it as --questions FILE.")
        return Path(found)

    def find(self, what: str, test: Callable[[dict], bool], default=None):
        """The first JSON object that passes a test, else the default; without one raises ValueError."""
        beside = [folder / name for folder in self.given for name in ("problems.json", "pid_splits.json")]
        beside += [file.with_name("pid_splits.json") for file in self.given]
        for file in (*self.given, *beside):
            if file.suffix == ".json" and file.is_file():
                content = read_json(file)
                if isinstance(content, dict) and test(content):
                    return content
        if default is None:
            raise ValueError(f"{what} is missing; pass it as --annotations FILE.")
        return default

    def keep(self, rows: list[dict], key: str = "question_id") -> list[dict]:
        """The rows of questions that were asked."""
        return [row for row in rows if self.asked is None or row[key] in self.asked]


def _score_scienceqa(files: Files) -> Score:
    problems = files.find("problems.json of ScienceQA", lambda found: "choices" in next(iter(found.values()), {}))
    tests = {"test": [name for name, row in problems.items() if row.get("split", "test") == "test"]}
    tests = files.find("pid_splits.json", lambda found: isinstance(found.get("test"), list), tests)["test"]
    tests = [name for name in tests if files.asked is None or name in files.asked]
    return choices.score_scienceqa(problems, tests, files.answers)


def _score_pope(files: Files) -> Score:
    rows = read_rows(files.need("POPE's question file, which says the category of each question,"))
    place = files.given[0] if files.annotations else files.given[0].with_name("coco")
    found = [place] if place.is_file() else sorted(place.glob("coco_pope_*.json"))
    if not found:
        raise ValueError(f"no coco_pope_*.json in {place}; pass POPE's folder of labels as --annotations DIR.")
    labels = {file.stem.removeprefix("coco_pope_"): read_json_lines(file) for file in found}
    if files.asked is not None:
        for category, truths in labels.items():
            names = [row["question_id"] for row in rows if row["category"] == category]
            labels[category] = [truth for name, truth in zip(names, truths, strict=False) if name in files.asked]
        labels = {category: truths for category, truths in labels.items() if truths}
    return metrics.score_pope(files.keep(rows), files.answers, labels)


def _score_textvqa(files: Files) -> Score:
    truths = files.find("TextVQA_0.5.1_val.json", lambda found: "data" in found)
    if files.asked is not None:  # by image, of which only some questions may have been asked
        wanted = {(name, metrics.read_question(text)) for name, texts in files.asked.items() for text in texts}
        truths = {"data": [row for row in truths["data"] if (row["image_id"], row["question"].lower()) in wanted]}
    return metrics.score_textvqa(truths, files.answers, files.predictions.stem)


def _score_vqa(convert: Callable, files: Files) -> Score:
    broken = []
    answers = read_json_lines(files.predictions, broken)
    score = convert(files.keep(read_rows(files.need("the question file of the split"))), answers, len(broken))
    score.problems["lines that are no JSON"] += broken
    return score


def _score_gqa(files: Files) -> Score:
    truths = files.find("the file of GQA's answers", lambda found: True)
    truths = {name: row if isinstance(row, dict) else {"answer": row} for name, row in truths.items()}
    truths = {name: row for name, row in truths.items() if files.asked is None or name in files.asked}
    return metrics.score_gqa(truths, files.answers)


def _score_mmbench(files: Files) -> Score:
    rows = files.keep(choices.read_mmbench(files.need("MMBench's table")), "index")
    return choices.convert_mmbench(rows, files.answers)


def _score_seed(files: Files) -> Score:
    truths = files.find("SEED-Bench.json", lambda found: "questions" in found)
    if files.asked is not None:
        known = {*files.asked, *map(str, files.asked)}
        truths["questions"] = [row for row in truths["questions"] if row["question_id"] in known]
    return choices.score_seed(truths, files.answers)


def _score_mme(files: Files) -> Score:
    if files.predictions.suffix == ".jsonl":
        folder = next((file for file in files.given if file.is_dir()), None)
        if folder is None:
            raise ValueError("pass MME's folder (MME_Benchmark_release_version) as --annotations DIR.")
        truths = mme.read_mme_truths(folder)
        return mme.score_mme_answers(truths, files.answers, files.asked)
    found = [files.predictions] if files.predictions.is_file() else sorted(files.predictions.glob("*.txt"))
    if not found:
        raise ValueError(f"no .txt file in {files.predictions}; expected MME's results, one file per task.")
    tasks = {}
    for file in found:
        with open(file, encoding="utf-8") as lines:
            tasks[file.stem] = lines.readlines()
    score = mme.score_mme(tasks)
    if files.predictions.is_file():
        score.original = score.original["tasks"][found[0].stem]
    return score


def _score_multimodal_ocr(files: Files) -> Score:
    rows = read_rows(files.predictions)
    if not rows or "gt_answers" in rows[0]:
        return metrics.score_multimodal_ocr(rows)
    truths, said, problems = _join_by_place(files, files.need("the benchmark's file with 'gt_answers'"), rows)
    answered = [{**row, "answer": said[n]["text"]} for n, row in enumerate(truths) if n in said]
    score = metrics.score_multimodal_ocr(answered)
    score.problems |= problems
    return score


def _join_by_place(files: Files, questions: Path, answers: list[dict]) -> tuple[list[dict], dict, dict]:
    """Questions whose id is their place in the file, answers by place, and what does not fit."""
    truths = read_rows(questions)[: None if files.asked is None else len(files.asked)]
    return truths, *join_answers(answers, range(len(truths)))


def _score_refcoco(files: Files) -> Score:
    rows = read_rows(files.predictions)
    has_ids = not rows or "question_id" in rows[0]
    truths, said, problems = _join_by_place(files, files.need("the question file of RefCOCO"), rows if has_ids else [])
    if not has_ids:
        return grounding.score_refcoco(truths, [row["answer"] for row in rows])
    score = grounding.score_refcoco(truths, [said.get(n, {"text": ""})["text"] for n in range(len(truths))])
    score.problems |= problems
    return score


def _score_reviews(files: Files) -> Score:
    is_folder = files.predictions.is_dir()
    replies = [] if is_folder else read_rows(files.predictions)
    if replies and isinstance(replies[0], str):
        return Score({"parse_score": [{"reply": reply, "scores": gpt_review.parse_review(reply)} for reply in replies]})
    found = [files.predictions]
    if is_folder:  # of which the original takes these
        names = ("*",) if "review" in str(files.predictions) else ("gpt4_text*", "reviews_*", "review_*")
        found = sorted(file for name in names for file in files.predictions.glob(f"{name}.jsonl"))
    score = gpt_review.score_reviews([row for file in found for row in read_json_lines(file)])
    try:
        score.original["summary"] = dict.fromkeys(("files", "dir")[: 1 + is_folder], gpt_review.print_summary(found))
        if not is_folder:
            lines = gpt_review.print_llavar_summary(files.predictions, str(files.predictions))
            score.original["summary"]["llavar_variant"] = lines
    except ZeroDivisionError:
        score.original["error"] = "ZeroDivisionError: a category whose reference answers have a mean of 0"
    return score


def _score_plain(comparison: str, files: Files) -> Score:
    truths, categories, twice = {}, {}, []
    for file in files.given:
        counts = Counter()
        for number, row in enumerate(read_rows(file)):
            name = row.get("question_id", row.get("id", number))
            truth = next((row[key] for key in ("answer", "answers", "label", "gt_answers") if key in row), None)
            if truth is None and "conversations" in row:
                truth = row["conversations"][1]["value"]
            if truth is not None and (files.asked is None or name in files.asked):
                truths[name] = truth
                counts[name] += 1
                categories[name] = row.get("category")
        twice += [name for name, count in counts.items() if count > 1]
    if not truths:
        raise ValueError("no question has an 'answer'; put them into the question file or pass --annotations FILE.")
    score = metrics.score_plain(comparison, truths, files.answers, categories)
    score.problems["asked twice"] = twice
    return score


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        read: (question file, style) -> questions.
        score: reads the files and scores.
        max_new_tokens: longest answer, as the original asks for it.
    """

    read: Callable[[Path, PromptStyle], list[Question]]
    score: Callable[[Files], Score]
    max_new_tokens: int = 128


TASKS = {
    "scienceqa": Task(read_scienceqa_questions, _score_scienceqa, 1024),
    "pope": Task(read_llava_questions, _score_pope),
    "textvqa": Task(read_llava_questions, _score_textvqa),
    "vqav2": Task(read_llava_questions, partial(_score_vqa, metrics.convert_vqav2)),
    "vizwiz": Task(read_llava_questions, partial(_score_vqa, metrics.convert_vizwiz)),
    "gqa": Task(read_llava_questions, _score_gqa),
    "mmbench": Task(read_mmbench_questions, _score_mmbench, 1024),
    "mmbench_cn": Task(partial(read_mmbench_questions, suffix=LETTER_CN), _score_mmbench, 1024),
    "seed_bench": Task(read_llava_questions, _score_seed),
    "mmvet": Task(read_llava_questions, lambda files: metrics.convert_mmvet(files.answers), 1024),
    "mme": Task(read_llava_questions, _score_mme),
    "multimodal_ocr": Task(read_ocr_questions, _score_multimodal_ocr, 256),
    "refcoco": Task(read_refcoco_questions, _score_refcoco, 100),
    "gpt_review": Task(read_llava_questions, _score_reviews, 1024),
    **{name: Task(read_llava_questions, partial(_score_plain, name)) for name in metrics.COMPARISONS},
}


def find_task(name: str) -> tuple[str, Task]:
    """A task by its name, with `-` or `_`.

    Raises:
        ValueError: there is none.
    """
    key = name.replace("-", "_").lower()
    if key not in TASKS:
        raise ValueError(f"task {name!r}; expected one of {', '.join(TASKS)}.")
    return key, TASKS[key]


def score_task(
    name: str,
    predictions: Path,
    questions: Path | None = None,
    annotations: Path | None = None,
    asked: dict | None = None,
) -> Score:
    """Scores a file of predictions.

    Args:
        name: of the task.
        predictions: JSON Lines with `question_id`, `prompt`, `text`, or what the task's own scorer reads.
        questions: the question file.
        annotations: the truths, where they are in another file or folder.
        asked: id -> prompts of the questions that were asked. Default: all of the file.

    Raises:
        ValueError: a file that is missing, or that does not fit the task.
    """
    key, task = find_task(name)
    for file in (predictions, questions, annotations):
        if file is not None and not Path(file).exists():
            raise ValueError(f"{file} does not exist.")
    try:
        return task.score(Files(Path(predictions), questions, annotations, asked))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{type(error).__name__}: {error}. The files do not fit the task {key}; see docs/evaluation.md."
        ) from error
