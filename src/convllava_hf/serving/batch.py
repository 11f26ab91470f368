"""Answers to whole folders and data sets: one JSON line per row, resumable, bad rows named.

`BatchAnswerer` is a function of batches of columns, as `datasets.map` and Ray Data's `map_batches` take it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

from PIL import Image

from ..images import list_images, undecode_images
from ..inference.load import load
from ..registration import register
from .engine import Engine, Event, Job, Settings
from .prompts import Prompt, build_input_ids, hash_image, prepare_image
from .requests import RequestError


class BatchAnswerer:
    """Answers batches of rows with a checkpoint; the model loads with the first batch, so instances travel to workers.

    Args:
        checkpoint: Hub id or path.
        max_new_tokens: longest answer.
        max_image_tokens: budget of each image; `None` as trained.
        max_pixels: images with more are named as bad.
        max_batch: most rows that the model answers together.
        load_options: arguments of `inference.load.load`.
    """

    def __init__(
        self,
        checkpoint: str,
        max_new_tokens: int = 512,
        max_image_tokens: int | None = None,
        max_pixels: int = 89_000_000,
        max_batch: int = 8,
        load_options: dict | None = None,
    ):
        self.checkpoint, self.max_new_tokens, self.max_image_tokens = checkpoint, max_new_tokens, max_image_tokens
        self.max_pixels, self.max_batch, self.load_options = max_pixels, max_batch, load_options or {}
        self._engine = None

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Answers the rows of a batch.

        Args:
            batch: columns `id`, `question` and `images` (for each row a list of paths, or of the bytes of files).

        Returns:
            Columns `id`, `question`, `answer` and `error`: one of the last two is `None` in each row.
        """
        if self._engine is None:
            register()
            model, processor = load(self.checkpoint, **self.load_options)
            self._engine = Engine(model, processor, self.max_batch, cache_bytes=0)
        rows, jobs = [], []
        for question, images in zip(batch["question"], batch["images"], strict=True):
            events = SimpleQueue()
            try:
                jobs.append(self._prepare(str(question), list(images), events))
            except (RequestError, OSError) as error:
                events.put(Event(error=error))
            rows.append(events)
        self._engine.submit(*jobs)
        found = [_collect(events) for events in rows]
        answers = {"answer": [answer for answer, _ in found], "error": [error for _, error in found]}
        return {"id": list(batch["id"]), "question": list(batch["question"]), **answers}

    def _prepare(self, question: str, images: list[str | bytes], events: SimpleQueue) -> Job:
        engine, prepared = self._engine, []
        for number, source in enumerate(images, start=1):
            data = Path(source).read_bytes() if isinstance(source, str) else bytes(source)
            key = hash_image(data, self.max_image_tokens)
            try:
                prepared.append(prepare_image(engine.processor, data, key, self.max_pixels, self.max_image_tokens))
            except RequestError as error:
                raise RequestError(f"{source if isinstance(source, str) else f'image {number}'}: {error}") from error
        content = [*({"type": "image"} for _ in prepared), {"type": "text", "text": question}]
        counts = [image.num_tokens for image in prepared]
        input_ids = build_input_ids(engine.processor, [{"role": "user", "content": content}], counts, engine.context)
        prompt = Prompt(input_ids, prepared)
        return Job(prompt, Settings(engine.choose_length(prompt, self.max_new_tokens, self.max_new_tokens)), events.put)

    def __getstate__(self) -> dict:
        return {**vars(self), "_engine": None}

    def close(self) -> None:
        """Stops the engine."""
        if self._engine is not None:
            self._engine.close()


def _collect(events: SimpleQueue) -> tuple[str | None, str | None]:
    """Waits for the end of an answer: its text, or what went wrong."""
    pieces = []
    while True:
        event = events.get()
        if event.error is not None:
            return None, str(event.error) or type(event.error).__name__
        pieces.append(event.text)
        if event.finish_reason is not None:
            return "".join(pieces), None


