"""What became of the rows of a dataset, as counts, and by name where something is wrong with them."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .rows import EXCERPT, BadRow


KEYS = (
    "read",
    "left_out",
    "repeated",
    "skipped",
    "shares_image",
    "written",
    "held_out",
    "text_only",
    "images",
    "cut",
    "dropped_first_turns",
)
SHARES = (0.5, 0.9, 0.99, 1.0)  # of the rows, whose longest is told


@dataclass
class DataReport:
    """What became of every row: `read - left_out + repeated - skipped - shares_image == written + held_out`.

    Args:
        counts: per source: rows `read`, `left_out` and `repeated` by weight, `skipped`, left out because one of their
            images is held out (`shares_image`), `written`, and `held_out` for the test split; of the latter two
            `text_only` ones, and their `images`; rows `cut` to the longest; `dropped_first_turns` of the assistant.
        bad_rows: `file`, `row`, `line`, `id`, `kind`, `error` and the beginning of the `text` of each.
        lengths: how many rows have how many tokens, where they were counted.
        settings: how it was built.
        resumed: shards that were there already and `kept`, and those that were `redone` because their rows changed.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    bad_rows: list[dict] = field(default_factory=list)
    lengths: Counter = field(default_factory=Counter)
    settings: dict = field(default_factory=dict)
    resumed: dict[str, int] = field(default_factory=lambda: {"kept": 0, "redone": 0})

    def add(self, source: str, counts: dict[str, int], bad_rows: list[dict], lengths: dict | None = None) -> None:
        known = self.counts.setdefault(source, {})
        for key, count in counts.items():
            known[key] = known.get(key, 0) + count
        self.bad_rows += bad_rows
        self.lengths.update({int(length): count for length, count in (lengths or {}).items()})

    @property
    def totals(self) -> dict[str, int]:
        keys = dict.fromkeys(key for counts in self.counts.values() for key in counts)
        return {key: sum(counts.get(key, 0) for counts in self.counts.values()) for key in keys}

    @property
    def percentiles(self) -> dict[str, int]:
        """The longest of half, 90%, 99% and all of the rows, in tokens with their images; empty if not counted."""
        total, seen, found, shares = self.lengths.total(), 0, {}, list(SHARES)
        for length, count in sorted(self.lengths.items()):
            seen += count
            while shares and seen >= shares[0] * total:
                found[f"{shares.pop(0):.0%}"] = length
        return found

    def to_dict(self) -> dict:
        """All of it, for files and programs."""
        return {**asdict(self), "lengths": self.percentiles, "totals": self.totals}

    def summary(self, most: int = 20) -> str:
        """The counts per source, the lengths, and the first bad rows, as text."""
        table = {**self.counts, **({"all": self.totals} if len(self.counts) > 1 else {})}
        keys = [key for key in KEYS if key in ("read", "skipped", "written") or self.totals.get(key)]
        lines = [
            f"{name}: " + ", ".join(f"{counts.get(key, 0):,} {key.replace('_', ' ')}" for key in keys)
            for name, counts in table.items()
        ]
        if self.lengths:
            shares = ", ".join(f"{share} up to {length:,}" for share, length in self.percentiles.items())
            lines.append(f"tokens per row: {shares}")
        if any(self.resumed.values()):
            lines.append(
                f"went on with an unfinished build: {self.resumed['kept']:,} shards stayed, "
                f"{self.resumed['redone']:,} were made anew because their rows changed"
            )
        lines += [describe_bad_row(bad) for bad in self.bad_rows[:most]]
        if len(self.bad_rows) > most:
            kinds = Counter(bad["kind"] for bad in self.bad_rows)
            lines.append(f"... {len(self.bad_rows):,} bad rows: " + ", ".join(f"{n:,} {k}" for k, n in kinds.items()))
        return "\n".join(lines)


def report_bad_row(error: BadRow, file: Path, row: int, *, text: str = "", **more) -> dict:
    """The entry of a bad row in a report.

    Args:
        error: what is wrong.
        file: JSON file, or split of a built dataset.
        row: its number there, from 0.
        text: of the row.
        more: `line`, `id`, and whatever else helps to find it.
    """
    found = {key: value for key, value in more.items() if value is not None}
    entry = {"file": str(file), "row": row, **found, "kind": error.kind, "error": " ".join(str(error.error).split())}
    return {**entry, **({"text": text[:EXCERPT].encode(errors="replace").decode()} if text else {})}


def describe_bad_row(bad: dict) -> str:
    """A bad row in one line, with all that helps to find it."""
    known = {"line": "line {}", "id": "id {!r}", "parquet": "{}"}
    places = ", ".join(form.format(bad[key]) for key, form in known.items() if key in bad)
    return f"{bad['file']}, row {bad['row']}{places and f' ({places})'}: {bad['kind']}: {bad['error']}"
