"""LLaVA-format JSON to a dataset for training: parquet files in the form that TRL reads, and a report.

The JSON is never in memory as a whole: one process cuts it into the texts of rows, the others parse, check and write a
shard each. A shard is done when its own report is there, which is written last; what is interrupted goes on from there,
and where rows were mended in between, their shards are made anew.

The columns: `messages`, `images`, `image_sizes` (`[[H, W]]` in pixels, upright), `id` of the row in its file, and with
a checkpoint `text_tokens`, the tokens of the row without those of its images. Trainers that do not know the last three
drop them; ours sorts rows by length with them, whatever size the images are trained at.
"""

import hashlib
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..checkpoints.staging import MANIFEST, check_output, name_stale, put_in_place
from ..checkpoints.weight_maps import ConversionError
from ..tokens import count_image_tokens
from .holdout import LEFT_OUT, SPLITS, TEST, TRAIN, plan_holdout
from .pictures import check_image, find_image
from .report import DataReport, describe_bad_row, report_bad_row
from .rows import (
    BadRow,
    blame_row,
    check_messages,
    convert_row,
    count_images,
    cut_messages,
    iterate_json,
    parse_row,
)
from .sources import Source, check_sources, count_copies, name_apart


REPORT, STATE, UNFINISHED = "build_report.json", ".build", ".partial"
# What an unfinished build consists of.
WRITTEN = re.compile(
    rf"(?:{re.escape(STATE)}/[^/]+\.json|{REPORT})(?:\.tmp)?|{re.escape(MANIFEST)}"
    rf"|(?:{'|'.join(SPLITS)})/(?:[^/]+-\d{{5,}}\.parquet|\.[^/]+-\d{{5,}}\.parquet\.tmp)"
)
SHARD_ROWS = {"bytes": 1000, "paths": 5000}
GROUP_ROWS, GROUP_BYTES = 250, 32 * 2**20  # of a row group: what a reader and a writer hold at once


@dataclass(frozen=True)
class Settings:
    """How rows are made; everything that `build_dataset` takes but where to, how fast, and what on errors."""

    images: str = "bytes"
    verify: str = "decode"
    max_length: int | None = None
    long_rows: str = "error"
    shard_rows: int | None = None
    processor: object = None
    follow_links: bool = False
    holdout: int = 0

    def __post_init__(self):
        allowed = {"images": ("bytes", "paths"), "verify": ("decode", "header"), "long_rows": ("error", "cut")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected {' or '.join(map(repr, values))}.")
        if self.max_length is not None and self.processor is None:
            raise ValueError("max_length needs a processor (--model): tokens are counted with it.")
        if self.holdout < 0:
            raise ValueError(f"holdout={self.holdout}; expected a number of rows, 0 for none.")


def build_dataset(
    sources: Iterable[Source | tuple[str | Path, str | Path | None]],
    output: str | Path,
    *,
    images: str = "bytes",
    num_proc: int = 1,
    on_error: str = "stop",
    verify: str = "decode",
    processor=None,
    max_length: int | None = None,
    long_rows: str = "error",
    shard_rows: int | None = None,
    follow_links: bool = False,
    holdout: int = 0,
    force: bool = False,
    show_progress: bool = True,
) -> DataReport:
    """Builds a dataset that `datasets.load_dataset(output)` reads, streaming too, and that TRL trains on.

    Everything is written to `output` + ".partial" and renamed at the end. An interrupted build goes on from its last
    finished shards; those whose rows were edited in between are made anew. One source alone:
    `load_dataset(output, data_files="train/NAME-*.parquet")`.

    Args:
        sources: or pairs of a JSON file and an image root.
        output: folder to make.
        images: "bytes" copies the image files into the dataset, "paths" refers to them.
        num_proc: processes that parse, check and write.
        on_error: "stop" at bad rows, or "skip" them; either way they are named.
        verify: how images are checked: "decode" or "header".
        processor: of the checkpoint to train; tokens are counted with it.
        max_length: most tokens of a row.
        long_rows: what to do with longer ones, see `cut_messages`.
        shard_rows: rows of the JSON per parquet file.
        follow_links: take images that a symbolic link below the image root leads to outside of it.
        holdout: about so many rows become the split `test`, see `holdout`; no image is in both splits.
        force: replace a dataset that was built here and that nobody has changed since, and an unfinished build with
            other settings.
        show_progress: a progress bar on stderr.

    Returns:
        The report, which is also `output`/build_report.json.

    Raises:
        FileNotFoundError: sources that are not there; all of them are named before anything starts.
        FileExistsError: `output` exists, or an unfinished build with other settings does; with `force`, only if either
            holds what no build wrote.
        ValueError: a bad row with `on_error="stop"`, broken JSON, or not the number of rows that a source must have.
    """
    sources = [source if isinstance(source, Source) else Source(*source) for source in sources]
    shard_rows = shard_rows or SHARD_ROWS.get(images)
    settings = Settings(images, verify, max_length, long_rows, shard_rows, processor, follow_links, holdout)
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r}; expected 'stop' or 'skip'.")
    sources = name_apart(sources)
    check_sources(sources)
    get_schema(processor is not None)  # before workers start, so that they share what it imports
    output = Path(os.path.expanduser(output)).resolve()
    work = output.with_name(output.name + UNFINISHED)
    report = DataReport(settings=_describe_build(sources, settings))
    _prepare_folder(output, work, report.settings, force)
    report.counts = {source.name: {"read": 0, "skipped": 0, "written": 0} for source in sources}
    names, total = set(), sum(source.json.stat().st_size for source in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="building", disable=not show_progress) as bar:
        tasks = _cut_shards(sources, work, settings)
        for shard, state, done in _run_shards(tasks, settings, num_proc, on_error):
            report.add(shard.source.name, done["counts"], done["bad_rows"], done["lengths"])
            if state != "new":
                report.resumed[state] += 1
            names.add(shard.name)
            bar.update(shard.size)
            bar.set_postfix(rows=report.totals.get("written", 0), skipped=report.totals.get("skipped", 0))
    report.bad_rows.sort(key=lambda bad: (bad["file"], bad["row"]))
    if not report.totals.get("written"):
        raise ValueError(f"no row is left to train on; mend them and run the same command again.\n{report.summary()}")
    _finish(report, names, work, output, force)
    return report


