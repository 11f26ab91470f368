"""Images from anywhere, in every kind that people have, or refused by name."""

import base64
import http.server
import struct
import threading
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from convllava_hf import images
from convllava_hf.images import ImageError, decode_image, load_image
from convllava_hf.model.image_processing_convllava import ConvLlavaImageProcessor, ConvLlavaImageProcessorPil


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image, format="PNG", **options):
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_png(width, height, depth, colour_type, rows=b""):
    """A PNG by hand: for what Pillow cannot write, or for a header that promises more than there is."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def make_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


# ---- image kinds: each is written to a file and read back


def make_two_by_two(mode):
    """Red, green / blue, white."""
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, GREEN, BLUE, WHITE])
    return image.convert(mode)


def make_transparent(mode):
    """Opaque red, and black that is invisible."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (*RED, 255))
    return image.convert(mode)


def make_palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 0])
    image.putdata([0, 1])
    return encode(image, "PNG", transparency=1)


def make_gif():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (GREEN, RED, BLUE)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def make_deep(values, mode, format="PNG"):
    types = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    return encode(Image.fromarray(np.array([values], types[mode])), format)


IMAGE_KINDS = {
    "rgb": (encode(make_two_by_two("RGB")), [RED, GREEN, BLUE, WHITE]),
    "greyscale": (encode(make_two_by_two("L")), [(g, g, g) for g in make_two_by_two("L").tobytes()]),
    "black and white": (encode(Image.frombytes("1", (2, 1), b"\x40")), [(0, 0, 0), WHITE]),
    "palette": (encode(make_two_by_two("P")), [RED, GREEN, BLUE, WHITE]),
    "palette, transparent": (make_palette_with_transparency(), [RED, WHITE]),
    "RGBA": (encode(make_transparent("RGBA")), [RED, WHITE]),
    "grey with alpha": (encode(make_transparent("LA")), [(76, 76, 76), WHITE]),
    "half transparent": (encode(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), [(255, 127, 127)]),
    "CMYK": (encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
    "16-bit grey": (make_deep([0, 257, 32896, 65535], "I;16"), [(v, v, v) for v in (0, 1, 128, 255)]),
    "16-bit grey TIFF": (make_deep([0, 257, 32896, 65535], "I;16", "TIFF"), [(v, v, v) for v in (0, 1, 128, 255)]),
    "16-bit RGB": (write_png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 0, 65535)), [RED, BLUE]),
    "integers of 16 bits": (make_deep([0, 32896, 65535], "I", "TIFF"), [(v, v, v) for v in (0, 128, 255)]),
    "integers of 8 bits": (make_deep([0, 128, 255], "I", "TIFF"), [(v, v, v) for v in (0, 128, 255)]),
    "floats to 1": (make_deep([0, 0.5, 1], "F", "TIFF"), [(v, v, v) for v in (0, 128, 255)]),
    "floats to 255": (make_deep([0, 128, 255], "F", "TIFF"), [(v, v, v) for v in (0, 128, 255)]),
    "animated GIF": (make_gif(), [GREEN] * 16),
    "one pixel": (encode(Image.new("RGB", (1, 1), RED)), [RED]),
    "100:1": (encode(Image.new("RGB", (200, 2), RED)), [RED] * 400),
}


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_every_kind_of_image_becomes_rgb(kind, tmp_path):
    data, expected = IMAGE_KINDS[kind]
    path = tmp_path / "image"
    path.write_bytes(data)
    image = load_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image).reshape(-1, 3), expected)


