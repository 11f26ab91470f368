"""What the benchmarks share: the machine they ran on, tables, progress."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path


def describe_machine(threads: int) -> dict[str, str]:
    """Describes the machine: processor, accelerator, load, versions.

    Args:
        threads: number of threads that the measurement uses.

    Returns:
        Headings and their values, in the order of printing.
    """
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    machine = {
        "processor": f"{model}, {os.cpu_count()} logical cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(threads),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "load average": read_load(),
        "system": platform.platform(),
    }
    packages = ("torch", "torchvision", "transformers", "pillow", "numpy")
    machine["versions"] = ", ".join(
        [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in packages)]
    )
    return machine


def read_load() -> str:
    """Load average over 1, 5 and 15 minutes, where the system has one: above the number of cores, times mean little."""
    return ", ".join(f"{load:.2f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def print_table(title: str, rows: list[dict]) -> None:
    """Prints rows of equal keys as a Markdown table under a heading."""
    header = list(rows[0])
    cells = [header, *([str(row[key]) for key in header] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    print("\n".join(["", f"## {title}", "", lines[0], rule, *lines[1:]]), flush=True)


def print_machine(machine: dict[str, str]) -> None:
    """Prints what `describe_machine` gave, with the load now: other programs may have started since."""
    print(
        "\n".join(["", *(f"- {key}: {value}" for key, value in machine.items()), f"- load at the end: {read_load()}"])
    )


def show_progress(text: str) -> None:
    """Rewrites one line on stderr, or adds one where stderr is a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def write_json(path: Path | None, content: dict) -> None:
    """Writes the results with all digits, if a path is given."""
    if path:
        path.write_text(json.dumps(content, indent=2) + "\n")
