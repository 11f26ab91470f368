"""LLaVA-format JSON to a dataset for training: parquet files with the columns `messages` and `images`, and a report.

The JSON is never in memory as a whole: one process cuts it into the texts of rows, the others parse, check and write a
shard each. A shard is done when its own report is there, which is written last; what is interrupted goes on from there.
"""

import json
import math
import multiprocessing
import os
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

from .rows import (
    BadRow,
    check_messages,
    convert_row,
    count_images,
    cut_messages,
    find_image,
    iterate_json,
    read_image_size,
)
from .sources import Source, check_sources, name_apart


REPORT, STATE, UNFINISHED = "build_report.json", ".build", ".partial"


# A folder of this name makes everything in it the split, whatever the files are called. (`configs` in a README would do
# as well, but `datasets` would then take one dataset for another of the same folder name that it has in its cache.)
SPLIT = "train"


SHARD_ROWS = {"bytes": 1000, "paths": 5000}


GROUP_ROWS, GROUP_BYTES = 250, 32 * 2**20  # of a row group: what a reader and a writer hold at once


@dataclass
class DataReport:
    """What became of every row: `read - left_out + repeated - skipped == written`.

    Args:
        counts: per source: rows `read`, `left_out` and `repeated` by weight, `skipped` and `written`; of the latter
            `text_only` ones, and their `images`; rows `cut` to the longest; `dropped_first_turns` of the assistant.
        bad_rows: `file`, `row`, `kind` and `error` of each.
        settings: how it was built.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    bad_rows: list[dict] = field(default_factory=list)
    settings: dict = field(default_factory=dict)

    def add(self, source: str, counts: dict[str, int], bad_rows: list[dict]) -> None:
        known = self.counts.setdefault(source, {})
        for key, count in counts.items():
            known[key] = known.get(key, 0) + count
        self.bad_rows += bad_rows

    @property
    def totals(self) -> dict[str, int]:
        keys = dict.fromkeys(key for counts in self.counts.values() for key in counts)
        return {key: sum(counts.get(key, 0) for counts in self.counts.values()) for key in keys}

    def summary(self, most: int = 20) -> str:
        """The counts per source, and the first bad rows, as text."""
        keys = (
            "read",
            "left_out",
            "repeated",
            "skipped",
            "written",
            "text_only",
            "images",
            "cut",
            "dropped_first_turns",
        )
        table = {**self.counts, **({"all": self.totals} if len(self.counts) > 1 else {})}
        keys = [key for key in keys if key in ("read", "skipped", "written") or self.totals.get(key)]
        lines = [
            f"{name}: " + ", ".join(f"{counts.get(key, 0):,} {key.replace('_', ' ')}" for key in keys)
            for name, counts in table.items()
        ]
        lines += [describe_bad_row(bad) for bad in self.bad_rows[:most]]
        if len(self.bad_rows) > most:
            kinds = Counter(bad["kind"] for bad in self.bad_rows)
            lines.append(f"... {len(self.bad_rows):,} bad rows: " + ", ".join(f"{n:,} {k}" for k, n in kinds.items()))
        return "\n".join(lines)


def describe_bad_row(bad: dict) -> str:
    return f"{bad['file']}, row {bad['row']}: {bad['kind']}: {bad['error']}"


@dataclass(frozen=True)
class Settings:
    """How rows are made; everything that `build_dataset` takes but where to, how fast, and what on errors."""

    images: str = "bytes"
    verify: str = "decode"
    max_length: int | None = None
    long_rows: str = "error"
    shard_rows: int | None = None
    processor: object = None

    def __post_init__(self):
        allowed = {"images": ("bytes", "paths"), "verify": ("decode", "header"), "long_rows": ("error", "cut")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected {' or '.join(map(repr, values))}.")
        if (self.max_length is None) != (self.processor is None):
            raise ValueError("max_length and a processor (--model) go together: tokens are counted with the latter.")


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
    force: bool = False,
    show_progress: bool = True,
) -> DataReport:
    """Builds a dataset that `datasets.load_dataset(output)` reads, streaming too, and that TRL trains on.

    Everything is written to `output` + ".partial" and renamed at the end; an interrupted build goes on from its last
    finished shards. One source alone: `load_dataset(output, data_files="train/NAME-*.parquet")`.

    Args:
        sources: or pairs of a JSON file and an image root.
        output: folder to make.
        images: "bytes" copies the image files into the dataset, "paths" refers to them.
        num_proc: processes that parse, check and write.
        on_error: "stop" at bad rows, or "skip" them; either way they are named.
        verify: how images are checked: "decode" or "header".
        processor: of the checkpoint to train, to count tokens with.
        max_length: most tokens of a row.
        long_rows: what to do with longer ones, see `cut_messages`.
        shard_rows: rows of the JSON per parquet file.
        force: replace a dataset that is there, and an unfinished build with other settings.
        show_progress: a progress bar on stderr.

    Returns:
        The report, which is also `output`/build_report.json.

    Raises:
        FileNotFoundError: sources that are not there; all of them are named before anything starts.
        FileExistsError: `output` exists, or an unfinished build with other settings does.
        ValueError: a bad row with `on_error="stop"`, broken JSON, or not the number of rows that a source must have.
    """
    sources = [source if isinstance(source, Source) else Source(*source) for source in sources]
    settings = Settings(images, verify, max_length, long_rows, shard_rows or SHARD_ROWS.get(images), processor)
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r}; expected 'stop' or 'skip'.")
    sources = name_apart(sources)
    check_sources(sources)
    get_schema()  # before workers start, so that they share what it imports
    output = Path(os.path.expanduser(output))
    work = output.with_name(output.name + UNFINISHED)
    report = DataReport(settings=_describe_build(sources, settings))
    _prepare_folder(output, work, report.settings, force)
    report.counts = {source.name: {"read": 0, "skipped": 0, "written": 0} for source in sources}
    total = sum(source.json.stat().st_size for source in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="building", disable=not show_progress) as bar:
        tasks = _cut_shards(sources, work, settings)
        for shard, counts, bad_rows in _run_shards(tasks, settings, num_proc, on_error):
            report.add(shard.source.name, counts, bad_rows)
            bar.update(shard.size)
            bar.set_postfix(rows=report.totals.get("written", 0), skipped=report.totals.get("skipped", 0))
    report.bad_rows.sort(key=lambda bad: (bad["file"], bad["row"]))
    if not report.totals.get("written"):
        raise ValueError(f"no row is left to train on; mend them and start anew with --force.\n{report.summary()}")
    _finish(report, work, output, force)
    return report


def _describe_build(sources: list[Source], settings: Settings) -> dict:
    """What a build depends on, to tell whether an unfinished one can go on."""
    described = []
    for source in sources:
        entry = {key: value for key, value in asdict(source).items() if key not in ("rows", "rows_tolerance", "origin")}
        stat = source.json.stat()
        root = source.image_root and str(source.image_root.resolve())
        file = {"json": str(source.json.resolve()), "bytes": stat.st_size, "mtime": stat.st_mtime, "image_root": root}
        described.append({**entry, **file})
    model = getattr(getattr(settings.processor, "tokenizer", None), "name_or_path", None)
    values = {key: getattr(settings, key) for key in ("images", "verify", "max_length", "long_rows", "shard_rows")}
    image_processor = getattr(settings.processor, "image_processor", None)
    prepared = image_processor and image_processor.to_dict()
    return {"sources": described, **values, "model": model, "image_processor": prepared}


def _prepare_folder(output: Path, work: Path, description: dict, force: bool) -> None:
    if output.exists() and not (force and (output / REPORT).is_file()):
        hint = "--force replaces datasets alone" if force else "choose another folder, or replace it with --force"
        raise FileExistsError(f"{output} exists; {hint}.")
    file = work / STATE / "settings.json"
    if work.exists() and force and file.parent.exists():
        shutil.rmtree(work)
    if work.exists():
        if not file.is_file() or json.loads(file.read_text()) != json.loads(json.dumps(description)):
            raise FileExistsError(
                f"{work} holds an unfinished build of other files or settings; remove it, or start anew with --force."
            )
        return
    file.parent.mkdir(parents=True)
    (work / SPLIT).mkdir()
    _write_json(file, description)


def _write_json(path: Path, content: dict) -> None:
    """Writes a file that is either whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


