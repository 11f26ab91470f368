"""Asks a model the questions of a benchmark and scores its answers: in batches of one size, resumable, on several
processes."""

import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..images import ImageError
from .answering import Answerer, read_sizes
from .files import append_rows, write_json
from .questions import PROMPT_STYLES, PromptStyle, Question
from .results import check_run, hash_text, list_asked, read_answers, score_run, write_predictions, write_results
from .tasks import find_task, score_task


if TYPE_CHECKING:
    from accelerate import PartialState


PACKAGES = ("convllava-hf", "torch", "transformers", "pillow", "numpy")


def plan_batches(questions: list[Question], sizes: dict[int, tuple], batch_size: int) -> list[list[int]]:
    """Indices of questions in batches of alike images and texts; the plan depends on nothing else.

    Args:
        questions: all of them.
        sizes: index -> (height, width) of the image, `(0, 0)` without; questions that are not in it are left out.
        batch_size: largest batch.
    """
    groups = defaultdict(list)
    for index in sizes:
        groups[sizes[index]].append(index)
    batches = []
    # Large ones first: a batch that does not fit into memory then fails at once.
    for size in sorted(groups, key=lambda size: (-size[0] * size[1], size)):
        members = sorted(groups[size], key=lambda index: (-len(questions[index].text), index))
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
    return batches


def answer_all(
    questions: list[Question],
    batches: list[list[int]],
    answer: Answerer,
    file: Path,
    done: dict[int, dict],
    show_progress: bool = True,
    whole_batches: bool = True,
) -> tuple[dict[int, Exception], int, float]:
    """Answers what is not answered yet, batch by batch.

    Numbers of a batch depend on its other rows, in their last digits. So a batch that was half written is answered
    again as a whole, and its answers are those of an unbroken run; with `whole_batches=False` only what is missing is.

    Args:
        file: where answers are added.
        done: from `read_answers`, of before any process appends.

    Returns:
        Index -> error for questions without an answer; how many were asked, and in how many seconds.
    """
    errors, count, started = {}, 0, time.monotonic()
    first = sum(index in done for batch in batches for index in batch)
    progress = tqdm(total=sum(map(len, batches)), initial=first, unit=" samples", disable=not show_progress)
    for batch in batches:
        missing = [index for index in batch if index not in done]
        if not missing:
            continue
        batch, rows = batch if whole_batches else missing, []
        for index, text in zip(batch, answer([questions[index] for index in batch]), strict=True):
            if isinstance(text, Exception):
                errors[index] = text
            elif index not in done:
                rows.append({"index": index, "text": text})
        append_rows(file, rows)
        progress.update(len(missing))
        count += len(missing)  # which a progress bar that is not shown does not keep
    progress.close()
    return errors, count, time.monotonic() - started