def list_rows(source: str, question: str | None, split: str = "train") -> Iterator[dict]:
    """The rows to answer.

    Args:
        source: a folder of images (searched with its subfolders), a file of datasets' formats (.jsonl, .parquet ...),
            or the Hub id of a data set. A data set has `images` or `image`, and where `question` is missing a column
            `question`; a column `id` names its rows.
        question: asked about every row; `None` takes the column.
        split: of the data set.

    Yields:
        `{"id", "question", "images"}`, images as paths or bytes.

    Raises:
        ValueError: no images in a folder, or no question.
    """
    folder = Path(source)
    if folder.is_dir():
        if not question:
            raise ValueError(f"{source} is a folder of images: --question says what to ask about each.")
        suffixes = Image.registered_extensions()
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
        if not paths:
            raise ValueError(f"{source} holds no images.")
        for path in paths:
            yield {"id": path.relative_to(folder).as_posix(), "question": question, "images": [str(path)]}
        return
    from datasets import load_dataset

    if folder.is_file():
        kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
        if folder.suffix not in kind:
            raise ValueError(f"{source}: expected a folder, or a file ending in {', '.join(kind)}.")
        rows = load_dataset(kind[folder.suffix], data_files=source, split="train", streaming=True)
    else:
        rows = load_dataset(source, split=split, streaming=True)
    if rows.features and any(
        name in rows.features and "Image" in str(rows.features[name]) for name in ("image", "images")
    ):
        rows = undecode_images(rows)
    for number, row in enumerate(rows):
        asked = question or row.get("question")
        if not isinstance(asked, str):
            raise ValueError(f"row {number} of {source} has no question; --question asks one about every row.")
        images = [_find_bytes(image, folder.parent) for image in list_images(row)]
        yield {"id": row.get("id", number), "question": asked, "images": images}


def _find_bytes(image: dict | str | bytes, folder: Path) -> str | bytes:
    """The bytes of an undecoded image, or its path; paths in a file are relative to that file."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or ""
    return str(folder / image) if isinstance(image, str) else image


def answer_rows(
    answerer: BatchAnswerer, rows: Iterable[dict], output: Path, rows_per_batch: int = 32
) -> tuple[int, int]:
    """Appends an answer for each row to a file; rows that are in it already are skipped.

    Args:
        answerer: answers batches.
        rows: from `list_rows`.
        output: see `append_answers`.
        rows_per_batch: rows between two writes.

    Returns:
        How many rows were answered now, and how many of them could not be.
    """
    rows = skip_done(rows, output)

    def answer_chunks() -> Iterator[dict[str, list]]:
        while chunk := list(islice(rows, rows_per_batch)):
            yield answerer({key: [row[key] for row in chunk] for key in ("id", "question", "images")})

    return append_answers(answer_chunks(), output)


def append_answers(batches: Iterable[dict[str, list]], output: Path) -> tuple[int, int]:
    """Appends answers to a file, each batch as soon as it is there.

    Args:
        batches: what `BatchAnswerer` returns.
        output: JSON lines `{"id", "question", "answer", "error"}`.

    Returns:
        The number of rows, and how many of them have an error.
    """
    answered = failed = 0
    with output.open("a", encoding="utf-8") as file:
        for batch in batches:
            for values in zip(*batch.values(), strict=True):
                line = dict(zip(batch, values, strict=True))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                answered, failed = answered + 1, failed + (line["error"] is not None)
            file.flush()
            os.fsync(file.fileno())
    return answered, failed


def skip_done(rows: Iterable[dict], output: Path) -> Iterator[dict]:
    """The rows that a file of answers does not hold yet; what a killed run left unfinished there is cut off.

    Raises:
        ValueError: the file holds something else.
    """
    done = set()  # ids, as JSON
    with output.open("rb+") if output.exists() else BytesIO() as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.seek(-len(line), os.SEEK_END)
                file.truncate()
                break
            try:
                done.add(json.dumps(json.loads(line)["id"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{output} holds a line that is no answer; name another file.") from error
    return (row for row in rows if json.dumps(row["id"]) not in done)