@dataclass
class _Shard:
    source: Source
    path: Path  # of the parquet file
    first_row: int
    rows: list[tuple[str, int]] = field(default_factory=list)  # text of the row, how often it is used
    size: int = 0  # bytes of JSON

    @property
    def report(self) -> Path:
        return self.path.parents[1] / STATE / f"{self.path.stem}.json"


def _cut_shards(sources: list[Source], work: Path, settings: Settings) -> Iterator[_Shard]:
    """Cuts the sources into shards, and checks their numbers of rows."""
    for source in sources:
        number, size, seen, shard = 0, 0, 0, None
        for text, size in iterate_json(source.json):
            if shard is None:
                index = number // settings.shard_rows
                shard = _Shard(source, work / SPLIT / f"{source.name}-{index:05}.parquet", number)
            # Spreads what a weight leaves out or repeats evenly, and exactly.
            copies = math.floor((number + 1) * source.weight + 1e-9) - math.floor(number * source.weight + 1e-9)
            shard.rows.append((text, copies))
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


def _run_shards(tasks: Iterable[_Shard], settings: Settings, num_proc: int, on_error: str):
    """Builds the shards that are not there yet, at most `num_proc + 2` of them in memory; yields what they report."""

    def stop_at(bad_rows: list[dict]) -> None:
        if bad_rows and on_error == "stop":
            shown = "; ".join(describe_bad_row(bad) for bad in bad_rows[:5])
            more = f"; and {len(bad_rows) - 5} more in the same shard" if len(bad_rows) > 5 else ""
            raise ValueError(f"{shown}{more}. Mend them and start again, or leave them out with --on-error skip.")

    def collect(shard: _Shard, bad_rows: list[dict]) -> tuple[_Shard, dict, list]:
        stop_at(bad_rows)
        done = json.loads(shard.report.read_text(encoding="utf-8"))
        return shard, done["counts"], done["bad_rows"]

    keep = on_error == "skip"
    if num_proc <= 1:
        for shard in tasks:
            yield collect(shard, [] if _is_done(shard, keep) else _build_shard(shard, settings, keep))
        return
    # Other ways of starting a process import the caller's script once more.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(settings, keep))
    running: dict = {}
    try:
        for shard in tasks:
            if _is_done(shard, keep):
                yield collect(shard, [])
                continue
            running[pool.submit(_build_in_worker, shard)] = replace(shard, rows=[])
            if len(running) >= num_proc + 2:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield collect(running.pop(future), future.result())
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield collect(running.pop(future), future.result())
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


