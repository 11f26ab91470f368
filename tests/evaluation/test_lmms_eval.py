"""lmms-eval runs a checkpoint by `--model convllava`. Its pins conflict with ours, so it has an environment of its own:

    LMMS_EVAL_PYTHON=path/of/its/python make test ARGS="-m slow tests/evaluation/test_lmms_eval.py"

It needs lmms-eval 0.7 and this package (`pip install --no-deps -e .`). The task is a parquet file of this test; its
score is read, because lmms-eval exits with 0 on errors.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import convllava_hf


PYTHON = os.environ.get("LMMS_EVAL_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="set LMMS_EVAL_PYTHON to the python of an environment with lmms-eval"),
]
TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: local_reading
test_split: test
output_type: generate_until
doc_to_visual: !function local_reading.list_images
doc_to_text: "{{{{question}}}}"
doc_to_messages: !function local_reading.make_messages
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, until: []}}
process_results: !function local_reading.compare
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def list_images(doc):
    return [doc["image"].convert("RGB")]

def make_messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": list_images(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]

def compare(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


def test_the_answers_are_ours(converted, tmp_path):
    """Half of the truths are what the model answers here, half are not: the score must be a half."""
    from datasets import Dataset

    model, processor = convllava_hf.load(converted, device="cpu")
    rows = []
    for number in range(6):
        image = Image.linear_gradient("L").convert("RGB").resize((64, 48 + 8 * (number % 2))).rotate(40 * number)
        question = f"What is {'this ' * (number + 1)}?"
        said = convllava_hf.answer(model, processor, question, images=[image], max_new_tokens=6)
        rows.append({"image": image, "question": question, "answer": said if number % 2 else f"not {said}"})
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local_reading.yaml").write_text(TASK.format(data=tmp_path / "data.parquet"))
    (tasks / "local_reading.py").write_text(FUNCTIONS)
    command = [PYTHON, "-m", "lmms_eval", "--model", "convllava", "--model_args", f"pretrained={converted}"]
    command += ["--tasks", "local_reading", "--include_path", str(tasks), "--batch_size", "2", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = list(Path(tmp_path / "out").rglob("*results.json"))
    assert found, (done.stdout + done.stderr)[-4000:]
    results = json.loads(found[0].read_text())["results"]["local_reading"]
    assert next(value for key, value in results.items() if key.startswith("exact,")) == 0.5


def test_boxes_are_those_of_the_unpadded_image():
    code = (
        "from convllava_hf.evaluation.lmms_eval_model import convert_box\nprint(convert_box('[0.25, 0.5, 0.75, 0.75]'"
    )
    done = subprocess.run([PYTHON, "-c", f"{code}, 200, 100))"], capture_output=True, text=True)
    # 200 x 100 on a square of 200: 50 rows above. 0.5 of the square is row 100, of the image row 50 of 100.
    assert done.stdout.splitlines()[-1] == "[0.25, 0.5, 0.75, 1.0]", done.stderr[-2000:]
