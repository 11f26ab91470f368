"""Asks a model the questions of a benchmark: in batches of one size, resumable, on several processes, or by a server.

A folder of results holds:

    run.json            what was asked of whom, with which settings
    answers-*.jsonl     answers as they came, one file per process; only ever appended to
    predictions.jsonl   the answers in the order of the questions
    results.json        numbers with intervals, problems, speed;  outcomes.jsonl: per question;  original.json: what the
                        original's code computes
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .. import __version__
from ..images import ImageError, limit_image_tokens, load_image, read_size
from ..shipped import build_chat_template
from .scores import Score, read_json, read_json_lines
from .tasks import PROMPT_STYLES, PromptStyle, Question, find_task, score_task


PACKAGES = ("torch", "transformers", "pillow", "numpy")
# Weights, and what else changes an answer.
HASHED = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.jinja", "processor*", "preprocessor*")
HASHED += ("onnx/*", "openvino/*", "executorch/*")  # the graphs of `convllava export`
Answerer = Callable[[list[Question]], list[str | Exception]]


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


def open_images(question: Question, folder: Path | None) -> list[bytes | Path | Image.Image]:
    """What `load_image` reads the images of a question from; raises ImageError where a file is missing."""
    found = []
    for image in question.image if isinstance(question.image, list) else [question.image]:
        if isinstance(image, str):
            image = Path(folder or ".") / image
            if not image.is_file():
                raise ImageError(f"{image}: no such file")
        if image is not None:
            found.append(image)
    return found


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


def read_sizes(questions: list[Question], images: Path | None) -> tuple[dict[int, tuple], dict[int, str]]:
    """Height and width of every image from its first bytes, and what is wrong with the others."""
    sizes, bad = {}, {}
    for index, question in enumerate(questions):
        try:
            sizes[index] = (0, 0)
            for source in open_images(question, images):
                if not isinstance(source, Image.Image):
                    is_content = isinstance(source, bytes)
                    source = {"bytes": source if is_content else None, "path": None if is_content else source}
                sizes[index] = read_size(source)
        except Exception as error:  # of files that are not there, and of what read_size says
            bad[index] = str(error)
            del sizes[index]
    return sizes, bad


def make_local_answerer(
    model, processor, images: Path | None, style: PromptStyle, max_new_tokens: int, settings: dict
) -> Answerer:
    """Answers batches with a model of this process.

    Args:
        model, processor: from `load`.
        images: folder of the images.
        style: how the question is put.
        max_new_tokens: longest answer.
        settings: `temperature`, `max_image_tokens`, `seed`.
    """
    import torch
    from transformers import GenerationConfig

    from ..inference.answer import list_stop_strings

    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    set_chat_template(processor, style)
    temperature = settings.get("temperature") or 0.0
    sampling = {"temperature": temperature} if temperature else {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=temperature > 0, **sampling)
    image_settings = {}
    if settings.get("max_image_tokens"):
        image_settings = limit_image_tokens(processor.image_processor, settings["max_image_tokens"])
    ends = list_stop_strings(model)
    config.stop_strings = ends or None
    original_rgb = getattr(processor.image_processor, "original_rgb", False)

    def answer(questions: list[Question]) -> list[str | Exception]:
        chats, answers = [], [None] * len(questions)
        for place, question in enumerate(questions):
            try:  # the first bytes of an image may be whole and the rest not
                found = [load_image(source, original_rgb=original_rgb) for source in open_images(question, images)]
            except ImageError as error:
                answers[place] = error
                continue
            chats.append(build_chat(question, found, style))
        if not chats:
            return answers
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **({"images_kwargs": image_settings} if image_settings else {})},
        ).to(model.device, model.dtype)
        if temperature:
            words = f"{settings.get('seed', 0)} {questions[0].question_id}"  # the same after an interruption
            torch.manual_seed(int(hashlib.sha256(words.encode()).hexdigest()[:8], 16))
        stops = {"tokenizer": tokenizer} if ends else {}
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, generation_config=config, **stops)[:, length:]  # (B, S + new) -> (B, new)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts = iter(strip_ends(text, ends) for text in texts)
        return [next(texts) if answer is None else answer for answer in answers]

    return answer


def set_chat_template(processor, style: PromptStyle) -> None:
    """Gives a processor the template of a style. What its own writes around an image stays, as it was trained."""
    if style.template:
        tag = re.search("set image_tag = '([^']+)'", processor.chat_template or "")
        processor.chat_template = build_chat_template(processor.tokenizer, style.template, tag and tag[1])


def strip_ends(text: str, ends: list[str]) -> str:
    """An answer without white space around it and without what ended it."""
    text = text.strip()
    for end in ends:
        text = text.removesuffix(end).rstrip()
    return text


def build_chat(question: Question, images: list[Image.Image], style: PromptStyle) -> list[dict]:
    """The chat of one question, its images where the style wants them."""
    text = question.text
    if "<image>" in text:
        raise ValueError(f"question {question.question_id!r} has '<image>' in its text; convert the file first.")
    pictures = [{"type": "image", "image": image} for image in images]
    if pictures and style.image_last:
        return [{"role": "user", "content": [{"type": "text", "text": f"{text}\n"}, *pictures]}]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def append_answers(file: Path, rows: list[dict]) -> None:
    """Adds rows to a file in one write, and waits until they are on the disk."""
    with open(file, "ab") as out:
        out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        out.flush()
        os.fsync(out.fileno())


def read_answers(folder: Path, mend: bool = False) -> dict[int, dict]:
    """Answers so far by the index of their question, without torn lines.

    Args:
        folder: of the results.
        mend: cut the line that a crash tore off its file. Only where no process appends: its line may be half visible.
    """
    rows = {}
    for file in sorted(folder.glob("answers-*.jsonl")):
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if mend and len(whole) < len(content):
            os.truncate(file, len(whole))
        rows |= {row["index"]: row for row in map(json.loads, whole.splitlines())}
    return rows


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
    known = read_json(file)
    if other := [key for key in run["asked"] if known.get("asked", {}).get(key) != run["asked"][key]]:
        raise ValueError(
            f"{folder} holds answers of another run; what differs: {', '.join(other)} "
            f"({known.get('asked', {}).get(other[0])!r} there, {run['asked'][other[0]]!r} here). "
            "Choose another --output."
        )


def write_json(file: Path, content) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)


def answer_all(
    questions: list[Question],
    batches: list[list[int]],
    answer: Answerer,
    folder: Path,
    done: dict[int, dict],
    rank: int = 0,
    world: int = 1,
    whole_batches: bool = True,
) -> tuple[dict[int, Exception], int, float]:
    """Answers what is not answered yet, batch by batch of the plan.

    Numbers of a batch depend on its other rows, in their last digits. So a batch that was half written is answered
    again as a whole, and its answers are those of an unbroken run; with `whole_batches=False` only what is missing is.

    Args:
        done: from `read_answers`, of before any process appends.

    Returns:
        Index -> error for questions without an answer; how many were asked, and in how many seconds.
    """
    errors = {}
    file = folder / f"answers-{rank:03d}.jsonl"
    mine = batches[rank::world]
    first, started, count = sum(index in done for batch in mine for index in batch), time.monotonic(), 0
    progress = tqdm(total=sum(map(len, mine)), initial=first, unit=" samples", disable=rank > 0)
    for batch in mine:
        missing = [index for index in batch if index not in done]
        if not missing:
            continue
        batch, rows = batch if whole_batches else missing, []
        for index, text in zip(batch, answer([questions[index] for index in batch]), strict=True):
            if isinstance(text, Exception):
                errors[index] = text
            elif index not in done:
                rows.append({"index": index, "text": text})
        append_answers(file, rows)
        progress.update(len(missing))
        count += len(missing)  # which a progress bar that is not shown does not keep
    progress.close()
    return errors, count, time.monotonic() - started


def write_predictions(questions: list[Question], folder: Path, model_id: str) -> int:
    """Writes the answers in the order of the questions, in the originals' format; returns how many there are."""
    answers = read_answers(folder)
    lines = []
    for index, question in enumerate(questions):
        if index not in answers:
            continue
        name = hashlib.sha256(f"{model_id} {index} {question.question_id}".encode()).hexdigest()[:22]
        row = {"question_id": question.question_id, "prompt": question.prompt, "text": answers[index]["text"]}
        lines.append({**row, **question.extra, "answer_id": name, "model_id": model_id, "metadata": {}})
    temporary = folder / ".predictions.jsonl"
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(folder / "predictions.jsonl")
    return len(lines)