def _is_done(shard: _Shard, keep: bool) -> bool:
    """Whether a shard is whole, and, unless bad rows are to be left out, without them."""
    try:
        report = json.loads(shard.report.read_text(encoding="utf-8"))
        return pq.read_metadata(shard.path).num_rows == report["counts"]["written"] and (keep or not report["bad_rows"])
    except (OSError, ValueError, KeyError):  # a machine that lost power may have left either file empty
        return False


@cache
def get_schema() -> pa.Schema:
    """Columns of the dataset; its metadata tells `datasets` that `images` are images."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    return Features({"messages": List(message), "images": List(ImageFeature())}).arrow_schema


def _build_shard(shard: _Shard, settings: Settings, keep: bool) -> list[dict]:
    """Writes a shard and then its report; returns its bad rows. With bad rows and without `keep`, writes nothing."""
    counts, bad_rows = Counter(read=len(shard.rows), skipped=0, written=0), []
    temporary = shard.path.with_name(f".{shard.path.name}.tmp")
    with pq.ParquetWriter(temporary, get_schema(), compression="zstd") as writer:
        group, size = [], 0
        for number, (text, copies) in enumerate(shard.rows, shard.first_row):
            if copies == 0:
                counts["left_out"] += 1
                continue
            try:
                row = _make_row(json.loads(text), shard.source, settings, counts)
            except BadRow as error:
                counts["skipped"] += 1
                bad_rows.append(error.describe(shard.source.json, number))
                continue
            counts["repeated"] += copies - 1
            for _ in range(copies):
                group.append(row)
                size += sum(len(image["bytes"] or "") for image in row["images"])
                counts["written"] += 1
                counts["images"] += len(row["images"])
                counts["text_only"] += not row["images"]
                if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(group, get_schema()))
                    group, size = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, get_schema()))
    if bad_rows and not keep:
        temporary.unlink()
        return bad_rows
    os.replace(temporary, shard.path)
    _write_json(shard.report, {"counts": counts, "bad_rows": bad_rows})
    return bad_rows


def _make_row(row: dict, source: Source, settings: Settings, counts: Counter) -> dict:
    """Converts and checks a row; see `BadRow` for what it raises."""
    messages, names, dropped = convert_row(row, source.image_placement)
    check_messages(messages, len(names))
    images, sizes = [], []
    for name in names:
        path = find_image(name, source.image_root)
        content = None
        if settings.images == "bytes":
            try:
                content = path.read_bytes()
            except OSError as error:
                raise BadRow("missing image", f"{path}: {error.strerror}") from error
        sizes.append(read_image_size(path if content is None else content, str(path), settings.verify))
        images.append({"bytes": content, "path": str(path.absolute()) if content is None else path.name})
    if settings.max_length is not None:
        kept = cut_messages(messages, sizes, settings.processor, settings.max_length, settings.long_rows)
        counts["cut"] += len(kept) < len(messages)
        messages, images = kept, images[: count_images(kept)]
    counts["dropped_first_turns"] += dropped
    return {"messages": messages, "images": images}


def _finish(report: DataReport, work: Path, output: Path, force: bool) -> None:
    """Writes the report, and gives the folder its final name."""
    for path in (work / SPLIT).iterdir():
        if path.suffix != ".parquet" or pq.read_metadata(path).num_rows == 0:  # `datasets` 4.7 fails at empty files
            path.unlink()
    _write_json(work / REPORT, {**asdict(report), "totals": report.totals})
    if output.exists() and force:
        shutil.rmtree(output)
    os.rename(work, output)
    shutil.rmtree(output / STATE)
