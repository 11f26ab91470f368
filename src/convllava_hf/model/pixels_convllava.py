# Copyright 2026 The convllava-hf authors. Licensed under the Apache License, Version 2.0.
"""Plain RGB of any Pillow image, and smaller decoding of photos. Loads neither torch nor transformers: building a
dataset decodes every image, in as many processes as there are cores.

Notation: `H, W` height and width in pixels.
"""

import math

import numpy as np
from PIL import Image, ImageOps


# Longer sides are shrunk to this: the square around a strip of 65,535 x 1 pixels would need 13 GB, and models see far
# less.
MAX_SIDE = 16384
ORIENTATION = 0x0112  # the EXIF tag


def draft_photo(image: Image.Image, target: tuple[int, int]) -> None:
    """Has a JPEG that is not decoded yet decoded at 1/2, 1/4 or 1/8, while its longer side keeps that of the target.

    The decoder then averages blocks of 2, 4 or 8 pixels a side, before the rest is resized as always. What is no JPEG,
    or decoded already, stays as it is.

    Args:
        image: as `PIL.Image.open` gives it; its `size` changes.
        target: `(height, width)` in pixels that the image will be processed to.
    """
    scale = max(1.0, max(image.size) / max(target))
    image.draft(image.mode, tuple(math.ceil(side / scale) for side in image.size))


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Makes plain RGB of an image, as people see it: upright, transparent pixels white, deep pixels scaled to 8 bits.

    Every way of this package to open an image ends here. Sides beyond 16,384 pixels are shrunk to that.

    Args:
        image: any Pillow image; stays as it is.

    Returns:
        An image of mode RGB, `image` itself where nothing has to be done.

    Raises:
        ValueError: floating-point or integer values of an unknown range.
        OSError: broken data.
    """
    image.load()
    try:
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF is common, and says nothing about the pixels
        pass
    if image.mode.startswith(("I", "F")):
        image = _scale_to_8_bits(image)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    height, width = get_bounded_size(image.height, image.width)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey pixels of 16 bits, of integers or of floating point as mode L; raises ValueError for an unknown range."""
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
        raise ValueError(f"pixel values from {low} to {high}; expected 0 to 1 (floating point), 255 or 65535")
    return Image.fromarray(np.rint(pixels.astype(np.float32) * scale).astype(np.uint8))


def get_bounded_size(height: int, width: int) -> tuple[int, int]:
    """`(height, width)` in pixels with the longer side at most `MAX_SIDE` and the same aspect ratio."""
    scale = min(1.0, MAX_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