def write_results(folder: Path, score: Score, extra: dict) -> dict:
    """Writes what a score tells: `results.json`, `outcomes.jsonl`, `original.json`, and a submission."""
    results = {"numbers": score.summarise(), "problems": score.count_problems(), **extra}
    write_json(folder / "original.json", score.original)
    lines = [json.dumps(vars(outcome), ensure_ascii=False) + "\n" for outcome in score.outcomes]
    (folder / "outcomes.jsonl").write_text("".join(lines), encoding="utf-8")
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
    elif submission is not None and submission and "prediction" in submission[0]:
        (folder / "submission.jsonl").write_text("".join(json.dumps(row) + "\n" for row in submission))
    elif submission is not None:
        (folder / "submission.json").write_text(json.dumps(submission))
    elif "predictions" in original:
        (folder / "submission.json").write_text(json.dumps(original["predictions"]))
    for name, text in original.get("converter", {}).items():
        (folder / "submission").mkdir(exist_ok=True)
        (folder / "submission" / name).write_text(text, encoding="utf-8")


def rescore(folder: Path, questions: Path | None = None, annotations: Path | None = None) -> dict:
    """Computes the results of a folder again from its predictions alone.

    Args:
        folder: of an evaluation.
        questions, annotations: where these files are now, if they were moved.

    Raises:
        ValueError: the folder holds no predictions, or the question file is another one.
    """
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else None
    if run is None or not (folder / "predictions.jsonl").is_file():
        raise ValueError(f"{folder} holds no run.json with predictions.jsonl; expected a folder of `convllava eval`.")
    pairs = ((questions, run["questions"]), (annotations, run["annotations"]))
    files = [Path(given or noted) if given or noted else None for given, noted in pairs]
    if files[0] and files[0].is_file() and hash_text(files[0]) != run["asked"]["questions"]:
        raise ValueError(f"{files[0]} is not the question file of {folder}; pass that one as --questions.")
    score = score_run(folder, run, files[0], files[1])
    old = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
    kept = {key: value for key, value in old.items() if key not in ("numbers", "problems")}
    results = write_results(folder, score, kept)
    return results


