"""The page's code answers in node as the checkpoint does in Python, on pixels that it prepared itself.

Needs node, and in examples/browser what `npm install --ignore-scripts` puts there. The quickstart's checkpoint is used
where `QUICKSTART` names its folder, with held-out questions of its own; else the tiny reference checkpoint.
"""

import base64
import json
import os
import random
import runpy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import transformers
from packaging.version import Version
from PIL import Image

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.export.run import export_checkpoint
from convllava_hf.export.web import check_web
from convllava_hf.inference.answer import make_message
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
        shutil.which("node") is None or not (BROWSER / "node_modules" / "@huggingface").exists(),
        reason="needs node, and `npm install --ignore-scripts` in examples/browser",
    ),
]


def draw_questions(count: int) -> list[tuple[Image.Image, str]]:
    """Held-out pages of the quickstart and questions about them."""
    quickstart = runpy.run_path(str(BROWSER.parent / "quickstart" / "pages.py"))
    rng, found = random.Random(7), []
    for page in quickstart["make_pages"]("test", count, seed=7):
        for task in rng.sample(quickstart["IMAGE_TASKS"], len(quickstart["IMAGE_TASKS"])):
            if pair := quickstart["ask"](page, task, rng):
                found.append((page.image, pair[0]))
                break
    return found


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
    return folder


def ask_in_node(page: Path, questions: list[tuple[Image.Image | None, str]]) -> list[dict]:
    lines = []
    for image, question in questions:
        line = {"question": question}
        if image:
            rgb = base64.b64encode(image.convert("RGB").tobytes()).decode()
            line |= {"rgb": rgb, "width": image.width, "height": image.height, "values": True}
        lines.append(json.dumps(line))
    result = subprocess.run(
        ["node", BROWSER / "ask.js", page], input="\n".join(lines), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_answers_in_node_are_those_of_python(page, checkpoint):
    model, processor = load(checkpoint, device="cpu", dtype="float32")
    questions = draw_questions(120)
    assert len(questions) >= 100
    wide = Image.effect_mandelbrot((300, 170), (-2, -1, 1, 1), 60).convert("RGB")
    questions += [(wide, "What is it?"), (wide.rotate(90, expand=True), "What is it?"), (None, "What is it?")]
    std = min(processor.image_processor.image_std)
    different = []
    for (image, question), found in zip(questions, ask_in_node(page, questions), strict=True):
        inputs = processor.apply_chat_template(
            [make_message("user", question, [image] if image else [])],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        if image:
            values = np.frombuffer(base64.b64decode(found["values"]), np.float32)
            levels = np.abs(values - inputs["pixel_values"].numpy().ravel()) * 255 * std
            assert levels.max() <= TOLERANCE_LEVELS
        tokens = model.generate(**inputs, max_new_tokens=512, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        if found["tokens"] != tokens.tolist():
            different.append((question, found["text"], processor.decode(tokens)))
    assert not different


def test_text_models_that_transformers_js_lacks_are_refused(checkpoint):
    from convllava_hf import ConvLlavaConfig

    with pytest.raises(ConversionError, match="'bloom' is unknown to transformers.js"):
        check_web(ConvLlavaConfig(text_config={"model_type": "bloom", "vocab_size": 64}, image_token_id=3))
