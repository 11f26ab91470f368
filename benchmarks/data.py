"""Memory and speed of building a dataset against the number of rows, beside the usual ways of reading such files.

    python benchmarks/data.py                           # 10,000, 100,000 and 665,298 rows; needs 4 GB of disk
    python benchmarks/data.py --rows 1000 --processes 1

Synthetic LLaVA-format JSON of the size of the mix of 665K (1.5 kB per row, six rows in ten with an image of 96x72
pixels) is built in a temporary folder. Each way runs in a process of its own; its memory is that of the process and its
workers together (proportional set size: what processes share is counted once), sampled every 50 ms.

- ours: `build_dataset`; every row is checked and every image decoded. "bytes" also copies the images into the dataset.
- datasets: `load_dataset("json")`, `map` to messages, `to_parquet`. Nothing is checked, images stay paths.
- json.load: nothing but reading the file, as the original training does once per GPU.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine, print_machine, print_table, show_progress, write_json


ROWS = (10_000, 100_000, 665_298)
IMAGES = 1000  # different ones
WORDS = (
    "the of a man in red car on street two people with dog near old house what is color sign says left right".split()
)
SAMPLE_SECONDS = 0.05


def write_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 72)).save(folder / f"{number:06}.jpg")


def write_rows(file: Path, count: int) -> None:
    """Writes rows of about 1.5 kB, one at a time."""
    rng = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        out.write("[")
        for number in range(count):
            turns = []
            for turn in range(2 * rng.randint(1, 6)):
                text = " ".join(rng.choices(WORDS, k=rng.randint(10, 70)))
                turns.append({"from": ("human", "gpt")[turn % 2], "value": text})
            row = {"id": f"{number:012}", "conversations": turns}
            if rng.random() < 0.6:
                row["image"] = f"{rng.randrange(IMAGES):06}.jpg"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            out.write((",\n" if number else "") + json.dumps(row))
        out.write("]")


def build_ours(folder: Path, file: Path, processes: int, images: str) -> None:
    from convllava_hf.data.build import build_dataset

    pairs = [(file, folder / "images")]
    report = build_dataset(pairs, folder / "out", images=images, num_proc=processes, show_progress=False)
    assert report.totals["read"] == report.totals["written"]


def build_with_datasets(folder: Path, file: Path, processes: int) -> None:
    from datasets import load_dataset

    def convert(row: dict) -> dict:
        messages = []
        for turn in row["conversations"]:
            content = [{"type": "text", "text": turn["value"].replace("<image>\n", "")}]
            if turn["value"].startswith("<image>"):
                content.insert(0, {"type": "image", "text": None})
            messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
        return {"messages": messages, "images": [str(folder / "images" / row["image"])] if row["image"] else []}

    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
    rows = rows.map(convert, remove_columns=rows.column_names, num_proc=processes if processes > 1 else None)
    rows.to_parquet(folder / "out.parquet")


def load_json(folder: Path, file: Path, processes: int) -> None:
    with file.open(encoding="utf-8") as opened:
        json.load(opened)


WAYS = {
    "ours, paths": lambda *arguments: build_ours(*arguments, "paths"),
    "ours, bytes": lambda *arguments: build_ours(*arguments, "bytes"),
    "datasets": build_with_datasets,
    "json.load": load_json,
}


def read_tree_memory(root: int) -> int:
    """Proportional set size of a process and all below it, in bytes; 0 where the system does not tell."""
    parents, total = {}, 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for process in family:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0) * 1024
    return total


def measure(way: str, folder: Path, file: Path, processes: int) -> dict:
    """Runs one way in a process of its own; seconds of the work without imports, and the peak memory in bytes."""
    command = [sys.executable, __file__, "--worker", way, str(folder), str(file), str(processes)]
    process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), 0
    while process.poll() is None:
        peak = max(peak, read_tree_memory(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(process.stderr.read())
    return {"seconds": float(process.stdout.read().splitlines()[-1]), "peak_bytes": peak}


def work(way: str, folder: str, file: str, processes: str) -> None:
    sys.argv[0] = "convllava"  # as on the command line, where data is built without torch
    from convllava_hf.data.build import get_schema

    get_schema()  # imports datasets, which is no part of the time
    started = time.monotonic()
    WAYS[way](Path(folder), Path(file), int(processes))
    print(time.monotonic() - started)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(*options.worker)
        return
    machine, table, results = describe_machine(max(options.processes)), [], []
    with tempfile.TemporaryDirectory(prefix="data-", dir=options.folder) as folder:
        write_images(Path(folder) / "images")
        for count in options.rows:
            file = Path(folder) / f"{count}.json"
            write_rows(file, count)
            megabytes = file.stat().st_size / 1e6
            for way in options.ways:
                for processes in options.processes if way != "json.load" else [1]:
                    show_progress(f"{count:,} rows, {way}, {processes} processes")
                    with tempfile.TemporaryDirectory(dir=folder) as place:
                        (Path(place) / "images").symlink_to(Path(folder) / "images")
                        found = measure(way, Path(place), file, processes)
                    results.append({"rows": count, "megabytes": megabytes, "way": way, "processes": processes, **found})
                    table.append(
                        {
                            "rows": f"{count:,}",
                            "JSON MB": f"{megabytes:.0f}",
                            "way": way,
                            "processes": processes,
                            "s": f"{found['seconds']:.1f}",
                            "rows/s": f"{count / found['seconds']:,.0f}",
                            "peak MB": f"{found['peak_bytes'] / 1e6:,.0f}",
                        }
                    )
            file.unlink()
    print_table("Building", table)
    print_machine(machine)
    write_json(options.json, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
