"""Image processing: sizes, budgets, batching, and equality of the two backends."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from convllava_hf import ConvLlavaImageProcessor, ConvLlavaImageProcessorPil
from convllava_hf.model.image_processing_convllava import get_native_size


BACKENDS = {"torchvision": ConvLlavaImageProcessor, "pil": ConvLlavaImageProcessorPil}
SIDE = 256


def photo(width, height, seed=0):
    """A smooth picture with edges, `(height, width)`, as photographs have."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request):
    return request.param


def make(backend, **kwargs):
    return backend(size={"height": SIDE, "width": SIDE}, **kwargs)


def in_levels(pixel_values, processor):
    """Normalised values back to the 0..255 scale of the pixels."""
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_std, processor.image_mean))
    return (pixel_values * std + mean) * 255


# ---- pad and squash


@pytest.mark.parametrize("size", [(230, 140), (88, 151), (60, 44), (256, 256), (1, 1), (700, 7)])
def test_pad_is_the_originals_square(backend, size):
    processor, image = make(backend), photo(*size)
    side, colour = max(size), tuple(int(mean * 255) for mean in processor.image_mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = torch.from_numpy(np.array(square.resize((SIDE, SIDE), Image.BICUBIC))).permute(2, 0, 1).float()
    outputs = processor(image, return_tensors="pt")
    difference = (in_levels(outputs["pixel_values"][0], processor) - expected).abs()
    if backend is ConvLlavaImageProcessorPil:
        assert difference.max() < 1e-3
    else:  # fixed-point weights of torch's uint8 kernel: one level in few places, two in very few
        assert difference.max() < 2.001
        assert (difference > 0.5).float().mean() < 0.01 and (difference > 1.5).float().mean() < 1e-4
    assert outputs["image_sizes"].tolist() == [[SIDE, SIDE]]


def test_squash_stretches_to_the_size(backend):
    image = photo(300, 90)
    processor = make(backend, image_aspect_ratio="squash")
    expected = torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.BICUBIC))).permute(2, 0, 1).float()
    result = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (in_levels(result, processor) - expected).abs().max() < 1.001


def test_tensors_and_arrays_give_what_images_give(backend):
    image = photo(300, 200)
    array = np.array(image)
    processor = make(backend)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    for other in (array, torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)):
        result = processor(other, return_tensors="pt")["pixel_values"]
        assert (in_levels(result, processor) - in_levels(expected, processor)).abs().max() < 1.001


# ---- native