@pytest.mark.parametrize(
    "kind", ["RGBA", "half transparent", "palette, transparent", "16-bit grey", "floats to 1", "turned"]
)
def test_every_door_sees_the_same_pixels(kind, tmp_path):
    """Both backends, by image and by path; `load_image`, which the commands use; the images of datasets."""
    data = IMAGE_KINDS[kind][0] if kind != "turned" else encode(make_two_by_two("RGB"), exif=make_orientation(6))
    path = tmp_path / "image.png"
    path.write_bytes(data)
    expected = Image.fromarray(np.array(load_image(data)))
    # What is handed to the image processors of transformers, which convert as they like, is converted before.
    for door in (load_image(path), decode_image({"bytes": data, "path": None}), decode_image(Image.open(path))):
        assert door.mode == "RGB" and np.array_equal(door, expected)
    for backend in (ConvLlavaImageProcessor, ConvLlavaImageProcessorPil):
        process = backend(size={"height": 64, "width": 64})
        pixels = process(expected, return_tensors="pt")["pixel_values"]
        for door in (
            Image.open(path),
            str(path),
            "data:image/png;base64," + base64.b64encode(data).decode(),
            load_image(path),
            decode_image({"bytes": data, "path": None}),
            decode_image({"bytes": None, "path": str(path)}),
            decode_image(Image.open(path)),
        ):
            assert np.array_equal(process(door, return_tensors="np")["pixel_values"], pixels)
        # The original's conversion, by name; it is kept in the checkpoint.
        process = backend(size={"height": 64, "width": 64}, original_rgb=True)
        assert process.to_dict()["original_rgb"]
        plain = process(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        assert np.array_equal(process(str(path), return_tensors="np")["pixel_values"], plain)
        assert np.array_equal(process(load_image(path, original_rgb=True), return_tensors="np")["pixel_values"], plain)
        assert not np.array_equal(pixels, plain)


@pytest.mark.parametrize("original_rgb", [False, True])
@pytest.mark.parametrize("backend", [ConvLlavaImageProcessor, ConvLlavaImageProcessorPil])
def test_the_limit_of_a_side_is_written_once(backend, original_rgb):
    strip = Image.new("L", (40000, 300), 255)
    processor = backend(image_aspect_ratio="native", max_image_tokens=100000, original_rgb=original_rgb)
    sizes = processor(strip, return_tensors="pt")["image_sizes"]
    assert sizes.tolist() == [list(processor.get_processed_size(300, 40000))]
    assert sizes.tolist() == processor(load_image(strip), return_tensors="pt")["image_sizes"].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = np.arange(6 * 3, dtype=np.uint8).reshape(2, 3, 3)
    # How the rows and columns of a file with this orientation lie, by the EXIF standard.
    stored = upright.transpose(1, 0, 2) if orientation > 4 else upright
    flips = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}
    stored = stored[:: flips[orientation][0], :: flips[orientation][1]]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(np.array(load_image(path)), upright)


def test_broken_exif_is_ignored():
    data = encode(Image.new("RGB", (2, 1), RED), exif=b"Exif\0\0MM\0*\0\0\xff\xff broken")
    assert load_image(data).size == (2, 1)


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "path", "text path", "data URI", "pillow"])
def test_every_source_gives_the_same_image(kind, photo, tmp_path):
    path, data = tmp_path / "ünïcode name.png", encode(photo)
    path.write_bytes(data)
    sources = {
        "bytes": data,
        "bytearray": bytearray(data),
        "path": path,
        "text path": str(path),
        "data URI": "data:image/png;base64," + base64.b64encode(data).decode(),
        "pillow": photo,
    }
    assert np.array_equal(np.array(load_image(sources[kind])), np.array(photo))


def test_the_callers_image_stays_as_it_is():
    gif = Image.open(BytesIO(make_gif()))
    gif.seek(1)
    assert load_image(gif).getpixel((0, 0)) == RED
    assert gif.tell() == 1
    turned = Image.new("RGB", (2, 1), RED)
    turned.info["exif"] = make_orientation(6)
    assert load_image(turned).size == (1, 2) and turned.size == (2, 1)


def test_an_image_that_is_loaded_is_not_copied_again():
    loaded = load_image(encode(Image.new("RGBA", (2, 2), RED)))
    assert load_image(loaded) is loaded


