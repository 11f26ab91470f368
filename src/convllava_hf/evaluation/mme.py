"""MME: accuracy, and accuracy over images whose two questions are both right; its files and their converter."""

import io
from collections import defaultdict
from pathlib import Path

import numpy as np

from .metrics import parse_yes_no
from .scores import Outcome, Score, Statistic, mean_of


GROUPS = {
    "Perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "Cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


def parse_mme(text: str) -> str:
    """`"yes"`, `"no"` or `"other"`, by what occurs in the first four characters.

    Source: MME, `eval_tool/calculation.py`.
    """
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_mme_task(lines: list[str]) -> tuple[dict, list[Outcome], list[list[bool]]]:
    """One task of MME.

    A line that has not exactly four columns leaves the accuracy but not the images of acc+. Precision and recall leave
    out answers that are neither yes nor no.

    Args:
        lines: image, question, truth, answer by tabs; two lines per image.

    Returns:
        The original's numbers, outcomes (ours reads the first yes or no anywhere in an answer), and for each image
        whether its answers are right by either rule: `[original, ours]` per answer.

    Raises:
        ValueError: an image with one question, or a truth that is neither yes nor no.

    Source: MME, `eval_tool/calculation.py`.
    """
    if len(lines) % 2:
        raise ValueError(f"AssertionError: {len(lines)} lines; expected two per image.")
    truths, parsed, outcomes, images = [], [], [], []
    for number, line in enumerate(lines):
        if number % 2 == 0:
            images.append([])
        columns = line.split("\t")
        if len(columns) != 4:
            continue
        truth, said = columns[2].lower(), parse_mme(columns[3])
        if truth not in ("yes", "no"):
            raise ValueError(f"AssertionError: the truth {columns[2]!r} is neither yes nor no in line {number + 1}.")
        ours = parse_yes_no(columns[3])
        truths.append(truth)
        parsed.append(said)
        images[-1].append([said == truth, ours == truth])
        outcomes.append(Outcome(f"{columns[0]}: {columns[1]}", float(ours == truth), float(said == truth), ours, truth))
    pairs = list(zip(parsed, truths, strict=True))
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    tn, fn = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    accuracy = (tp + tn) / len(pairs) if pairs else float("nan")
    plus = sum(len(image) == 2 and all(old for old, _ in image) for image in images) / max(len(images), 1)
    numbers = {
        **{"TP": tp, "FN": fn, "TN": tn, "FP": fp},
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "other_num": parsed.count("other"),
        "acc": accuracy,
        "acc_plus": plus,
        "score": accuracy * 100 + plus * 100,
        "parsed": parsed,
    }
    return numbers, outcomes, images


def score_mme(tasks: dict[str, list[str]]) -> Score:
    """MME, as far as there are files: totals are given for a group whose tasks are all there.

    Args:
        tasks: name -> lines of its file.
    """
    numbers, outcomes, images = {}, [], {}
    problems = defaultdict(list)
    for name, lines in tasks.items():
        try:
            numbers[name], found, images[name] = score_mme_task(lines)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        dropped = len(lines) - len(found)
        problems["lines without four columns"] += [name] * dropped
        problems["answers that are neither yes nor no"] += [o.question_id for o in found if o.parsed == "other"]
        for outcome in found:
            outcome.category = name
        outcomes += found
    total = {
        group: sum(numbers[name]["score"] for name in members)
        for group, members in GROUPS.items()
        if all(name in numbers for name in members)
    }
    problems["tasks without a file"] += [n for members in GROUPS.values() for n in members if n not in numbers]
    # `results` is what the reference calls the same.
    original = {"results": {"tasks": numbers, "total": total}, "tasks": numbers, "total": total}
    score = Score(original, outcomes, problems=problems)
    score.numbers = _list_numbers(images)
    return score


def _list_numbers(images: dict[str, list]) -> dict[str, tuple[Statistic, Statistic]]:
    """The sum of each group whose tasks are all there; where there is none, each task."""
    chosen = {group: members for group, members in GROUPS.items() if all(name in images for name in members)}
    return {
        f"{name} (of {200 * len(members)})": tuple(
            _sum_scores([images[task] for task in members], rule) for rule in (0, 1)
        )
        for name, members in (chosen or {task: [task] for task in images}).items()
    }


def score_mme_answers(truths: dict, answers: list[dict], asked: dict | None = None) -> Score:
    """MME from a model's answers: the original by the files that they make, ours by question.

    In ours an answer is its whole text, of several the last counts, and a question without any is wrong.

    Args:
        truths: from `read_mme_truths`.
        answers: as for `convert_mme`.
        asked: image -> prompts of the questions that were asked. Default: all of the tasks that have an answer.
    """
    texts = convert_mme(truths, answers)
    try:
        # An answer that has line breaks makes several lines.
        score = score_mme({name: io.StringIO(text, newline=None).readlines() for name, text in texts.items()})
    except ValueError as error:
        score = Score({"error": str(error)})
    score.original["converter"] = {f"{name}.txt": text for name, text in texts.items()}
    old = score.outcomes
    places = defaultdict(list)
    for place, answer in enumerate(answers):
        places[_find_question(truths, answer["question_id"], answer["prompt"])].append(place)
    keys = [key for key in truths if key[0] in texts]
    if asked is not None:
        keys = [_find_question(truths, name, prompt) for name, prompts in asked.items() for prompt in prompts]
    rated = {(outcome.category, outcome.question_id): outcome.original for outcome in old}
    score.outcomes, images = [], {}
    for key in dict.fromkeys(keys):
        task, file, question = key
        last = places[key][-1] if key in places else None
        said, truth = "missing" if last is None else parse_yes_no(answers[last]["text"]), truths[key].lower()
        name = f"{file}: {question}"
        images.setdefault(task, {}).setdefault(file, []).append([False, said == truth])
        score.outcomes.append(
            Outcome(name, float(said == truth), rated.get((task, name)), said, truth, task, prediction=last)
        )
    score.problems["answered twice"] += [key for key, found in places.items() if len(found) > 1]
    wanted = truths if asked is None else dict.fromkeys(keys)
    score.problems["questions without an answer"] += [key for key in wanted if key not in places]
    unclear = [outcome.question_id for outcome in score.outcomes if outcome.parsed == "other"]
    score.problems["answers that are neither yes nor no"] = unclear
    images = {task: list(files.values()) for task, files in images.items()}
    for name, (_, ours) in _list_numbers(images).items():
        score.numbers[name] = (score.numbers.get(name, (None, None))[0], ours)
    for task in images if len(images) > 1 else ():
        theirs = mean_of(outcome.original for outcome in old if outcome.category == task)
        score.numbers[f"category: {task}"] = (theirs, mean_of(o.ours for o in score.outcomes if o.category == task))
    return score


def _sum_scores(tasks: list[list[list]], rule: int) -> Statistic:
    """Sum of the tasks' scores; whole images are resampled."""
    rows = []
    for task, images in enumerate(tasks):
        rows += [(task, len(image), sum(answer[rule] for answer in image)) for image in images]
    table = np.array(rows, dtype=int).reshape(-1, 3)

    def compute(indices):
        task, answers, right = table[indices].T
        count = [np.bincount(task, weights, len(tasks)) for weights in (answers, right, right == 2, None)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.nansum(100 * count[1] / count[0] + 100 * count[2] / count[3]))

    return Statistic(len(table), compute)


def read_mme_truths(folder: Path) -> dict[tuple[str, str, str], str]:
    """(task, file, question) -> truth, from the folder of the benchmark.

    Source: haotian-liu/LLaVA's public `convert_answer_to_mme.py`.
    """
    truths = {}
    for task in sorted(path for path in folder.iterdir() if path.is_dir()):
        place = task / "questions_answers_YN" if (task / "images").exists() else task
        for file in sorted(place.glob("*.txt")):
            for line in file.read_text(encoding="utf-8").splitlines():
                question, truth = line.strip().split("\t")
                truths[task.name, file.name, question] = truth
    return truths


def convert_mme(truths: dict[tuple[str, str, str], str], answers: list[dict]) -> dict[str, str]:
    """Answers of a model as MME's files: task -> text.

    Args:
        truths: from `read_mme_truths`.
        answers: `question_id` is the path of the image, `prompt` the question as LLaVA asks it.

    Raises:
        ValueError: a question that the benchmark lacks.

    Source: haotian-liu/LLaVA's public `convert_answer_to_mme.py`.
    """
    files = defaultdict(str)
    for answer in answers:
        key = _find_question(truths, answer["question_id"], answer["prompt"])
        files[key[0]] += "\t".join((*key[1:], truths[key], answer["text"])) + "\n"
    return dict(files)


def _find_question(truths: dict, image: str, prompt: str) -> tuple[str, str, str]:
    """The task, file and question of a prompt."""
    ours, theirs = "Answer the question using a single word or phrase.", "Please answer yes or no."
    task, name, question = image.split("/")[0], image.split("/")[-1].split(".")[0] + ".txt", prompt
    if ours in question:
        question = question.replace(ours, "").strip()
    if theirs not in question:
        question = f"{question} {theirs}"
        if (task, name, question) not in truths:
            question = question.replace(f" {theirs}", f"  {theirs}")
    if (task, name, question) not in truths:
        raise ValueError(f"KeyError: MME has no question {question!r} in {task}/{name}.")
    return task, name, question
