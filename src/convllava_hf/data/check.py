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

from ..tokens import list_parts
from .build import GROUP_ROWS, REPORT, Settings
from .holdout import SPLITS
from .pictures import check_image
from .report import DataReport, report_bad_row
from .rows import BadRow, blame_row, check_messages, cut_messages


COLUMNS = ("messages", "images", "id")


def list_splits(folder: str | Path) -> dict[Path, list[Path]]:
    """The parquet files of each split of a dataset, in the order in which `datasets` reads them.

    Args:
        folder: that `convllava data build` made, or any with parquet files, which then are one split.

    Raises:
        FileNotFoundError: there is no parquet file.
    """
    folders = [Path(folder) / split for split in SPLITS if (Path(folder) / split).is_dir()] or [Path(folder)]
    splits = {split: sorted(split.glob("**/*.parquet")) for split in folders}
    if not any(splits.values()):
        raise FileNotFoundError(f"no parquet file in {folder}; expected a folder that `convllava data build` made.")
    return splits


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
        A report whose sources are the parquet files. Its bad rows are named by split and number in it, as in
        `load_dataset(folder)[split][number]` and on the page that shows rows.

    Raises:
        FileNotFoundError: there is no parquet file.
        ValueError: a file is damaged, or the report of the build tells of more or fewer rows.
    """
    settings = Settings(verify=verify, processor=processor, max_length=max_length)
    report = DataReport()
    files = [(split, file) for split, files in list_splits(folder).items() for file in files]
    first, last_split = 0, None
    for split, file in tqdm(files, desc="checking"):
        first = first if split == last_split else 0
        counts, lengths, bad_rows = Counter(read=0, skipped=0, written=0), Counter(), []
        with _name_damage(file):
            parquet = pq.ParquetFile(file)
            columns = [name for name in COLUMNS if name != "id" or name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(GROUP_ROWS, columns=columns):
                for row in batch.to_pylist():
                    try:
                        with blame_row():
                            length = _check_row(row, settings)
                        counts["written"] += 1
                        counts["images"] += len(row["images"] or [])
                        counts["text_only"] += not row["images"]
                        if length is not None:
                            lengths[length] += 1
                    except BadRow as error:
                        counts["skipped"] += 1
                        number = first + counts["read"]
                        bad_rows.append(report_bad_row(error, split, number, id=row.get("id"), parquet=file.name))
                    counts["read"] += 1
        first, last_split = first + counts["read"], split
        report.add(file.stem if split.name != "test" else f"{file.stem} (test)", counts, bad_rows, lengths)
    built = Path(folder) / REPORT
    if built.is_file():
        totals = json.loads(built.read_text(encoding="utf-8"))["totals"]
        expected = totals["written"] + totals.get("held_out", 0)
        if report.totals["read"] != expected:
            raise ValueError(
                f"{folder} has {report.totals['read']:,} rows, but {REPORT} tells of {expected:,}: files were removed "
                "or added; build it again."
            )
    return report


def _check_row(row: dict, settings: Settings) -> int | None:
    """Checks a row; returns its tokens, if they are counted."""
    images = row["images"] or []
    messages = list_parts(row["messages"], len(images))
    check_messages(messages, len(images))
    sizes = []
    for image in images:
        if image["bytes"] is None and not os.path.isfile(image["path"] or ""):
            raise BadRow("missing image", f"{image['path']} does not exist")
        sizes.append(check_image(image, image["path"] or "an image", settings.verify))
    if settings.processor is None:
        return None
    return cut_messages(messages, sizes, settings.processor, settings.max_length)[1]


@contextmanager
def _name_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{file} is damaged or no dataset of this kind: {error}") from error