def check_truths(name: str, questions: Path, annotations: Path | None, asked: dict) -> None:
    """Scores no answers at all, so that a file of truths that is missing is named before anything is asked.

    Raises:
        ValueError: it is missing, or does not fit the task.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "answers.jsonl").touch()
        score_task(name, Path(folder) / "answers.jsonl", questions, annotations, asked)


def gather(rows: list, state: "PartialState | None") -> list:
    """The rows of all processes, which all come here."""
    if state is None:
        return rows
    from accelerate.utils import gather_object

    return gather_object(rows)


def evaluate(
    task_name: str,
    questions: Path,
    output: Path,
    images: Path | None = None,
    annotations: Path | None = None,
    *,
    make_answerer: Callable[[PromptStyle, int, dict], Answerer],
    model_id: str,
    checkpoint_hash: str,
    prompt_style: str = "checkpoint",
    batch_size: int = 8,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    skip_bad_images: bool = False,
    settings: dict | None = None,
    state: "PartialState | None" = None,
    whole_batches: bool = True,
    judge: Callable[[Path], dict] | None = None,
) -> dict:
    """Asks a model a benchmark's questions and scores the answers. Interrupted, it goes on where it was.

    Args:
        task_name: one of `TASKS`.
        questions: the question file.
        output: folder of the results.
        images: folder of the images.
        annotations: truths in another file.
        make_answerer: (style, longest answer, settings) -> what answers a batch; called if there is work to do.
        model_id: noted beside each answer.
        checkpoint_hash: a folder of another checkpoint is refused.
        prompt_style: one of `PROMPT_STYLES`.
        batch_size: questions at a time.
        limit: only so many questions, from the first on.
        max_new_tokens: longest answer. Default: the original's.
        skip_bad_images: go on without questions whose image cannot be read; they count as not answered.
        settings: of generation.
        state: of the processes that share the work. Default: this one alone.
        whole_batches: see `answer_all`.
        judge: folder of the results -> more results; reads its predictions and writes `reviews.jsonl`.

    Returns:
        The content of results.json; of other processes than the first an empty dictionary.

    Raises:
        ValueError: images that cannot be read, no such task, truths or judge that it needs and does not have, or a
            folder with answers of another run.
    """
    name, task = find_task(task_name)
    if prompt_style not in PROMPT_STYLES:
        raise ValueError(f"prompt_style={prompt_style!r}; expected one of {', '.join(PROMPT_STYLES)}.")
    if name == "gpt_review" and judge is None:
        raise ValueError("gpt-review needs a judge; pass --judge-url URL.")
    style = PROMPT_STYLES[prompt_style]
    asked = task.read(questions, style)[:limit]
    check_truths(name, questions, annotations, list_asked(asked))
    settings, longest = dict(settings or {}), max_new_tokens or task.max_new_tokens
    run = {
        "asked": {
            "task": name,
            "checkpoint": checkpoint_hash,
            "questions": hash_text(questions),
            "prompt_style": prompt_style,
            "max_new_tokens": longest,
            "batch_size": batch_size,
            "limit": limit,
            "settings": settings,
        },
        "model": model_id,
        "questions": str(Path(questions).resolve()),
        "annotations": annotations and str(Path(annotations).resolve()),
        "images": images and str(Path(images).resolve()),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
    }
    sizes, bad = read_sizes(asked, images)
    if bad and not skip_bad_images:
        first = next(iter(bad))
        raise ValueError(
            f"{len(bad)} of {len(asked)} images cannot be read, the first of question {asked[first].question_id!r}: "
            f"{bad[first]}. Mend --images, or pass --skip-bad-images to count those questions as not answered."
        )
    rank, world = (state.process_index, state.num_processes) if state else (0, 1)
    if rank == 0:
        check_run(output, run)
        read_answers(output, mend=True)
    gather([], state)
    check_run(output, run)
    batches = plan_batches(asked, sizes, batch_size)[rank::world]
    done = read_answers(output)
    gather([], state)  # from here on the files grow
    errors, count, seconds = {}, 0, 0.0
    if any(index not in done for index in sizes):
        answerer = make_answerer(style, longest, settings)
        file = output / f"answers-{rank:03d}.jsonl"
        errors, count, seconds = answer_all(asked, batches, answerer, file, done, rank == 0, whole_batches)
    failures = [(asked[index].question_id, isinstance(error, ImageError)) for index, error in errors.items()]
    told = gather([{"failures": failures, "count": count, "seconds": seconds}], state)
    if rank:
        return {}
    failures = [failure for part in told for failure in part["failures"]]
    run["problems"] = {
        "images that cannot be read": [asked[index].question_id for index in bad]
        + [question for question, of_image in failures if of_image],
        "requests that failed": [question for question, of_image in failures if not of_image],
    }
    write_json(output / "run.json", run)
    count, seconds = sum(part["count"] for part in told), max(part["seconds"] for part in told)
    results = {
        "task": name,
        "model": model_id,
        "asked": run["asked"],
        "versions": run["versions"],
        "questions": len(asked),
        "answers": write_predictions(asked, output, model_id),
        "samples_per_second": count / seconds if seconds else None,  # of the process that took longest
    }
    if judge is not None:
        results["judge"] = judge(output)
    return write_results(output, score_run(output, run, questions, annotations), results)
