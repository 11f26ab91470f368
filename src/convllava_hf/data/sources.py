"""What a dataset is made of: JSON files with the folders of their images, alone or listed in a mixture."""

import itertools
import math
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from ..shipped import find_file


@dataclass(frozen=True)
class Source:
    """One JSON file and the folder of its images.

    Args:
        json: a JSON list, or one JSON object per line.
        image_root: folder that the rows' names are relative to; `None` for text alone.
        name: of the source, which its files begin with; default: the stem of `json`.
        weight: how often every row is used; 0.5 takes every second row.
        rows: how many rows the file must have; `None`: any number.
        rows_tolerance: by how much that may be missed, as a share.
        image_placement: "front": the image of a turn is moved to its beginning, as LLaVA v1 and later do; "keep": it
            stays. A turn with several images keeps them where they are.
        origin: where to get it.
    """

    json: Path
    image_root: Path | None = None
    name: str = ""
    weight: float = 1.0
    rows: int | None = None
    rows_tolerance: float = 0.0
    image_placement: str = "front"
    origin: str = ""

    def __post_init__(self):
        object.__setattr__(self, "json", Path(os.path.expanduser(self.json)))
        if self.image_root is not None:
            object.__setattr__(self, "image_root", Path(os.path.expanduser(self.image_root)))
        object.__setattr__(self, "name", re.sub(r"[^\w.-]+", "_", self.name or self.json.stem).lstrip("."))
        if self.weight <= 0 or not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} of {self.name}; expected a number above 0, such as 0.5 or 2.")
        if self.image_placement not in ("front", "keep"):
            raise ValueError(f"image_placement={self.image_placement!r} of {self.name}; expected 'front' or 'keep'.")


def name_apart(sources: list[Source]) -> list[Source]:
    """Gives sources of the same name numbers, so that their shards do not overwrite each other."""
    named: dict[str, Source] = {}
    for source in sources:
        names = (f"{source.name}_{number}" if number > 1 else source.name for number in itertools.count(1))
        name = next(name for name in names if name not in named)
        named[name] = replace(source, name=name)
    return list(named.values())


def count_copies(row: int, weight: float) -> int:
    """How often a row is used: spreads what a weight leaves out or repeats evenly, and exactly."""
    return math.floor((row + 1) * weight + 1e-9) - math.floor(row * weight + 1e-9)


def check_sources(sources: list[Source]) -> None:
    """Checks that every file and folder is there.

    Raises:
        ValueError: there is no source.
        FileNotFoundError: names all that are missing, and where to get them.
    """
    if not sources:
        raise ValueError("no source: give at least one JSON file.")
    missing = []
    for source in sources:
        gone = [source.json] if not source.json.is_file() else []
        gone += [source.image_root] if source.image_root is not None and not source.image_root.is_dir() else []
        hint = f" (from {source.origin})" if source.origin else ""
        missing += [f"{path}{hint}" for path in gone]
    if missing:
        raise FileNotFoundError(f"sources are missing: {'; '.join(missing)}.")


KEYS = {field.name for field in fields(Source)} | {"license"}


def read_mixture(name: str | Path, root: str | Path | None = None) -> list[Source]:
    """Reads the sources of a mixture; whether they are there is not looked at.

    Args:
        name: see `shipped_files.find_file`.
        root: folder that the paths are relative to; default: that of the YAML file.

    Returns:
        The sources, in the order of the file.

    Raises:
        FileNotFoundError: no such mixture.
        ValueError: the file has another form.
    """
    file = find_file("mixture", name)
    root = Path(os.path.expanduser(root)) if root is not None else file.parent
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))["sources"]
        entries = [dict(entry) for entry in entries]
    except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no mixture: expected a YAML file with a list `sources` ({error}).") from error
    sources = []
    for number, entry in enumerate(entries):
        if "json" not in entry or set(entry) - KEYS:
            raise ValueError(
                f"{file}, source {number}: has {', '.join(map(str, entry))}; expected json, and what is needed of "
                f"{', '.join(sorted(KEYS - {'json'}))}."
            )
        entry.pop("license", None)
        image_root = entry.pop("image_root", None)
        entry["image_root"] = None if image_root is None else root / image_root
        sources.append(Source(**{**entry, "json": root / entry["json"]}))
    return sources