def _describe_build(sources: list[Source], settings: Settings) -> dict:
    """What all shards depend on. Whether a shard's own rows are still the same is told by its report."""
    described = []
    for source in sources:
        entry = {key: value for key, value in asdict(source).items() if key not in ("rows", "rows_tolerance", "origin")}
        root = source.image_root and str(source.image_root.resolve())
        described.append({**entry, "json": str(source.json.resolve()), "image_root": root})
    values = {key: value for key, value in vars(settings).items() if key != "processor"}
    model = getattr(getattr(settings.processor, "tokenizer", None), "name_or_path", None)
    image_processor = getattr(settings.processor, "image_processor", None)
    prepared = image_processor and image_processor.to_dict()
    described = {"sources": described, **values, "model": model, "image_processor": prepared}
    return json.loads(json.dumps(described, default=str))


def _prepare_folder(output: Path, work: Path, description: dict, force: bool) -> None:
    _check_place(output, work, force)
    file = work / STATE / "settings.json"
    begun = file.is_file() or any(work.rglob("*.parquet"))  # else it was killed before
    if work.exists() and begun and not force and not file.is_file():
        raise FileExistsError(f"{work} holds files of no build that goes on; remove it, or start anew with --force.")
    if work.exists() and (force or not begun):
        doomed = work.with_name(f".{output.name}.incomplete-{secrets.token_hex(4)}")
        work.rename(doomed)  # what is half deleted is no build to go on with
        shutil.rmtree(doomed)
    if work.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [key for key in description if before.get(key) != description[key]]:
            raise FileExistsError(
                f"{work} holds an unfinished build with other settings ({', '.join(changed)}); go on with the same "
                "ones, remove it, or start anew with --force."
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (work / split).mkdir(exist_ok=True)
    _write_json(file, description)


def _check_place(output: Path, work: Path, force: bool) -> None:
    """Refuses to replace, or to take along, what no build wrote."""
    name_stale(output, "incomplete")
    try:
        check_output(output, force)
    except ConversionError as error:
        raise FileExistsError(str(error)) from error
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and (name in (STATE, *SPLITS) or any(path.iterdir())):
            continue
        if path.is_symlink() or is_folder or not WRITTEN.fullmatch(name):
            raise FileExistsError(f"{work} holds {name}, which is of no unfinished build; move it elsewhere.")


def _write_json(path: Path, content: dict) -> None:
    """Writes a file that is either whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


@dataclass
class _Shard:
    source: Source
    name: str
    work: Path
    first_row: int
    # Text of a row, its line in the file, how often it is used, and in which split.
    rows: list[tuple[str, int, int, int]] = field(default_factory=list)
    size: int = 0  # bytes of JSON

    @property
    def report(self) -> Path:
        return self.work / STATE / f"{self.name}.json"

    def get_path(self, split: int) -> Path:
        return self.work / SPLITS[split] / f"{self.name}.parquet"

    @property
    def digest(self) -> str:
        """Tells whether the rows are the same; their lines may move."""
        digest = hashlib.blake2b(digest_size=16)
        for text, _, copies, split in self.rows:
            digest.update(f"{len(text)} {copies} {split} {text}".encode(errors="surrogatepass"))
        return digest.hexdigest()


def _cut_shards(sources: list[Source], work: Path, settings: Settings) -> Iterator[_Shard]:
    """Cuts the sources into shards, and checks their numbers of rows."""
    held = plan_holdout(sources, settings.holdout) if settings.holdout else None
    for index, source in enumerate(sources):
        number, size, seen, shard = 0, 0, 0, None
        for text, line, size in iterate_json(source.json):
            if shard is None:
                shard = _Shard(source, f"{source.name}-{number // settings.shard_rows:05}", work, number)
            shard.rows.append((text, line, count_copies(number, source.weight), held[index][number] if held else TRAIN))
            number += 1
            if len(shard.rows) == settings.shard_rows:
                shard.size, seen = size - seen, size
                yield shard
                shard = None
        if shard is not None:
            shard.size = size - seen
            yield shard
        if source.rows is not None and abs(number - source.rows) > source.rows * source.rows_tolerance:
            about = "about " if source.rows_tolerance else ""
            raise ValueError(
                f"{source.json} has {number:,} rows; expected {about}{source.rows:,}. Is it the right file, and "
                "complete? If so, change `rows` in the mixture; what has been built stays."
            )


def _run_shards(
    tasks: Iterable[_Shard], settings: Settings, num_proc: int, on_error: str
) -> Iterator[tuple[_Shard, str, dict]]:
    """Builds the shards that are not there yet, at most `num_proc + 2` of them in memory.

    Returns:
        Each shard without its rows, "new", "kept" or "redone", and its report.
    """

    def collect(shard: _Shard, state: str, bad_rows: list[dict]) -> tuple[_Shard, str, dict]:
        if bad_rows and on_error == "stop":
            shown = "; ".join(describe_bad_row(bad) for bad in bad_rows[:5])
            more = f"; and {len(bad_rows) - 5} more in the same shard" if len(bad_rows) > 5 else ""
            raise ValueError(
                f"{shown}{more}. Mend them and run the same command again, which goes on from here; or leave them out "
                "with --on-error skip."
            )
        return replace(shard, rows=[]), state, json.loads(shard.report.read_text(encoding="utf-8"))

    keep = on_error == "skip"
    if num_proc <= 1:
        for shard in tasks:
            state = _look_up(shard, keep)
            yield collect(shard, state, [] if state == "kept" else _build_shard(shard, settings, keep))
        return
    # Other ways of starting a process import the caller's script once more.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(settings, keep))
    running: dict = {}
    try:
        for shard in tasks:
            state = _look_up(shard, keep)
            if state == "kept":
                yield collect(shard, state, [])
                continue
            running[pool.submit(_build_in_worker, shard)] = replace(shard, rows=[]), state
            if len(running) >= num_proc + 2:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield collect(*running.pop(future), future.result())
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield collect(*running.pop(future), future.result())
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, perhaps for its memory: go on with the same command and fewer processes."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_settings: tuple = ()


def _start_worker(settings: Settings, keep: bool) -> None:
    """Prepares a worker: it ends at once, and without a word, at Ctrl-C and when its parent is killed."""
    global _worker_settings
    _worker_settings = settings, keep
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _build_in_worker(shard: _Shard) -> list[dict]:
    return _build_shard(shard, *_worker_settings)


def _look_up(shard: _Shard, keep: bool) -> str:
    """Whether a shard is "new", whole ("kept"), or there with other rows ("redone")."""
    try:
        report = json.loads(shard.report.read_text(encoding="utf-8"))
        rows = [pq.read_metadata(shard.get_path(split)).num_rows for split in (TRAIN, TEST)]
        if rows != [report["counts"]["written"], report["counts"]["held_out"]]:
            return "new"
        if report["digest"] != shard.digest:
            return "redone"
        return "kept" if keep or not report["bad_rows"] else "new"
    except (OSError, ValueError, KeyError):  # a machine that lost power may have left any of the files empty
        return "new"


@cache
def get_schema(counts_tokens: bool = False) -> pa.Schema:
    """Columns of the dataset; its metadata tells `datasets` that `images` are images."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    columns = {
        "messages": List(message),
        "images": List(ImageFeature()),
        "image_sizes": List(List(Value("int32"))),
        "id": Value("string"),
        **({"text_tokens": Value("int32")} if counts_tokens else {}),
    }
    return Features(columns).arrow_schema


