"""Which rows are held out for validation: whole images, so that no image is trained on and asked about.

An image's place in the order of hashes decides, so the choice needs no seed and stays the same when rows are added
elsewhere, but for the rows at the edge. Images count as the same if they lie at the same place below the folder that
all image roots share; copies under other names are not noticed. Rows without an image are drawn by their text.
"""

import hashlib
import os
from array import array

from .rows import BadRow, blame_row, iterate_json, parse_row
from .sources import Source, count_copies


# Folders of these names are what `datasets` and TRL take for splits. (`configs` in a README would do as well, but
# `datasets` would then take one dataset for another of the same folder name that it has in its cache.)
TRAIN, TEST, LEFT_OUT = range(3)
SPLITS = ("train", "test")
UNUSED = 2**64 - 1  # in the place of a hash


def plan_holdout(sources: list[Source], count: int) -> list[bytes]:
    """Reads the sources once and decides for every row.

    Args:
        sources: of the dataset.
        count: rows to hold out; a few more where the last image has several.

    Returns:
        Per source, and in it per row: `TRAIN`, `TEST`, or `LEFT_OUT` for rows of which only some images are held out.

    Raises:
        ValueError: there are no more rows than that.
    """
    roots = [os.path.abspath(source.image_root) for source in sources if source.image_root is not None]
    base = os.path.commonpath(roots) if roots else ""
    planned = []  # per source: the lowest and the highest hash of every row's images
    for source in sources:
        lows, highs = array("Q"), array("Q")
        for number, row in enumerate(iterate_json(source.json)):
            hashes = [UNUSED]
            if count_copies(number, source.weight):
                hashes = [_hash(name) for name in _name_images(row.text, source, base)] or [_hash(row.text)]
            lows.append(min(hashes))
            highs.append(max(hashes))
        planned.append((lows, highs))
    ranked = sorted(high for _, highs in planned for high in highs if high != UNUSED)
    if count >= len(ranked):
        raise ValueError(f"holdout={count:,}, but there are {len(ranked):,} rows; hold out fewer.")
    last = ranked[count - 1]

    def decide(low: int, high: int) -> int:
        return TEST if high <= last else LEFT_OUT if low <= last else TRAIN

    return [bytes(map(decide, lows, highs)) for lows, highs in planned]


def _name_images(text: str, source: Source, base: str) -> list[str]:
    """Where the images of a row lie below `base`; none in rows that are bad anyway."""
    try:
        with blame_row():
            names = parse_row(text).get("image") or []
            names = [names] if isinstance(names, str) else names
            if source.image_root is None:
                return []
            return [os.path.relpath(os.path.abspath(os.path.join(source.image_root, name)), base) for name in names]
    except BadRow:
        return []


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # below `UNUSED`
