"""Images: opened from anywhere as plain RGB, in the columns of datasets, measured, and kept within budgets of tokens.

A dataset has a list of images in the column `images`, or one in the column `image`, as in TRL. It may have both, as
where two kinds are joined; in a row with an `image` that one counts. Sizes are in pixels; a token stands for a square
cell of `downsampling_factor` pixels a side.

Notation: `H, W` pixels.
"""

import asyncio
import base64
import binascii
import math
import os
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from PIL import ExifTags, Image

from . import __version__
from .model.pixels_convllava import convert_to_rgb, draft_photo


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


MAX_DOWNLOAD_BYTES = 64 * 2**20
ImageSource = str | Path | bytes | Image.Image
# Height and width in pixels of an image -> those that it will be processed to.
GetSize = Callable[[int, int], tuple[int, int]]


class ImageError(ValueError):
    """An image that cannot be used. The message starts with the image's name: its path, URL or kind."""


class ImageTooLargeError(ImageError):
    """An image with more pixels than the limit."""


def load_image(
    source: ImageSource,
    timeout: float = 20.0,
    original_rgb: bool = False,
    draft: GetSize | None = None,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Reads an image from anywhere and makes plain RGB of it, the same pixels as in every other place.

    The EXIF orientation is applied, transparent pixels become white, 16-bit and floating-point values are scaled to 8
    bits, and of an animation the first frame counts (of a Pillow image the current one). Sides beyond 16,384 pixels
    are shrunk to that. The limit on pixels is Pillow's own, `PIL.Image.MAX_IMAGE_PIXELS`; `None` lifts it.

    Args:
        source: path, `http(s)://` URL, `data:` URI, the bytes of an image file, or a Pillow image (left unchanged).
        timeout: seconds for a whole download.
        original_rgb: make it RGB as the original does, see [`ConvLlavaImageProcessorKwargs`].
        draft: let the JPEG decoder shrink a photo by 2, 4 or 8, as long as its longer side keeps that of the size that
            this says, such as an image processor's `get_processed_size`. Faster for photos of at least twice the size,
            and not the same pixels: they are averaged over whole blocks before they are resized.
        formats: names of Pillow's formats to accept; `None` for all that it reads.
        max_pixels: most pixels, width times height; `None` for Pillow's limit.

    Returns:
        A Pillow image of mode RGB, upright; `source` itself if it is one already.

    Raises:
        ImageError: the source does not exist, cannot be fetched, is no image, is broken, holds values of an unknown
            range, or has more pixels than the limit.
    """
    name = _name_image(source)
    if isinstance(source, Image.Image):
        return _decode(source, name, original_rgb, max_pixels)  # which may be loaded, and is the caller's
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
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"{name}: {error}") from error
    except PermissionError as error:
        raise ImageError(f"{name}: permission denied") from error
    except Exception as error:  # readers of broken headers raise whatever comes of it
        wanted = f"one of the formats {', '.join(formats)}" if formats else "a format that Pillow reads"
        raise ImageError(f"{name}: not an image in {wanted}") from error
    with image:
        if draft is not None:
            draft_photo(image, draft(image.height, image.width))
        return _decode(image, name, original_rgb, max_pixels)


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
    """Fetches a URL with one deadline for all of it and a limit on size; raises ImageError."""
    # The HTTP client that transformers itself fetches images with: its distribution differs between versions. It comes
    # with torch, which opening files does not need.
    from transformers.image_utils import httpx

    done = Future()

    def run():
        try:
            # Redirects, headers and body may each drip for ever; cancelling the task ends it wherever it waits.
            done.set_result(asyncio.run(asyncio.wait_for(_read_url(url, name), timeout)))
        except BaseException as error:
            done.set_exception(error)

    # In a thread, as the caller may have an event loop of its own. It is a daemon because looking a name up, which
    # cannot be cancelled, must not hold the program.
    Thread(target=run, name="convllava-download", daemon=True).start()
    try:
        return done.result(timeout + 1)
    except (TimeoutError, asyncio.TimeoutError, FutureTimeout) as error:  # noqa: UP041 -- three classes in Python 3.10
        raise ImageError(f"{name}: the download took longer than {timeout:g} seconds") from error
    except httpx.HTTPStatusError as error:
        raise ImageError(f"{name}: HTTP status {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{name}: cannot be fetched ({error or type(error).__name__})") from error


async def _read_url(url: str, name: str) -> bytes:
    from transformers.image_utils import httpx

    headers = {"User-Agent": f"convllava-hf/{__version__}"}  # some hosts refuse the client's own
    data = bytearray()
    async with (
        httpx.AsyncClient(timeout=None, follow_redirects=True, headers=headers) as client,
        client.stream("GET", url) as response,
    ):
        response.raise_for_status()
        async for chunk in response.aiter_bytes():
            data += chunk
            if len(data) > MAX_DOWNLOAD_BYTES:
                raise ImageError(f"{name}: more than {MAX_DOWNLOAD_BYTES // 2**20} MiB; pass a path")
    return bytes(data)


def _decode_data_uri(uri: str, name: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError(f"{name}: expected data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name}: broken base64 ({error})") from error


def _decode(image: Image.Image, name: str, original_rgb: bool, max_pixels: int | None) -> Image.Image:
    """Decodes an opened image and makes it RGB; raises ImageError."""
    limit = max_pixels or Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        way_out = "" if max_pixels else ", or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        raise ImageTooLargeError(
            f"{name}: {image.width}x{image.height} pixels are more than the limit of {limit}, a guard against "
            f"decompression bombs; shrink the image{way_out}"
        )
    try:
        converted = image.convert("RGB") if original_rgb else convert_to_rgb(image)
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders of broken data raise whatever comes of it
        raise ImageError(f"{name}: cannot be decoded ({' '.join(str(error).split()) or repr(error)})") from error
    # A copy of an image that hangs on its file, which is about to be closed, and on an orientation beside its pixels.
    return converted.copy() if converted is image and type(image) is not Image.Image else converted


def fit_to_corner(image: Image.Image, side: int) -> Image.Image:
    """Shrinks or enlarges an image to a square, keeps its aspect ratio and fills the rest with black.

    LLaVAR prepares images like this when it answers (not in training): put it before the processor. Stock image
    processors centre what they pad, and put black in after normalising.

    Args:
        image: any image.
        side: side of the square in pixels, the processor's `crop_size`.

    Returns:
        RGB, `(side, side)`, the image at its upper left.

    Source: SALT-NLP/LLaVAR, `LLaVA/llava/eval/run_llava.py`, `resize_image`.
    """
    size = tuple(max(1, length * side // max(image.size)) for length in image.size)
    square = Image.new("RGB", (side, side))
    square.paste(convert_to_rgb(image).resize(size, Image.Resampling.BICUBIC))
    return square


# ---- the images of a dataset's rows

COLUMNS = ("images", "image")


def undecode_images(dataset: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
    """The same rows with images as `{"bytes", "path"}`: to read headers, take hashes, or name the row that fails.

    Columns that convert their images on decoding (`Image(mode=...)`) stay as they are.

    Args:
        dataset: with any of the columns, or none.

    Raises:
        ValueError: a column that holds something else.
    """
    from datasets import Image as ImageFeature
    from datasets import LargeList, List

    for column in COLUMNS:
        if column not in (dataset.column_names or []):
            continue
        feature = (dataset.features or {}).get(column)
        is_list = isinstance(feature, (List, LargeList))
        if getattr(feature.feature if is_list else feature, "mode", None):
            continue
        is_list = is_list or (column == "images" and not isinstance(feature, ImageFeature))
        undecoded = ImageFeature(decode=False)
        try:
            dataset = dataset.cast_column(column, List(undecoded) if is_list else undecoded)
        except Exception as error:  # those of arrow and of datasets have no common base
            raise ValueError(f"the column {column!r} holds {feature}; expected images or lists of them.") from error
    return dataset


def list_images(row: dict) -> list:
    """The images of a row, decoded or not; empty where it has none."""
    found = row["image"] if row.get("image") is not None else row.get("images")
    found = found if isinstance(found, (list, tuple)) else [found]
    return [image for image in found if image is not None]


def read_size(image: dict | Image.Image) -> tuple[int, int]:
    """Height and width in pixels, of an undecoded image from its first bytes, upright where it is a photo.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    try:
        with Image.open(BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
            # Other formats tell their orientation after their pixels.
            lies = opened.format in ("JPEG", "MPO") and _read_orientation(opened) in (5, 6, 7, 8)
            return (opened.width, opened.height) if lies else (opened.height, opened.width)
    except Exception as error:  # Pillow raises whatever a broken file makes its decoders stumble over
        raise ValueError(_say_why(image, error)) from error


def _read_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF is common, and says nothing about the pixels
        return 1


def decode_image(image: dict | Image.Image, original_rgb: bool = False, draft: GetSize | None = None) -> Image.Image:
    """The image in RGB, as `load_image` gives it.

    Args:
        image: decoded by `datasets`, or its `{"bytes", "path"}`.
        original_rgb, draft: see `load_image`.

    Raises:
        ValueError: it cannot be read.
    """
    if not isinstance(image, dict):
        return load_image(image, original_rgb=original_rgb)
    if image["bytes"]:
        return load_image(image["bytes"], original_rgb=original_rgb, draft=draft)
    if image["path"] and os.path.isfile(image["path"]):
        return load_image(image["path"], original_rgb=original_rgb, draft=draft)
    from datasets import Image as ImageFeature

    try:  # files inside archives and on hosts, which datasets opens
        return load_image(ImageFeature().decode_example(image), original_rgb=original_rgb)
    except Exception as error:  # see above
        raise ValueError(_say_why(image, error)) from error


def _say_why(image: dict, error: Exception) -> str:
    if not image["bytes"] and not image["path"]:
        return "it has neither bytes nor a path"
    return f"{error or type(error).__name__}"


# ---- how many tokens an image may take


def limit_image_tokens(image_processor, max_image_tokens: int) -> dict:
    """Settings of the image processor under which no image takes more than `max_image_tokens`.

    `native` has such a budget. `pad` and `squash` keep the preprocessing that the model was trained with, at the
    largest size of the same shape that fits.

    Args:
        image_processor: of a checkpoint of ours; stays as it is.
        max_image_tokens: most tokens of an image.

    Returns:
        Keyword arguments for a call of the image processor.

    Raises:
        ValueError: fewer than one token, or an image processor whose images have a fixed number of tokens.
    """
    if max_image_tokens < 1:
        raise ValueError(f"max_image_tokens={max_image_tokens}; expected 1 or more.")
    _check_that_sizes_vary(image_processor, f"max_image_tokens={max_image_tokens}")
    factor, size = image_processor.downsampling_factor, image_processor.size
    rows, columns = size["height"] // factor, size["width"] // factor
    if image_processor.image_aspect_ratio == "native":
        budget = min(max_image_tokens, image_processor.max_image_tokens or rows * columns)
        return {"max_image_tokens": budget, "min_image_tokens": min(image_processor.min_image_tokens, budget)}
    scale = min(1.0, math.sqrt(max_image_tokens / (rows * columns)))
    shorter = max(1, math.floor(min(rows, columns) * scale + 1e-9))
    longer = min(math.floor(max(rows, columns) * scale + 1e-9), max_image_tokens // shorter)
    rows, columns = (shorter, longer) if rows <= columns else (longer, shorter)
    return {"size": {"height": rows * factor, "width": columns * factor}}


def get_draft(image_processor, draft_photos: bool | None = None, **settings) -> GetSize | None:
    """What `load_image` takes as `draft` for an image processor.

    Args:
        image_processor: of a checkpoint.
        draft_photos: whether photos are drafted. Default: what the image processor says.
        settings: of the image processor, in the place of its own.

    Returns:
        `None` where images are decoded whole.

    Raises:
        ValueError: an image processor whose images have a fixed size is to draft photos.
    """
    if draft_photos is None:
        draft_photos = getattr(image_processor, "draft_photos", False)
    if not draft_photos:
        return None
    _check_that_sizes_vary(image_processor, "draft_photos=True")
    return partial(image_processor.get_processed_size, **settings)


def encode_thumbnail(image: Image.Image, largest: int) -> str:
    """An image as the URL of a JPEG, for pages that need no other file; no side is longer than `largest` pixels."""
    small, file = image.convert("RGB"), BytesIO()
    small.thumbnail((largest, largest))
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def set_image_size(image_processor, side: int) -> None:
    """Sets the square that images are padded or squashed to; for `native` that square is the budget.

    Args:
        image_processor: of a checkpoint of ours; is changed.
        side: of the square.

    Raises:
        ValueError: not a multiple of the cell's side, or an image processor whose images have a fixed size.
    """
    _check_that_sizes_vary(image_processor, f"image_size={side}")
    factor = image_processor.downsampling_factor
    if side < factor or side % factor:
        raise ValueError(f"image_size={side}; expected a multiple of {factor}, the side of a token's cell in pixels.")
    image_processor.size = type(image_processor.size)(height=side, width=side)
    if image_processor.image_aspect_ratio == "native":
        image_processor.max_image_tokens = None
        image_processor.min_image_tokens = min(image_processor.min_image_tokens, (side // factor) ** 2)


def _check_that_sizes_vary(image_processor, setting: str):
    if not hasattr(image_processor, "num_image_tokens"):
        raise ValueError(
            f"{setting} is not supported by {type(image_processor).__name__}: its images have a fixed number of "
            "tokens. Leave it out, or take a checkpoint with a convolutional tower."
        )
