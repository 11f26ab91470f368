"""Reads a built dataset back and names every row that training would stumble over."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .build import GROUP_ROWS, REPORT, DataReport, Settings
from .rows import BadRow, check_messages, cut_messages, list_parts, read_image_size


def check_dataset(
    folder: str | Path, *, verify: str = "decode", processor=None, max_length: int | None = None
) -> DataReport:
    """Checks every row of a built dataset, or of any parquet files with the same columns.

    Args:
        folder: of the parquet files.
        verify: how images are checked, see `build_dataset`.
        processor: of the checkpoint to train, to count tokens with.
        max_length: most tokens of a row.

    Returns:
        A report whose sources are the parquet files; its bad rows are named by file and row in it.

    Raises:
        FileNotFoundError: there is no parquet file.
        ValueError: a file is damaged, or the report of the build tells of more or fewer rows.
    """
    settings = Settings(verify=verify, processor=processor, max_length=max_length)
    files = sorted(Path(folder).glob("**/*.parquet"))
    if not files:
        raise FileNotFoundError(f"no parquet file in {folder}; expected a folder that `convllava data build` made.")
    report = DataReport()
    for file in tqdm(files, desc="checking"):
        counts, bad_rows = Counter(read=0, skipped=0, written=0), []
        with _name_damage(file):
            for batch in pq.ParquetFile(file).iter_batches(GROUP_ROWS, columns=["messages", "images"]):
                for row in batch.to_pylist():
                    try:
                        _check_row(row, settings)
                        counts["written"] += 1
                        counts["images"] += len(row["images"] or [])
                        counts["text_only"] += not row["images"]
                    except BadRow as error:
                        counts["skipped"] += 1
                        bad_rows.append(error.describe(file, counts["read"]))
                    counts["read"] += 1
        report.add(file.stem, counts, bad_rows)
    built = Path(folder) / REPORT
    if built.is_file():
        expected = json.loads(built.read_text(encoding="utf-8"))["totals"]["written"]
        if report.totals["read"] != expected:
            raise ValueError(
                f"{folder} has {report.totals['read']:,} rows, but {REPORT} tells of {expected:,}: files were removed "
                "or added; build it again."
            )
    return report


def _check_row(row: dict, settings: Settings) -> None:
    images = row["images"] or []
    messages = list_parts(row["messages"], len(images))
    check_messages(messages, len(images))
    sizes = []
    for image in images:
        if image["bytes"] is None and not os.path.isfile(image["path"] or ""):
            raise BadRow("missing image", f"{image['path']} does not exist")
        name = image["path"] or "an image"
        sizes.append(read_image_size(Path(name) if image["bytes"] is None else image["bytes"], name, settings.verify))
    if settings.max_length is not None:
        cut_messages(messages, sizes, settings.processor, settings.max_length)


@contextmanager
def _name_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{file} is damaged or no dataset of this kind: {error}") from error
