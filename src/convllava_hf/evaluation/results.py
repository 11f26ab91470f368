"""The folder of an evaluation, and what its predictions score.

It holds:

    run.json            what was asked of whom, with which settings
    answers-*.jsonl     answers as they came, one file per process; only ever appended to
    predictions.jsonl   the answers in the order of the questions
    results.json        numbers with intervals, problems, speed;  outcomes.jsonl: per question;  original.json: what the
                        original's code computes
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

from .files import read_appended, read_json, write_json, write_json_lines
from .questions import PROMPT_STYLES, Question
from .scores import Score
from .tasks import find_task, score_task


# Weights, and what else changes an answer; the last two are the graphs of `convllava export`.
HASHED = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.jinja", "processor*", "preprocessor*")
HASHED += ("onnx/*", "openvino/*", "executorch/*")


def hash_checkpoint(checkpoint: str, revision: str | None = None) -> str:
    """A hash of the files of a checkpoint that change its answers; of a Hub id its commit.

    Raises:
        ValueError: a folder without weights.
        OSError: no such checkpoint.
    """
    from transformers.utils import cached_file

    from ..checkpoints.reading import hash_file

    folder = Path(checkpoint)
    if not folder.is_dir():
        return Path(cached_file(checkpoint, "config.json", revision=revision)).parent.name  # .../snapshots/<commit>
    files = sorted({file for pattern in HASHED for file in folder.glob(pattern)})
    if not any(file.suffix in (".safetensors", ".bin", ".onnx", ".pte") for file in files):
        raise ValueError(f"{folder} holds no weights; expected the folder of a checkpoint.")
    lines = "".join(f"{hash_file(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_text(file: Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def check_run(folder: Path, run: dict) -> None:
    """Notes what is asked of whom; refuses a folder that holds answers to anything else.

    Raises:
        ValueError: the folder is of another checkpoint, another file of questions or other settings.
    """
    file = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        if any(folder.glob("answers-*.jsonl")):
            raise ValueError(f"{folder} holds answers but no run.json; choose another --output.")
        write_json(file, run)
        return
    known = read_json(file).get("asked", {})
    if other := [key for key, value in run["asked"].items() if known.get(key) != value]:
        raise ValueError(
            f"{folder} holds answers of another run; what differs: {', '.join(other)} "
            f"({known.get(other[0])!r} there, {run['asked'][other[0]]!r} here). Choose another --output."
        )


def read_answers(folder: Path, mend: bool = False) -> dict[int, dict]:
    """Answers so far by the index of their question; `mend` as for `read_appended`."""
    files = sorted(folder.glob("answers-*.jsonl"))
    return {row["index"]: row for file in files for row in read_appended(file, mend)}


def write_predictions(questions: list[Question], folder: Path, model_id: str) -> int:
    """Writes the answers in the order of the questions, in the originals' format; returns how many there are."""
    answers, rows = read_answers(folder), []
    for index, question in enumerate(questions):
        if index not in answers:
            continue
        name = hashlib.sha256(f"{model_id} {index} {question.question_id}".encode()).hexdigest()[:22]
        row = {"question_id": question.question_id, "prompt": question.prompt, "text": answers[index]["text"]}
        rows.append({**row, **question.extra, "answer_id": name, "model_id": model_id, "metadata": {}})
    write_json_lines(folder / "predictions.jsonl", rows)
    return len(rows)


def list_asked(questions: list[Question]) -> dict:
    """Id -> the prompts of the questions that have it."""
    asked = defaultdict(list)
    for question in questions:
        asked[question.question_id].append(question.prompt)
    return dict(asked)


def score_run(folder: Path, run: dict, questions: Path | None, annotations: Path | None) -> Score:
    """The score of a folder's predictions; of reviews, where a judge wrote some."""
    reviews = folder / "reviews.jsonl"
    predictions = reviews if reviews.is_file() else folder / "predictions.jsonl"
    name, limit, asked = run["asked"]["task"], run["asked"]["limit"], None
    if limit:
        style = PROMPT_STYLES[run["asked"]["prompt_style"]]
        asked = list_asked(find_task(name)[1].read(questions, style)[:limit])
    score = score_task(name, predictions, questions, annotations, asked)
    for kind, names in run.get("problems", {}).items():
        score.problems[kind] = score.problems.get(kind, []) + names
    return score


def rescore(folder: Path, questions: Path | None = None, annotations: Path | None = None) -> dict:
    """Computes the results of a folder again from its predictions alone.

    Args:
        folder: of an evaluation.
        questions, annotations: where these files are now, if they were moved.

    Raises:
        ValueError: the folder holds no predictions, or the question file is another one.
    """
    if not (folder / "run.json").is_file() or not (folder / "predictions.jsonl").is_file():
        raise ValueError(f"{folder} holds no run.json with predictions.jsonl; expected a folder of `convllava eval`.")
    run = read_json(folder / "run.json")
    pairs = ((questions, run["questions"]), (annotations, run["annotations"]))
    questions, annotations = (Path(given or noted) if given or noted else None for given, noted in pairs)
    if questions and questions.is_file() and hash_text(questions) != run["asked"]["questions"]:
        raise ValueError(f"{questions} is not the question file of {folder}; pass that one as --questions.")
    score = score_run(folder, run, questions, annotations)
    old = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
    return write_results(folder, score, {key: old[key] for key in old if key not in ("numbers", "problems")})


def write_results(folder: Path, score: Score, extra: dict) -> dict:
    """Writes what a score tells: `results.json`, `outcomes.jsonl`, `original.json`, and a submission."""
    results = {"numbers": score.summarise(), "problems": score.count_problems(), **extra}
    write_json(folder / "original.json", score.original)
    write_json_lines(folder / "outcomes.jsonl", [vars(outcome) for outcome in score.outcomes])
    write_json(folder / "results.json", results)
    write_submission(folder, score.original)
    return results


def write_submission(folder: Path, original: dict) -> None:
    """The file for a benchmark's own server or script, in the format of the original's converter."""
    submission = original.get("submission")
    if isinstance(submission, dict):  # MMBench's table
        try:
            from openpyxl import Workbook
        except ImportError as error:
            raise ImportError("MMBench's table needs the extra `eval`: pip install 'convllava-hf[eval]'.") from error

        book = Workbook(write_only=True)
        sheet = book.create_sheet()
        for row in (submission["columns"], *submission["rows"]):
            sheet.append([None if cell == "" else cell for cell in row])
        book.save(folder / "submission.xlsx")
    elif submission and "prediction" in submission[0]:
        (folder / "submission.jsonl").write_text("".join(json.dumps(row) + "\n" for row in submission))
    elif submission is not None:
        (folder / "submission.json").write_text(json.dumps(submission))
    elif "predictions" in original:
        (folder / "submission.json").write_text(json.dumps(original["predictions"]))
    for name, text in original.get("converter", {}).items():
        (folder / "submission").mkdir(exist_ok=True)
        (folder / "submission" / name).write_text(text, encoding="utf-8")