def test_extreme_sides_are_shrunk():
    assert load_image(Image.new("L", (65535, 1))).size == (16384, 1)
    assert load_image(Image.new("L", (2, 40000))).size == (1, 16384)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"<html>not found</html>", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (encode(Image.effect_noise((64, 64), 90), "JPEG")[:900], "cannot be decoded .*truncated"),
        (encode(Image.effect_noise((64, 64), 90))[:900], "cannot be decoded"),
        (write_png(50_000, 50_000, 8, 2), "decompression bomb"),
        (encode(Image.new("1", (10_000, 10_000))), "10000x10000 .*89478485"),
        (make_deep([-5, 20], "I", "TIFF"), "pixel values from -5 to 20"),
        (make_deep([0, 1 << 20], "I", "TIFF"), "pixel values from 0 to 1048576"),
        (make_deep([0, float("nan")], "F", "TIFF"), "pixel values from nan"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image_is_refused_by_name(data, message, tmp_path):
    path = tmp_path / "suspicious.png"
    path.write_bytes(data)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match=f"suspicious.png: .*{message}"):
        load_image(path)
    with pytest.raises(ImageError, match=f"image of {len(data)} bytes: .*{message}"):
        load_image(data)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/photo.png", "nowhere/photo.png: no such file"),
        ("/", "/: this is a folder"),
        ("data:image/png;base64,???", "broken base64"),
        ("data:image/png,abc", "expected data:image"),
        ("http://[broken", "cannot be fetched"),
        (None, "NoneType: expected a path"),
        (np.zeros((2, 2, 3)), "ndarray: expected a path"),
    ],
)
def test_other_sources_are_refused_by_name(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_pillows_limit_is_the_users_to_change(monkeypatch):
    data = encode(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with pytest.raises(ImageError, match="4x4 .*15"):
        load_image(data)
    with pytest.raises(ImageError, match="4x4 .*15"):
        load_image(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(data).size == (4, 4)


# ---- URLs: a real server on this machine


@pytest.fixture(scope="module")
def server(photo):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/photo.png")
                self.end_headers()
                return
            if self.path == "/redirects":
                time.sleep(0.1)
                self.send_response(302)
                self.send_header("Location", "/redirects")
                self.end_headers()
                return
            if self.path == "/drips":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
                return
            found = self.path in ("/photo.png", "/page", "/slow")
            self.send_response(200 if found else 404)
            self.end_headers()
            if self.path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            elif found:
                self.wfile.write(b"<html></html>" if self.path == "/page" else encode(photo))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # clients that hang up are part of the tests
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched(server, photo):
    for path in ("/photo.png", "/moved"):
        assert np.array_equal(np.array(load_image(server + path)), np.array(photo))


def test_what_a_server_cannot_give_is_refused_by_name(server, monkeypatch):
    with pytest.raises(ImageError, match="/missing.png: .*404"):
        load_image(server + "/missing.png")
    with pytest.raises(ImageError, match="/page: not an image"):
        load_image(server + "/page")
    with pytest.raises(ImageError, match="/slow: .*0.2 s"):
        load_image(server + "/slow", timeout=0.2)
    for path in ("/redirects", "/drips"):  # each step of them is quick
        started = time.monotonic()
        with pytest.raises(ImageError, match=f"{path}: .*0.3 s"):
            load_image(server + path, timeout=0.3)
        assert time.monotonic() - started < 3
    with pytest.raises(ImageError, match="127.0.0.1:9/x.png: cannot be fetched"):
        load_image("http://127.0.0.1:9/x.png")
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 1000)
    with pytest.raises(ImageError, match="/photo.png: more than"):
        load_image(server + "/photo.png")


@pytest.fixture
def gradient(tmp_path):
    """A photo of 1000x600 pixels as JPEG and as PNG."""
    picture = Image.linear_gradient("L").convert("RGB").resize((1000, 600))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")
    return tmp_path / "a.jpg", tmp_path / "a.png"


def test_photos_can_be_shrunk_while_they_are_decoded(gradient):
    """By whole blocks, as long as the wanted side stays; files that are no JPEG are read as always."""
    jpeg, png = gradient
    for side, size in ((600, (1000, 600)), (500, (500, 300)), (200, (250, 150)), (10, (125, 75))):
        draft = lambda height, width, side=side: (side * height // width, side)  # noqa: E731
        assert load_image(jpeg, draft=draft).size == size
        assert load_image(png, draft=draft).size == (1000, 600)
    shrunk = load_image(jpeg, draft=lambda height, width: (120, 200)).resize((100, 60))
    difference = np.abs(np.asarray(shrunk, int) - np.asarray(load_image(jpeg).resize((100, 60)), int))
    assert difference.max() <= 4


@pytest.mark.parametrize("aspect_ratio", ["pad", "squash", "native"])
@pytest.mark.parametrize("backend", [ConvLlavaImageProcessor, ConvLlavaImageProcessorPil])
def test_image_processors_can_draft_photos(backend, aspect_ratio, gradient):
    """A setting that is kept in the checkpoint; it changes pixels by a few levels, of JPEGs alone, and no size."""
    jpeg, png = gradient
    whole = backend(size={"height": 256, "width": 256}, image_aspect_ratio=aspect_ratio, do_normalize=False)
    draft = backend.from_dict({**whole.to_dict(), "draft_photos": True})
    assert draft.to_dict()["draft_photos"] and not whole.draft_photos
    expected, found = (process(str(jpeg), return_tensors="pt") for process in (whole, draft))
    assert found["image_sizes"].tolist() == expected["image_sizes"].tolist()
    difference = (found["pixel_values"] - expected["pixel_values"]).abs() * 255
    assert 0 < difference.max() < 8 and difference.mean() < 1
    assert np.array_equal(*(process(str(png), return_tensors="np")["pixel_values"] for process in (whole, draft)))
    drafted = load_image(jpeg, draft=images.get_draft(draft))
    assert drafted.size == (500, 300) and load_image(jpeg, draft=images.get_draft(whole)).size == (1000, 600)
    assert np.array_equal(draft(drafted, return_tensors="np")["pixel_values"], found["pixel_values"])


def test_only_image_processors_that_tell_their_sizes_can_draft_photos():
    with pytest.raises(ValueError, match="draft_photos=True .*CLIPImageProcessor"):
        images.get_draft(CLIPImageProcessor(), draft_photos=True)
