"""VLMEvalKit asks `convllava serve` by its own API class, in an environment of its own:

    VLMEVAL_PYTHON=path/of/its/python make test ARGS="-m slow tests/evaluation/test_vlmevalkit.py"

It is on PyPI as ms-vlmeval (0.0.20 was tried: `pip install --no-deps`, then what its import asks for). The table is
made here; the answers in its result file are compared, as it writes errors there too. It sends JPEG.
"""

import base64
import csv
import os
import subprocess
from io import BytesIO

import pytest
from PIL import Image

import convllava_hf


PYTHON = os.environ.get("VLMEVAL_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="set VLMEVAL_PYTHON to the python of an environment with VLMEvalKit"),
]


def test_its_answers_are_ours(converted, served, tmp_path):
    model, processor = convllava_hf.load(converted, device="cpu")
    rows, said = [], []
    for number in range(4):
        file, sent = BytesIO(), BytesIO()
        image = Image.linear_gradient("L").convert("RGB").resize((128, 112)).rotate(40 * number)
        image.save(file, "PNG")
        image.save(sent, "JPEG")  # as it sends images of 100 pixels and more
        text = f"What is {'this ' * (number + 1)}?"
        said.append(convllava_hf.answer(model, processor, text, images=[sent.getvalue()], max_new_tokens=6))
        rows.append({"index": number, "image": base64.b64encode(file.getvalue()).decode(), "question": text})
    assert len(set(said)) > 1
    with open(tmp_path / "local_openended.tsv", "w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], "answer"], delimiter="\t", restval="x")
        table.writeheader()
        table.writerows(rows)
    command = [PYTHON, "-m", "vlmeval.run", "--base-url", served, "--model", converted.name, "--max-tokens", "6"]
    command += ["--data", "local_openended", "--mode", "infer", "--work-dir", "out"]
    environment = {**os.environ, "LMUData": str(tmp_path), "PRED_FORMAT": "tsv"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = list((tmp_path / "out").rglob(f"{converted.name}_local_openended.tsv"))
    assert found, (done.stdout + done.stderr)[-4000:]
    with open(found[0], newline="", encoding="utf-8") as file:
        assert [row["prediction"] for row in csv.DictReader(file, delimiter="\t")] == said
