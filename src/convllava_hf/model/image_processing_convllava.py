# Copyright 2026 The convllava-hf authors. Licensed under the Apache License, Version 2.0.
"""Image processing of ConvLLaVA: square padding as the original, native aspect ratio, or squashing.

Notation: `H, W` height and width in pixels, `F` downsampling factor, one image token per cell of `F x F` pixels.

Source of the original behaviour: alibaba/conv-llava, `llava/mm_utils.py` (`expand2square`, `process_images`): paste on
a square of colour `int(mean * 255)`, resize (bicubic), scale by 1/255, normalise.
"""

import base64
import math
import os
from io import BytesIO

from .configuration_convllava import ConvLlavaConfig  # noqa: F401  (checks the version of transformers)
from .pixels_convllava import MAX_SIDE, convert_to_rgb, draft_photo, get_bounded_size


# isort: split
import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageType,
    PILImageResampling,
    SizeDict,
    get_image_type,
    httpx,
)
from transformers.processing_utils import ImagesKwargs


ASPECT_RATIOS = ("pad", "native", "squash")
# Beyond this ratio of the sides a row of cells says nothing about the image.
MAX_SIDE_RATIO = 200
# Pixels are read in strips of about this size: they fit into the second-level cache of a processor's core.
STRIP_BYTES = 2**20


class ConvLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings of the image processor beyond those of transformers.

    Args:
        image_aspect_ratio (`str`): `"pad"` (square, with the mean colour), `"native"` (keeps the aspect ratio) or
            `"squash"` (stretches to `size`).
        downsampling_factor (`int`): pixels per image token along a side, 64 for five stages.
        min_image_tokens (`int`): fewest tokens of an image, as far as `max_upscale` and `max_image_tokens` allow
            (`native` only).
        max_image_tokens (`int`): larger images are shrunk to at most this many tokens (`native` only). Default: the
            tokens of `size`.
        max_upscale (`float`): small images are enlarged to at most this many times their size, or to one cell where
            that is more (`native` only).
        original_rgb (`bool`): make images RGB as the original does, by Pillow's `convert("RGB")`: what transparency
            hides is seen, 16-bit values are clipped, and the EXIF orientation is ignored. Default: see
            [`convert_to_rgb`].
        draft_photos (`bool`): let the JPEG decoder shrink photos of at least twice the processed size, see
            [`draft_photo`]: faster, other pixels. For images that are not decoded yet.
    """

    image_aspect_ratio: str
    downsampling_factor: int
    min_image_tokens: int
    max_image_tokens: int | None
    max_upscale: float
    original_rgb: bool
    draft_photos: bool


def get_native_size(
    height: int, width: int, factor: int, min_tokens: int, max_tokens: int, max_upscale: float
) -> tuple[int, int]:
    """Size of an image whose sides are multiples of `factor`, close to its own aspect ratio and inside a token budget.

    Args:
        height, width: size of the image in pixels.
        factor: pixels per cell along a side.
        min_tokens, max_tokens: budget in cells. The lower end gives way to `max_upscale`; the upper end always holds.
        max_upscale: largest enlargement of a side; a side shorter than one cell still fills one.

    Returns:
        `(height, width)` in pixels.

    Raises:
        ValueError: the sides' ratio exceeds 200, or the budget is empty.
    """
    if min(height, width) < 1 or max(height, width) > MAX_SIDE_RATIO * min(height, width):
        raise ValueError(
            f"an image of {height}x{width} pixels (height x width) has sides more than {MAX_SIDE_RATIO}:1 apart; crop "
            "it, or use image_aspect_ratio='pad'."
        )
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(
            f"min_image_tokens={min_tokens} and max_image_tokens={max_tokens}: expected 1 <= min_image_tokens <= "
            "max_image_tokens."
        )
    area = height * width / factor**2
    scale = 1.0
    if area > max_tokens:
        scale = math.sqrt(max_tokens / area)
    elif area < min_tokens:
        scale = min(math.sqrt(min_tokens / area), max_upscale)

    limits = [max(1, math.floor(side * max_upscale / factor)) for side in (height, width)]
    rows, columns = (
        min(max(1, round(side * scale / factor)), limit) for side, limit in zip((height, width), limits, strict=True)
    )
    if rows * columns > max_tokens:
        rows, columns = (max(1, math.floor(side * scale / factor)) for side in (height, width))
        # A side held up at one cell leaves the other with more than its share.
        rows, columns = min(rows, max_tokens // min(rows, columns)), min(columns, max_tokens // min(rows, columns))
    while rows * columns < min_tokens:  # rounding, or a limit of one side, left too few
        larger = [
            (abs(math.log(height * c / (width * r))), r, c)
            for r, c in ((rows + 1, columns), (rows, columns + 1))
            if r <= limits[0] and c <= limits[1] and r * c <= max_tokens
        ]
        if not larger:
            break
        _, rows, columns = min(larger)
    return rows * factor, columns * factor


class ConvLlavaImageProcessingMixin:
    """What both backends share: settings, target sizes and batching."""

    valid_kwargs = ConvLlavaImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 1536, "width": 1536}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    image_aspect_ratio = "pad"
    downsampling_factor = 64
    min_image_tokens = 1
    max_image_tokens = None
    max_upscale = 2.0
    original_rgb = False
    draft_photos = False

    def fetch_images(self, image_url_or_urls):
        """Opens paths, URLs and base64 with Pillow and leaves their pixels as they are, for [`convert_to_rgb`].

        transformers' own loader would drop what transparency and 16 bits say.
        """
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(item) for item in source]
        if not isinstance(source, str):
            return source
        if source.startswith(("http://", "https://")):
            response = httpx.get(source, follow_redirects=True)
            response.raise_for_status()
            return Image.open(BytesIO(response.content))
        if os.path.isfile(source):
            return Image.open(source)
        try:
            data = source.split(",")[1] if source.startswith("data:image/") else source
            return Image.open(BytesIO(base64.decodebytes(data.encode())))
        except Exception as error:  # broken data fails in every way there is
            raise ValueError(
                f"{source[:100]!r} is no image; expected a URL that begins with http:// or https://, the path of an "
                f"image file, or an image in base64 ({error})"
            ) from error

    def _make_rgb(
        self, image: Image.Image, original_rgb: bool | None = None, draft_photos: bool | None = None, **kwargs
    ) -> Image.Image:
        """A Pillow image in RGB, by the settings."""
        if draft_photos:
            draft_photo(image, self._target_size(image.height, image.width, **kwargs))
        if original_rgb:
            return image if image.mode == "RGB" else image.convert("RGB")
        return convert_to_rgb(image)

    def get_processed_size(self, height: int, width: int, **kwargs) -> tuple[int, int]:
        """Size that an image is processed to, without touching its pixels.

        Args:
            height, width: size of the image in pixels.
            kwargs: settings that replace those of this processor, for example `max_image_tokens=144`.

        Returns:
            `(height, width)` in pixels, multiples of `downsampling_factor`.

        Raises:
            ValueError: an unknown `image_aspect_ratio`, a `size` that is no multiple of the downsampling factor, or
                an image that `native` cannot take (see `get_native_size`).
        """
        settings = {key: kwargs.get(key, getattr(self, key, None)) for key in self.valid_kwargs.__annotations__}
        settings = self._standardize_kwargs(**settings)
        return self._target_size(*get_bounded_size(height, width), **settings)

    def num_image_tokens(self, height: int, width: int, **kwargs) -> int:
        """Number of tokens of an image of `height x width` pixels; arguments as for `get_processed_size`."""
        factor = kwargs.get("downsampling_factor", self.downsampling_factor)
        rows, columns = self.get_processed_size(height, width, **kwargs)
        return (rows // factor) * (columns // factor)

    def _target_size(
        self,
        height: int,
        width: int,
        do_resize: bool,
        size: SizeDict,
        image_aspect_ratio: str,
        downsampling_factor: int,
        min_image_tokens: int,
        max_image_tokens: int | None,
        max_upscale: float,
        **kwargs,
    ) -> tuple[int, int]:
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(f"image_aspect_ratio={image_aspect_ratio!r}; expected one of {', '.join(ASPECT_RATIOS)}.")
        if not do_resize:
            target = (height, width)
        elif not (size.height and size.width):
            raise ValueError(f"size={dict(size)} must give 'height' and 'width', in pixels.")
        elif image_aspect_ratio == "native":
            max_tokens = max_image_tokens
            if max_tokens is None:
                max_tokens = (size.height // downsampling_factor) * (size.width // downsampling_factor)
            height, width = get_bounded_size(height, width)
            return get_native_size(height, width, downsampling_factor, min_image_tokens, max_tokens, max_upscale)
        elif image_aspect_ratio == "pad" and size.height != size.width:
            raise ValueError(f"size={dict(size)} is not square; image_aspect_ratio='pad' needs height == width.")
        else:
            target = (size.height, size.width)
        if target[0] % downsampling_factor or target[1] % downsampling_factor:
            raise ValueError(
                f"an image of {target[0]}x{target[1]} pixels cannot be split into cells of {downsampling_factor}x"
                f"{downsampling_factor}; choose a size whose sides are multiples of {downsampling_factor}."
            )
        return target

    def to_dict(self):
        output = super().to_dict()
        # One entry per backend, the PIL one first, is what AutoImageProcessor reads from remote code.
        if "AutoImageProcessor" in output.get("auto_map", {}):
            module = "image_processing_convllava"
            output["auto_map"]["AutoImageProcessor"] = [
                f"{module}.ConvLlavaImageProcessorPil",
                f"{module}.ConvLlavaImageProcessor",
            ]
        return output


class ConvLlavaImageProcessor(ConvLlavaImageProcessingMixin, TorchvisionBackend):
    """Image processor on tensors, on the CPU or a GPU.

    Pixels stay `uint8` until after resizing. torch's kernel rounds its weights more coarsely than Pillow's: against the
    original, fewer than 1% of the values differ, by one level of 255, and in rare places next to hard edges by two.
    `backend="pil"` is exact.

    Args:
        kwargs: see [`ConvLlavaImageProcessorKwargs`] and transformers' `ImagesKwargs`.
    """

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, device=None, **kwargs):
        """Makes a `(3, H, W)` tensor of an image. A Pillow image that stays on the CPU only becomes RGB: its pixels are
        read while it is resized."""
        if get_image_type(image) == ImageType.PIL and do_convert_rgb:
            image = self._make_rgb(image, **kwargs)
            if device is None or torch.device(device).type == "cpu":
                return image
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)  # (H, W, 3) -> (3, H, W)
        return super().process_image(image, do_convert_rgb, input_data_format, device, **kwargs)

    def _preprocess(self, images, return_tensors, disable_grouping=None, **kwargs) -> BatchFeature:
        """Processes images of any sizes into one tensor, padded to the largest.

        Args:
            images: list of Pillow images in RGB and `(3, H, W)` tensors.
            return_tensors: type of the result; `None` gives lists.

        Returns:
            `pixel_values` `(I, 3, H, W)`, zero outside the image, and `image_sizes` `(I, 2)`, heights and widths in
            pixels without that padding.
        """
        resized = [self._resize_one(image, **kwargs) for image in images]
        sizes = [tuple(image.shape[-2:]) for image in resized]
        full = tuple(map(max, zip(*sizes, strict=True)))
        channels = len(resized[0])
        scale, offset = self._get_scale_and_offset(channels, **kwargs)
        dtype = torch.float32 if scale else resized[0].dtype
        allocate = torch.empty if len(set(sizes)) == 1 else torch.zeros
        pixel_values = allocate(len(resized), channels, *full, dtype=dtype, device=resized[0].device)
        for image, pixels, (height, width) in zip(resized, pixel_values, sizes, strict=True):
            # An accelerator takes all rows at once.
            rows = max(1, STRIP_BYTES // (12 * width)) if pixels.device.type == "cpu" else height
            for start in range(0, height, rows):
                strip = pixels[:, start : min(start + rows, height), :width]
                part = image[:, start : start + rows]
                # Interleaved to planar in bytes first: four times less to move than in floats.
                strip.copy_(part if part.dtype == dtype else part.contiguous())
                for channel in range(len(scale)):
                    torch.add(offset[channel], strip[channel], alpha=scale[channel], out=strip[channel])
        if return_tensors is None:
            pixel_values = list(pixel_values)
        return BatchFeature({"pixel_values": pixel_values, "image_sizes": sizes}, tensor_type=return_tensors)

    def _get_scale_and_offset(
        self, channels, do_rescale, rescale_factor, do_normalize, image_mean, image_std, **kwargs
    ) -> tuple[list[float], list[torch.Tensor]]:
        """Rescaling and normalising as one product and one sum per channel; empty lists where neither is wanted."""
        if not (do_rescale or do_normalize):
            return [], []
        factor = rescale_factor if do_rescale else 1.0
        mean, std = (image_mean, image_std) if do_normalize else ((0.0,) * channels, (1.0,) * channels)
        offset = [torch.tensor(-m / s) for m, s in zip(mean, std, strict=True)]
        return [factor / s for s in std], offset

    def normalize_bytes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Rescales and normalises, on their device, pixels that a call with both left out has prepared.

        Bytes are a quarter of what floats are to copy. On the CPU the result is that of preparing floats, to the bit.

        Args:
            pixel_values: `(I, 3, H, W)`, `uint8`.

        Returns:
            The same shape in float32; also what pads smaller images is normalised, as black.
        """
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        settings = {name: getattr(self, name) for name in names}
        scale, offset = self._get_scale_and_offset(pixel_values.shape[1], **settings)
        pixel_values = pixel_values.float()
        for channel in range(len(scale)):
            pixels = pixel_values[:, channel]
            torch.add(offset[channel], pixels, alpha=scale[channel], out=pixels)
        return pixel_values

    def _resize_one(self, image, do_resize, resample, image_mean, **kwargs) -> torch.Tensor:
        """Pads and resizes one image to its target; `(3, H, W)`, `uint8` where the image was."""
        is_tensor = isinstance(image, torch.Tensor)
        height, width = image.shape[-2:] if is_tensor else (image.height, image.width)
        target = self._target_size(height, width, do_resize=do_resize, **kwargs)
        pad = do_resize and kwargs["image_aspect_ratio"] == "pad"
        if pad and max(height, width) > MAX_SIDE:
            bounded = get_bounded_size(height, width)
            if not is_tensor:
                image, is_tensor = self._resize_strips(image, bounded, resample), True
            else:
                image = self.resize(image[None], SizeDict(height=bounded[0], width=bounded[1]), resample)[0]
        if not is_tensor:
            return self._resize_strips(image, target, resample, image_mean if pad else None)
        if pad:
            image = self._pad_to_square(image, image_mean)
        if tuple(image.shape[-2:]) != target:
            image = self.resize(image[None], SizeDict(height=target[0], width=target[1]), resample)[0]
        return image

    def _resize_strips(self, image, target: tuple[int, int], resample, pad_mean=None) -> torch.Tensor:
        """Pads and resizes a Pillow image while reading it: a wide one is shrunk across strip by strip, then down.

        torch's `uint8` kernel goes across, rounds, and then goes down as well, so the bits are the same. But a strip
        stays in the processor's cache, and neither a copy of the image nor the square around it is ever written out.

        Args:
            image: Pillow image, RGB.
            target: `(height, width)` in pixels.
            pad_mean: mean colour of the square to centre the image on, 0 to 1; `None` does not pad.

        Returns:
            `(3, height, width)`, `uint8`, interleaved.
        """
        width, height = image.size
        rows, columns = (height, width) if pad_mean is None else (max(image.size), max(image.size))
        top, left = (rows - height) // 2, (columns - width) // 2
        shrinks = target[1] < columns
        # In numpy: so small copies in torch would wake all its threads.
        canvas = np.empty((rows, target[1] if shrinks else columns, 3), dtype=np.uint8)
        colour = np.array([int(mean * 255) for mean in pad_mean or (0, 0, 0)], dtype=np.uint8)
        line = np.tile(colour, (columns, 1))  # copying lines is several times faster than repeating three bytes
        canvas[:top], canvas[top + height :] = line[: canvas.shape[1]], line[: canvas.shape[1]]
        strip_rows = max(1, STRIP_BYTES // (3 * columns))
        strip = np.tile(line, (min(strip_rows, height), 1, 1))  # (h, columns, 3)
        for start in range(0, height, strip_rows):
            stop = min(start + strip_rows, height)
            part = strip[: stop - start]
            part[:, left : left + width] = np.asarray(image.crop((0, start, width, stop)))
            if shrinks:
                size = SizeDict(height=stop - start, width=target[1])
                part = torch.from_numpy(part).permute(2, 0, 1)[None]  # (1, 3, h, columns)
                part = self.resize(part, size, resample)[0].permute(1, 2, 0).numpy()
            canvas[top + start : top + stop] = part
        result = torch.from_numpy(canvas).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
        if tuple(result.shape[-2:]) != target:
            result = self.resize(result[None], SizeDict(height=target[0], width=target[1]), resample)[0]
        return result

    def _pad_to_square(self, image: torch.Tensor, image_mean) -> torch.Tensor:
        """Centres `(3, H, W)` on a square of the mean colour; an odd pixel goes below or to the right."""
        channels, height, width = image.shape
        side = max(height, width)
        if height == width:
            return image
        top, left = (side - height) // 2, (side - width) // 2
        square = image.new_empty((side, side, channels)).permute(2, 0, 1)  # interleaved, as the image
        for channel, mean in enumerate(image_mean):
            square[channel] = int(mean * 255) if image.dtype == torch.uint8 else mean
        square[:, top : top + height, left : left + width] = image
        return square


class ConvLlavaImageProcessorPil(ConvLlavaImageProcessingMixin, PilBackend):
    """Image processor on Pillow and numpy: the original's arithmetic, exactly. Arguments as for
    [`ConvLlavaImageProcessor`]."""

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs):
        """Makes a `(3, H, W)` array of an image."""
        if get_image_type(image) == ImageType.PIL and do_convert_rgb:
            image, do_convert_rgb = self._make_rgb(image, **kwargs), False
        return super().process_image(image, do_convert_rgb, input_data_format, **kwargs)

    def _preprocess(self, images, return_tensors, disable_grouping=None, **kwargs) -> BatchFeature:
        """Processes `(3, H, W)` arrays; see [`ConvLlavaImageProcessor._preprocess`]."""
        processed = [self._process_one(image, **kwargs) for image in images]
        sizes = [tuple(image.shape[-2:]) for image in processed]
        if len(set(sizes)) > 1:
            processed = self.pad(processed)
        return BatchFeature({"pixel_values": processed, "image_sizes": sizes}, tensor_type=return_tensors)

    def _process_one(
        self, image, do_resize, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std, **kwargs
    ) -> np.ndarray:
        height, width = image.shape[-2:]
        target = self._target_size(height, width, do_resize=do_resize, **kwargs)
        if do_resize:
            if kwargs["image_aspect_ratio"] == "pad":
                if max(height, width) > MAX_SIDE:
                    bounded = get_bounded_size(height, width)
                    image = self.resize(image, SizeDict(height=bounded[0], width=bounded[1]), resample)
                image = self._pad_to_square(image, image_mean)
            if tuple(image.shape[-2:]) != target:
                image = self.resize(image, SizeDict(height=target[0], width=target[1]), resample)
        if do_rescale:
            image = self.rescale(image, rescale_factor)
        if do_normalize:
            image = self.normalize(image, image_mean, image_std)
        return image

    def _pad_to_square(self, image: np.ndarray, image_mean) -> np.ndarray:
        """Centres `(3, H, W)` on a square of the mean colour; an odd pixel goes below or to the right."""
        channels, height, width = image.shape
        side = max(height, width)
        colour = [int(mean * 255) if image.dtype == np.uint8 else mean for mean in image_mean]
        square = np.empty((channels, side, side), image.dtype)
        square[:] = np.array(colour, image.dtype)[:, None, None]
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = image
        return square


__all__ = ["ConvLlavaImageProcessor", "ConvLlavaImageProcessorPil"]