@pytest.mark.parametrize("seed", range(4))
def test_native_sizes_keep_their_promises(seed):
    generator = np.random.default_rng(seed)
    for _ in range(300):
        height, width = (int(2 ** generator.uniform(0, 13)) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        low = int(generator.integers(1, 64))
        high = low + int(generator.integers(0, 600))
        upscale = float(generator.uniform(1, 4))
        rows, columns = (side // 64 for side in get_native_size(height, width, 64, low, high, upscale))
        assert 1 <= rows * columns <= high
        limits = [max(1, int(side * upscale // 64)) for side in (height, width)]
        can_grow = [
            (rows + r) * (columns + c) <= high and rows + r <= limits[0] and columns + c <= limits[1]
            for r, c in ((1, 0), (0, 1))
        ]
        assert rows * columns >= low or not any(can_grow)
        for cells, side in ((rows, height), (columns, width)):
            assert cells == 1 or cells * 64 <= side * upscale
        if height * width >= low * 64**2 and height * width <= high * 64**2 and min(height, width) >= 256:
            # Inside the budget an image keeps its size to within one cell.
            assert abs(rows - height / 64) <= 1 and abs(columns - width / 64) <= 1


@pytest.mark.parametrize(
    "size, expected",
    [
        ((1536, 1536), (1536, 1536)),  # 576 tokens
        ((3000, 4000), (1280, 1728)),  # 540: 12 megapixels, 4:3
        ((480, 640), (512, 640)),  # 80: its own size
        ((100, 10000), (128, 9984)),  # 312: 100:1
        ((1, 1), (64, 64)),
    ],
)
def test_native_sizes_of_known_images(size, expected):
    assert get_native_size(*size, 64, 1, 576, 2.0) == expected


def test_native_enlarges_small_images_to_the_lower_end_of_the_budget(backend):
    processor = make(backend, image_aspect_ratio="native", min_image_tokens=8, max_image_tokens=16)
    assert processor.num_image_tokens(150, 160) == 9
    assert processor.num_image_tokens(350, 190, min_image_tokens=16, max_image_tokens=64) >= 16
    assert processor.num_image_tokens(70, 70) == 4  # max_upscale 2.0 wins
    assert processor.num_image_tokens(70, 70, max_upscale=4.0) == 9


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "native", "squash"])
def test_promised_sizes_are_the_processed_sizes(backend, image_aspect_ratio):
    processor = make(backend, image_aspect_ratio=image_aspect_ratio)
    images = [photo(*size) for size in ((300, 90), (64, 200), (129, 129), (500, 400))]
    outputs = processor(images, return_tensors="pt")
    for image, size in zip(images, outputs["image_sizes"].tolist(), strict=True):
        assert tuple(size) == processor.get_processed_size(image.height, image.width)
        assert processor.num_image_tokens(image.height, image.width) == math.prod(size) // 64**2
    height, width = outputs["image_sizes"].amax(0).tolist()
    assert outputs["pixel_values"].shape == (4, 3, height, width)


def test_images_of_a_batch_equal_images_alone(backend):
    processor = make(backend, image_aspect_ratio="native")
    images = [photo(300, 90, 1), photo(64, 200, 2)]
    outputs = processor(images, return_tensors="pt")
    for image, pixel_values, (height, width) in zip(
        images, outputs["pixel_values"], outputs["image_sizes"].tolist(), strict=True
    ):
        alone = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixel_values[:, :height, :width], alone)
        assert pixel_values[:, height:].abs().sum() == 0 and pixel_values[:, :, width:].abs().sum() == 0


def test_paths_give_upright_pixels_in_both_backends(tmp_path):
    image = photo(300, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    for backend in BACKENDS.values():
        processor = make(backend)
        from_path = processor(str(tmp_path / "turned.png"), return_tensors="pt")["pixel_values"]
        assert torch.equal(from_path, processor(image.rotate(-90, expand=True), return_tensors="pt")["pixel_values"])


def test_long_strips_are_padded_within_bounds(backend, monkeypatch):
    for module in ("image_processing_convllava", "pixels_convllava"):
        monkeypatch.setattr(f"convllava_hf.model.{module}.MAX_SIDE", 4096)  # as 16,384, but faster
    strip = Image.new("RGB", (40000, 2), "red")  # its square would hold 4.8 GB
    pixels = in_levels(make(backend)(strip, return_tensors="pt")["pixel_values"][0], make(backend))
    assert pixels.shape == (3, SIDE, SIDE) and pixels[0, 0, 0].round() == int(make(backend).image_mean[0] * 255)


# ---- refusals


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"image_aspect_ratio": "anyres"}, "'anyres'; expected one of pad, native, squash"),
        ({"size": {"height": 100, "width": 100}}, "100x100.*64"),
        ({"size": {"height": 128, "width": 256}}, "128.*256"),
        ({"size": {"shortest_edge": 128}}, "shortest_edge.*128"),
        ({"image_aspect_ratio": "native", "min_image_tokens": 9, "max_image_tokens": 4}, "min_image_tokens=9"),
        ({"do_resize": False}, "90x300.*64"),
    ],
)
def test_bad_settings_are_refused_by_name(backend, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(backend)(photo(300, 90), **kwargs)


def test_extreme_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="1x201 pixels.*200:1"):
        get_native_size(1, 201, 64, 1, 576, 2.0)


@pytest.mark.parametrize("settings", [{}, {"do_rescale": False}, {"do_normalize": False}])
def test_bytes_are_normalised_later_to_the_same_pixels(settings):
    """On the CPU to the bit: what `answer` sends to the model's device."""
    processor = make(ConvLlavaImageProcessor, **settings)
    images = [photo(230, 140), photo(60, 90, seed=1)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    prepared = processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert prepared.dtype == torch.uint8
    assert torch.equal(processor.normalize_bytes(prepared), expected.float())


def test_settings_survive_saving(backend, tmp_path):
    processor = make(backend, image_aspect_ratio="native", min_image_tokens=3, max_image_tokens=9, max_upscale=1.5)
    processor.save_pretrained(tmp_path)
    loaded = backend.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.min_image_tokens, loaded.max_image_tokens, loaded.max_upscale) == (3, 9, 1.5)
