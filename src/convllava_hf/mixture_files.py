"""The mixtures that the package brings: which files a stage of an original trains on, and where they lie.

A mixture is a YAML file with a list `sources`; each entry has the arguments of `data.Source`, with paths relative to a
root folder, and for the reader `license`.
"""

import os
from dataclasses import fields
from pathlib import Path

import yaml

from .data import Source
from .shipped_files import find_file


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
