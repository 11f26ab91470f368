"""Images from anywhere, as plain RGB: what the commands, the demo and the evaluation take.

Notation: `H, W` pixels.
"""

import base64
import binascii
import os
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# The HTTP client that transformers itself fetches images with: its distribution differs between versions.
from transformers.image_utils import httpx

from . import __version__


MAX_DOWNLOAD_BYTES = 64 * 2**20
# Longer sides are shrunk to this: square padding of a 65,535 x 1 image would take 13 GB, and models see far less.
MAX_SIDE = 16384
ImageSource = str | Path | bytes | Image.Image


class ImageError(ValueError):
    """An image that cannot be used. The message starts with the image's name: its path, URL or kind."""


def load_image(source: ImageSource, timeout: float = 20.0) -> Image.Image:
    """Reads an image from anywhere and makes plain RGB of it.

    The EXIF orientation is applied, transparent pixels become white, 16-bit and floating-point values are scaled to 8
    bits, and of an animation the first frame counts (of a Pillow image the current one). Sides beyond 16,384 pixels
    are shrunk to that. The limit on pixels is Pillow's own, `PIL.Image.MAX_IMAGE_PIXELS`; `None` lifts it.

    Args:
        source: path, `http(s)://` URL, `data:` URI, the bytes of an image file, or a Pillow image (left unchanged).
        timeout: seconds for a whole download.

    Returns:
        A new Pillow image of mode RGB, upright.

    Raises:
        ImageError: the source does not exist, cannot be fetched, is no image, is broken, holds values of an unknown
            range, or has more pixels than the limit.
    """
    name = _name_image(source)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        file = BytesIO(source)
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        file = BytesIO(_download(source, name, timeout))
    elif isinstance(source, str) and source.startswith("data:"):
        file = BytesIO(_decode_data_uri(source, name))
    elif isinstance(source, str | Path):
        file = Path(os.path.expanduser(source))
        if not os.path.isfile(file):  # which, unlike Path.is_file, takes names of any length
            raise ImageError(f"{name}: {'this is a folder' if os.path.isdir(file) else 'no such file'}")
    else:
        raise ImageError(f"{name}: expected a path, a URL, a data URI, bytes or a Pillow image")
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from error
    except PermissionError as error:
        raise ImageError(f"{name}: permission denied") from error
    except Exception as error:  # readers of broken headers raise whatever comes of it
        raise ImageError(f"{name}: not an image in a format that Pillow reads") from error
    with image:
        return _decode(image, name)


def _name_image(source) -> str:
    """What to call an image in a message."""
    if isinstance(source, str) and source.startswith("data:"):
        return f"{source[:30]}..."
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source)} bytes"
    return getattr(source, "filename", "") or f"image of type {type(source).__name__}"


def _download(url: str, name: str, timeout: float) -> bytes:
    """Fetches a URL with limits on time and size; raises ImageError."""
    deadline = time.monotonic() + timeout
    data = bytearray()
    headers = {"User-Agent": f"convllava-hf/{__version__}"}  # some hosts refuse the client's own
    try:
        with httpx.stream("GET", url, timeout=timeout, follow_redirects=True, headers=headers) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_DOWNLOAD_BYTES:
                    raise ImageError(f"{name}: more than {MAX_DOWNLOAD_BYTES // 2**20} MiB; pass a path")
                if time.monotonic() > deadline:
                    raise ImageError(f"{name}: the download took longer than {timeout:g} seconds")
    except httpx.HTTPStatusError as error:
        raise ImageError(f"{name}: HTTP status {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{name}: cannot be fetched ({error or type(error).__name__})") from error
    return bytes(data)


def _decode_data_uri(uri: str, name: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError(f"{name}: expected data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name}: broken base64 ({error})") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decodes an opened image, upright and in RGB; raises ImageError."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageError(
            f"{name}: {image.width}x{image.height} pixels are more than the limit of {limit}, a guard against "
            "decompression bombs; shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    try:
        image.load()
        image = _convert_to_rgb(_turn_upright(image), name)
    except ImageError:
        raise
    except Exception as error:  # decoders of broken data raise whatever comes of it
        raise ImageError(f"{name}: cannot be decoded ({' '.join(str(error).split()) or repr(error)})") from error
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF is common, and says nothing about the pixels
        return image


def _convert_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A new RGB image; Pillow's own conversion would clip deep pixels and show what transparency hides."""
    if image.mode.startswith(("I", "F")):
        image = _scale_to_8_bits(image, name)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _scale_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey pixels of 16 bits, of integers or of floating point as mode L; raises ImageError for an unknown range."""
    pixels = np.asarray(image)  # (H, W)
    low, high = pixels.min(), pixels.max()
    if image.mode.startswith("I;16"):
        scale = 255 / 65535
    elif low >= 0 and high <= (1 if image.mode == "F" else 255):
        scale = 255 if image.mode == "F" else 1
    elif low >= 0 and high <= 255:
        scale = 1
    elif low >= 0 and high <= 65535:
        scale = 255 / 65535
    else:  # negative values, NaN among them, or more than 16 bits
        raise ImageError(f"{name}: pixel values from {low} to {high}; expected 0 to 1 (floating point), 255 or 65535")
    return Image.fromarray(np.rint(pixels.astype(np.float32) * scale).astype(np.uint8))
