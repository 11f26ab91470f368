"""The page answers in node and in Chromium as the checkpoint does in Python, on pixels that it prepared itself.

Needs in examples/browser what `npm install --ignore-scripts` puts there, and node; or Chromium and playwright. The
quickstart's checkpoint is used where `QUICKSTART` names its folder, with held-out questions of its own; else the tiny
reference checkpoint. Where `CONVLLAVA_SCREENSHOTS` names a folder, a picture of the page is left there.
"""

import base64
import json
import os
import random
import runpy
import shutil
import subprocess
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import transformers
from loopback import serve_http
from packaging.version import Version
from PIL import Image

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.export.run import export_checkpoint
from convllava_hf.export.web import check_web
from convllava_hf.inference.answer import make_message, prepare_inputs
from convllava_hf.inference.load import load
from convllava_hf.registration import register


BROWSER = Path(__file__).parents[2] / "examples" / "browser"
# In levels of 0 to 255: another bicubic rounds now and then to the neighbouring level.
TOLERANCE_LEVELS = 1.01

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"), reason="exporting needs the exporters of transformers 5.23"
    ),
    pytest.mark.skipif(
        not (BROWSER / "node_modules" / "@huggingface").exists(),
        reason="needs `npm install --ignore-scripts` in examples/browser",
    ),
]


# In the page: opens a picture as a visitor's is opened, and answers. `answer` and `show` are the page's own.
ASK = """
async ({ question, png }) => {
  const { preparePicture } = await import(new URL('picture.js', location.href).href);
  const bytes = png && Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0));
  const picture = png ? await show(new Blob([bytes], { type: 'image/png' })) : null;
  const found = await answer(loaded, question, picture);
  if (picture) {
    const [values] = preparePicture(picture.pixels, picture.width, picture.height, loaded.pictures);
    found.values = btoa(Array.from(new Uint8Array(values.buffer), (byte) => String.fromCharCode(byte)).join(''));
  }
  return found;
}
"""


@dataclass
class Asked:
    """A question with what the checkpoint makes of it in Python: prepared pixels, the tokens of the answer."""

    question: str
    image: Image.Image | None
    values: np.ndarray | None
    tokens: list[int]
    text: str


def draw_questions(count: int) -> list[tuple[Image.Image, str]]:
    """Held-out pages of the quickstart and questions about them."""
    quickstart = runpy.run_path(str(BROWSER.parent / "quickstart" / "pages.py"))
    rng, found = random.Random(7), []
    for page in quickstart["make_pages"]("test", 3 * count, seed=7):  # some pages leave nothing to ask
        for task in rng.sample(quickstart["IMAGE_TASKS"], len(quickstart["IMAGE_TASKS"])):
            if pair := quickstart["ask"](page, task, rng):
                found.append((page.image, pair[0]))
                break
    return found[:count]


@pytest.fixture(scope="module")
def checkpoint(converted):
    return Path(os.environ.get("QUICKSTART", converted))


@pytest.fixture(scope="module")
def page(checkpoint, tmp_path_factory):
    """The folder of the page with a model in it."""
    pytest.importorskip("onnxscript")
    register()
    folder = tmp_path_factory.mktemp("page")
    export_checkpoint(checkpoint, "web", folder / "model")
    for name in ("index.html", "answer.js", "picture.js", "node_modules"):
        (folder / name).symlink_to(BROWSER / name)
    return folder


