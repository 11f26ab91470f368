"""The image files of rows: found below their root, opened as training opens them, and named for what they really are.

Notation: `H, W` pixels.
"""

import os
import warnings
from functools import lru_cache
from pathlib import Path

from ..images import decode_image, read_size
from .rows import BadRow


# The first bytes of what people take for images, and what to do about it. At most `HEAD` bytes are looked at.
HEAD = 64
LIKENESSES = (
    (b"%PDF", "a PDF document; save its pages as PNG"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file with `git lfs pull`"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"gimp xcf", "a GIMP project; export it as PNG"),
)
# Kinds of files of the ISO base media format, by their "brand".
BRANDS = (
    (("heic", "heix", "hevc", "hevx", "heim", "heis", "mif1", "msf1"), "a HEIC photo; save it as JPEG"),
    (("avif", "avis"), "an AVIF image, which this Pillow cannot read; save it as PNG, or update Pillow"),
    (("isom", "iso2", "mp41", "mp42", "qt  ", "M4V ", "avc1"), "a video"),
)


def name_likeness(head: bytes) -> str | None:
    """What a file that is no readable image looks like, from its first bytes; `None` for anything else."""
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return "nothing but zeros; was the download cut short?"
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("latin-1")
        return next((what for brands, what in BRANDS if brand in brands), "a media file")
    for magic, what in LIKENESSES:
        if head.startswith(magic):
            return what
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page; did the download fail?"
    if text.startswith((b"<svg", b"<?xml")):
        return "an SVG drawing or another XML file; save it as PNG"
    if text.startswith((b"{", b"[", b'"')):
        return "JSON; did the download fail?"
    return None


def find_image(name: str, root: Path | None, follow_links: bool = False) -> Path:
    """The path of an image below its root.

    Args:
        name: relative to the root.
        root: folder of the source's images.
        follow_links: let symbolic links below the root lead out of it.

    Raises:
        BadRow: "missing image", also where the name or a symbolic link leaves the root.
    """
    if root is None:
        raise BadRow("missing image", f"{name}: this source has no image root")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadRow("missing image", f"{name!r}: this name is not UTF-8; rename the file, and in the row") from None
    path = os.path.abspath(os.path.join(root, name))
    if not path.startswith(os.path.join(os.path.abspath(root), "")):
        raise BadRow("missing image", f"{name} lies outside of {root}; give a root that holds it")
    if not os.path.isfile(path):
        raise BadRow("missing image", f"{path} does not exist")
    if not follow_links:
        target = os.path.realpath(path)
        if not target.startswith(_resolve_root(root)):
            raise BadRow(
                "missing image",
                f"{name} leads out of {root}, by a symbolic link to {target}; if that is meant: --follow-links",
            )
    return Path(path)


@lru_cache(maxsize=64)  # asked for every image, and the same for a whole source
def _resolve_root(root: Path) -> str:
    return os.path.join(os.path.realpath(root), "")


def check_image(image: dict, name: str, verify: str = "decode") -> tuple[int, int]:
    """Height and width of an image in pixels, upright, as training will see it.

    Args:
        image: `bytes` or `path`, as in a dataset.
        name: for messages.
        verify: "decode" opens the image as training does, "header" reads its first bytes.

    Raises:
        BadRow: "undecodable image"; says what the file is where its first bytes tell.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if verify == "header":
                return read_size(image)
            decoded = decode_image(image)
            return decoded.height, decoded.width
    except (ValueError, OSError) as error:
        head = image["bytes"][:HEAD] if image["bytes"] is not None else _read_head(image["path"])
        what = name_likeness(head)
        why = f"this is {what}" if what else str(error) or type(error).__name__
        raise BadRow("undecodable image", f"{name}: {why}") from error


def _read_head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b"?"