class _ShardWriter:
    """Writes one parquet file in groups of rows; it gets its name when it is whole."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema, self.group, self.size = path, schema, [], 0
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.writer = pq.ParquetWriter(self.temporary, schema, compression="zstd")

    def write(self, row: dict) -> None:
        self.group.append(row)
        self.size += sum(len(image["bytes"] or "") for image in row["images"])
        if len(self.group) == GROUP_ROWS or self.size >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.group:
            self.writer.write_table(pa.Table.from_pylist(self.group, self.schema))
            self.group, self.size = [], 0

    def close(self, keep: bool) -> None:
        try:
            if keep:
                self.flush()
        finally:
            self.writer.close()
        if keep:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink()


def _build_shard(shard: _Shard, settings: Settings, keep: bool) -> list[dict]:
    """Writes a shard and then its report; returns its bad rows. With bad rows and without `keep`, writes nothing."""
    counts, lengths, bad_rows = Counter(read=len(shard.rows), skipped=0, written=0, held_out=0), Counter(), []
    schema = get_schema(settings.processor is not None)
    writers = [_ShardWriter(shard.get_path(split), schema) for split in (TRAIN, TEST)]
    for number, (text, line, copies, split) in enumerate(shard.rows, shard.first_row):
        if copies == 0 or split == LEFT_OUT:
            counts["left_out" if copies == 0 else "shares_image"] += 1
            continue
        name = None
        try:
            with blame_row():
                source_row = parse_row(text)
                name = source_row.get("id") if isinstance(source_row, dict) else None
                name = None if name is None else str(name).encode(errors="replace").decode()
                row, length = _make_row(source_row, shard.source, settings, counts)
        except BadRow as error:
            counts["skipped"] += 1
            bad_rows.append(report_bad_row(error, shard.source.json, number, text=text, line=line, id=name))
            continue
        copies = copies if split == TRAIN else 1  # weights are for training
        counts["repeated"] += copies - 1
        counts["written" if split == TRAIN else "held_out"] += copies
        counts["images"] += copies * len(row["images"])
        counts["text_only"] += copies * (not row["images"])
        if length is not None:
            lengths[length] += copies
        for _ in range(copies):
            writers[split].write({**row, "id": name})
    whole = keep or not bad_rows
    for writer in writers:
        writer.close(whole)
    if whole:
        report = {"digest": shard.digest, "counts": counts, "lengths": lengths, "bad_rows": bad_rows}
        _write_json(shard.report, report)
    return bad_rows


def _make_row(row: dict, source: Source, settings: Settings, counts: Counter) -> tuple[dict, int | None]:
    """Converts and checks a row; also gives its tokens, if they are counted. See `BadRow` for what it raises."""
    messages, names, dropped = convert_row(row, source.image_placement)
    check_messages(messages, len(names))
    images, sizes, length = [], [], None
    for name in names:
        path = find_image(name, source.image_root, settings.follow_links)
        image = {"bytes": None, "path": str(path.absolute())}
        if settings.images == "bytes":
            try:
                image = {"bytes": path.read_bytes(), "path": path.name}
            except OSError as error:
                raise BadRow("missing image", f"{path}: {error.strerror}") from error
        sizes.append(check_image(image, str(path), settings.verify))
        images.append(image)
    if settings.processor is not None:
        kept, length = cut_messages(messages, sizes, settings.processor, settings.max_length, settings.long_rows)
        counts["cut"] += len(kept) < len(messages)
        messages, number = kept, count_images(kept)
        images, sizes = images[:number], sizes[:number]
    made = {"messages": messages, "images": images, "image_sizes": [list(size) for size in sizes]}
    if length is not None:
        made["text_tokens"] = length - sum(count_image_tokens(sizes, settings.processor))
    counts["dropped_first_turns"] += dropped
    return made, length


def _finish(report: DataReport, names: set[str], work: Path, output: Path, force: bool) -> None:
    """Writes the report, and gives the folder its final name."""
    _check_place(output, work, force)
    for split in SPLITS:
        for path in (work / split).iterdir():
            # What is left of shards that are no more, of killed writers, and empty ones, at which `datasets` fails.
            if path.suffix != ".parquet" or path.stem not in names or pq.read_metadata(path).num_rows == 0:
                path.unlink()
        if not any((work / split).iterdir()):
            (work / split).rmdir()
    _write_json(work / REPORT, report.to_dict())
    put_in_place(work, output, force)
    shutil.rmtree(output / STATE)  # last, so that what is killed before goes on from there