@pytest.fixture(scope="module")
def asked(checkpoint):
    """Held-out questions about pictures, two pictures of other shapes, and a question without one."""
    register()
    model, processor = load(checkpoint, device="cpu", dtype="float32")
    questions = draw_questions(110)
    assert len(questions) == 110
    wide = Image.effect_mandelbrot((300, 170), (-2, -1, 1, 1), 60).convert("RGB")
    questions += [(wide, "What is it?"), (wide.rotate(90, expand=True), "What is it?"), (None, "What is it?")]
    found = []
    for image, question in questions:
        inputs = prepare_inputs(processor, [make_message("user", question, [image] if image else [])])
        tokens = model.generate(**inputs, max_new_tokens=512, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        values = inputs["pixel_values"].numpy().ravel() if image else None
        text = processor.decode(tokens, skip_special_tokens=True).strip()
        found.append(Asked(question, image, values, tokens.tolist(), text))
    return found, 255 * min(processor.image_processor.image_std)


def compare_answers(asked: tuple[list[Asked], float], answers: list[dict]) -> None:
    """Asserts that pixels agree to a level and tokens are equal."""
    expected, scale = asked
    different = []
    for one, found in zip(expected, answers, strict=True):
        if one.image:
            values = np.frombuffer(base64.b64decode(found["values"]), np.float32)
            assert np.abs(values - one.values).max() * scale <= TOLERANCE_LEVELS
        if found["tokens"] != one.tokens:
            different.append((one.question, found["text"], one.text))
    assert not different


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_answers_in_node_are_those_of_python(page, asked):
    lines = []
    for one in asked[0]:
        line = {"question": one.question}
        if one.image:
            rgb = base64.b64encode(one.image.convert("RGB").tobytes()).decode()
            line |= {"rgb": rgb, "width": one.image.width, "height": one.image.height, "values": True}
        lines.append(json.dumps(line))
    result = subprocess.run(
        ["node", BROWSER / "ask.js", page], input="\n".join(lines), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    compare_answers(asked, [json.loads(line) for line in result.stdout.splitlines()])


@pytest.fixture(scope="module")
def address(page):
    """The page, served as `python -m http.server` does."""

    class Folder(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=page)

    with serve_http(Folder) as service:
        yield f"http://127.0.0.1:{service.server_port}/"


def encode_png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_answers_in_chromium_are_those_of_python(browser, address, asked):
    visitor, elsewhere = browser.new_page(viewport={"width": 900, "height": 900}), []
    visitor.set_default_timeout(120_000)

    def stay(route):
        if route.request.url.startswith((address, "blob:", "data:")):
            return route.continue_()
        elsewhere.append(route.request.url)
        return route.abort()

    visitor.route("**/*", stay)
    visitor.goto(address)
    visitor.get_by_text("Ready.").wait_for()
    answers = []
    for one in asked[0]:
        png = base64.b64encode(encode_png(one.image)).decode() if one.image else None
        answers.append(visitor.evaluate(ASK, {"question": one.question, "png": png}))
    compare_answers(asked, answers)

    first = asked[0][0]
    picture = {"name": "picture.png", "mimeType": "image/png", "buffer": encode_png(first.image)}
    visitor.reload()
    visitor.get_by_text("Ready.").wait_for()
    visitor.locator("[type=file]").set_input_files(picture)
    visitor.locator("canvas").wait_for()
    visitor.get_by_role("textbox").fill(first.question)
    visitor.get_by_role("button", name="Ask").click()
    visitor.get_by_text(f"{len(first.tokens)} tokens in").wait_for()
    assert visitor.locator("#answer").inner_text() == first.text
    if folder := os.environ.get("CONVLLAVA_SCREENSHOTS"):
        visitor.screenshot(path=Path(folder) / "browser.png")
    assert not elsewhere


def test_transparency_is_white_in_chromium_too(browser, address):
    """As in Python, where `load_image` puts white behind it."""
    visitor = browser.new_page()
    visitor.set_default_timeout(120_000)
    visitor.goto(address)
    visitor.get_by_text("Ready.").wait_for()
    png = base64.b64encode(encode_png(Image.new("RGBA", (1, 1), (255, 0, 0, 0)))).decode()
    opened = (
        "async (png) => Array.from((await show(await (await fetch(`data:image/png;base64,${png}`)).blob())).pixels)"
    )
    assert visitor.evaluate(opened, png) == [255, 255, 255]


def test_text_models_that_transformers_js_lacks_are_refused(checkpoint):
    from convllava_hf import ConvLlavaConfig

    with pytest.raises(ConversionError, match="bloom"):
        check_web(ConvLlavaConfig(text_config={"model_type": "bloom", "vocab_size": 64}, image_token_id=3), 10**6)
