"""The YAML files that the package brings: recipes (config files of `trl sft`) and mixtures (see `mixture_files`)."""

from importlib.resources import files
from pathlib import Path


FOLDERS = {kind: Path(str(files(__package__).joinpath(f"{kind}s"))) for kind in ("recipe", "mixture")}


def list_files(kind: str) -> dict[str, Path]:
    """Name -> file, in order of the alphabet.

    Args:
        kind: `"recipe"` or `"mixture"`.
    """
    return {file.stem: file for file in sorted(FOLDERS[kind].glob("*.yaml"))}


def find_file(kind: str, name: str | Path) -> Path:
    """A file of the package, or of anyone else.

    Args:
        kind: `"recipe"` or `"mixture"`.
        name: of a file of the package, or the path of any YAML file.

    Raises:
        FileNotFoundError: neither.
    """
    known = list_files(kind)
    for candidate in (Path(name), known.get(str(name))):
        if candidate is not None and candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no {kind} {str(name)!r}; expected a YAML file or one of: {', '.join(known)}.")


def list_titles(kind: str) -> str:
    """A line for each file: its name, and the comment that it begins with."""
    known = list_files(kind)
    width = max(map(len, known))
    titles = [file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for file in known.values()]
    return "\n".join(f"{name:{width}}  {title}" for name, title in zip(known, titles, strict=True))