def score_run(folder: Path, run: dict, questions: Path | None, annotations: Path | None) -> Score:
    """The score of a folder's predictions; of reviews, where a judge wrote some."""
    reviews = folder / "reviews.jsonl"
    predictions = reviews if reviews.is_file() else folder / "predictions.jsonl"
    name, limit = run["asked"]["task"], run["asked"]["limit"]
    asked = None
    if limit:
        style = PROMPT_STYLES[run["asked"]["prompt_style"]]
        asked = list_asked(find_task(name)[1].read(questions, style)[:limit])
    score = score_task(name, predictions, questions, annotations, asked)
    for kind, names in run.get("problems", {}).items():
        score.problems[kind] = score.problems.get(kind, []) + names
    return score


def list_asked(questions: list[Question]) -> dict:
    """Id -> the prompts of the questions that have it."""
    asked = defaultdict(list)
    for question in questions:
        asked[question.question_id].append(question.prompt)
    return dict(asked)


def check_truths(name: str, questions: Path, annotations: Path | None, asked: dict) -> None:
    """Scores no answers at all, so that a file of truths that is missing is named before anything is asked.

    Raises:
        ValueError: it is missing, or does not fit the task.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "answers.jsonl").touch()
        score_task(name, Path(folder) / "answers.jsonl", questions, annotations, asked)


def hash_text(file: Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def describe_versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    versions = {"convllava-hf": __version__, "python": platform.python_version()}
    return versions | {name: version(name) for name in PACKAGES}


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
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
    whole_batches: bool = True,
    judge: Callable[[list[dict], Path], dict] | None = None,
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
        rank, world: this process among all that share the work.
        wait: returns when all processes have come here.
        whole_batches: see `answer_all`.
        judge: (predictions, folder) -> more results; writes `reviews.jsonl`.

    Returns:
        The content of results.json; of other processes than the first an empty dictionary.

    Raises:
        ValueError: images that cannot be read, no such task, truths or judge that it needs and does not have, or a
            folder with answers of another run.
    """
    name, task = find_task(task_name)
    if prompt_style not in PROMPT_STYLES:
        raise ValueError(f"prompt_style={prompt_style!r}; expected one of {', '.join(PROMPT_STYLES)}.")
    style = PROMPT_STYLES[prompt_style]
    asked = task.read(questions, style)[:limit]
    if name == "gpt_review" and judge is None:
        raise ValueError("gpt-review needs a judge; pass --judge-url URL.")
    check_truths(name, questions, annotations, list_asked(asked))
    settings = dict(settings or {})
    longest = max_new_tokens or task.max_new_tokens
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
        "versions": describe_versions(),
    }
    sizes, bad = read_sizes(asked, images)
    if bad and not skip_bad_images:
        first = next(iter(bad))
        raise ValueError(
            f"{len(bad)} of {len(asked)} images cannot be read, the first of question {asked[first].question_id!r}: "
            f"{bad[first]}. Mend --images, or pass --skip-bad-images to count those questions as not answered."
        )
    if rank == 0:
        check_run(output, run)
    wait()
    check_run(output, run)
    batches = plan_batches(asked, sizes, batch_size)
    done = read_answers(output, mend=True)
    wait()
    errors, count, seconds = {}, 0, 0.0
    if any(index not in done for index in sizes):
        answerer = make_answerer(style, longest, settings)
        errors, count, seconds = answer_all(asked, batches, answerer, output, done, rank, world, whole_batches)
    unread, failed = (
        [asked[index].question_id for index, error in errors.items() if isinstance(error, ImageError) == of_image]
        for of_image in (True, False)
    )
    told = {"unread": unread, "failed": failed, "count": count, "seconds": seconds}
    write_json(output / f".told-{rank:03d}.json", told)
    wait()
    if rank:
        return {}
    told = []
    for file in sorted(output.glob(".told-*.json")):
        told.append(read_json(file))
        file.unlink()
    seconds = max(part["seconds"] for part in told)  # of the process that took longest
    speed = sum(part["count"] for part in told) / seconds if seconds else None
    count = write_predictions(asked, output, model_id)
    run["problems"] = {
        "images that cannot be read": [asked[index].question_id for index in bad]
        + [name for part in told for name in part["unread"]],
        "requests that failed": [name for part in told for name in part["failed"]],
    }
    write_json(output / "run.json", run)
    extra = {"task": name, "model": model_id, "asked": run["asked"], "versions": run["versions"]}
    extra |= {"questions": len(asked), "answers": count, "samples_per_second": speed}
    if judge is not None:
        extra["judge"] = judge(read_json_lines(output / "predictions.jsonl"), output)
    return write_results(output, score_run(output, run, questions, annotations), extra)
