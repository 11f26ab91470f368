"""JSON and JSON Lines: read with their faults named, written whole or not at all, and appended to."""

import json
import os
from pathlib import Path


def read_json(path: Path):
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); get it again.") from error


def read_json_lines(path: Path, broken: list | None = None) -> list[dict]:
    """Rows of a JSON Lines file.

    Args:
        path: of the file.
        broken: gets the numbers of lines that are no JSON. Without it such a line is an error, unless it is empty.

    Raises:
        ValueError: such a line.
    """
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if broken is None and not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no object")
                rows.append(row)
            except ValueError as error:
                if broken is None:
                    raise ValueError(
                        f"{path}, line {number}: {line[:60].strip()!r} is no JSON object. Was its writer killed? "
                        "Remove the line, or answer again."
                    ) from error
                broken.append(number)
    return rows


def read_rows(path: Path) -> list[dict]:
    """Rows of a question file: JSON Lines, or a JSON list."""
    with open(path, encoding="utf-8-sig") as file:
        is_list = file.read(64).lstrip().startswith("[")
    return read_json(path) if is_list else read_json_lines(path)


def read_appended(path: Path, mend: bool = False) -> list[dict]:
    """Rows of a file that is only ever appended to, without a line that a crash tore.

    Args:
        path: of the file; without one there are no rows.
        mend: cut the torn line off. Only where no process appends: its line may be half visible.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if mend and len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def append_rows(path: Path, rows: list[dict]) -> None:
    """Adds rows to a file in one write, and waits until they are on the disk."""
    with open(path, "ab") as file:
        file.write(_write_lines(rows).encode())
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, _write_lines(rows))


def _write_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
