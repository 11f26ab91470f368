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
from PIL import Image

def list_images(doc):
    return [Image.open(doc["image"])]

def make_messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": list_images(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]

def compare(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture
def task(converted, tmp_path) -> tuple[Path, list[str]]:
    """A folder with a task, and our answers. Half of its truths are them, half are not: the score must be a half."""
    from datasets import Dataset

    folder = tmp_path / "task"
    folder.mkdir()
    model, processor = convllava_hf.load(converted, device="cpu")
    rows, said = [], []
    for number in range(6):
        image = Image.linear_gradient("L").convert("RGB").resize((64, 48 + 8 * (number % 2))).rotate(40 * number)
        question = f"What is {'this ' * (number + 1)}?"
        said.append(convllava_hf.answer(model, processor, question, images=[image], max_new_tokens=6))
        image.save(folder / f"{number}.png")
        truth = said[-1] if number % 2 else f"not {said[-1]}"
        rows.append({"image": str(folder / f"{number}.png"), "question": question, "answer": truth})
    Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    (folder / "local_reading.yaml").write_text(TASK.format(data=folder / "data.parquet"))
    (folder / "local_reading.py").write_text(FUNCTIONS)
    return folder, said


def evaluate(task: Path, output: Path, *arguments) -> tuple[float, list[str], str]:
    """The score, the answers in the order of the questions, and what was written to the terminal."""
    command = [PYTHON, "-m", "lmms_eval", *arguments, "--tasks", "local_reading", "--include_path", str(task)]
    command += ["--output_path", str(output), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "home"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = list(output.rglob("*results.json"))
    assert found, (done.stdout + done.stderr)[-4000:]
    results = json.loads(found[0].read_text())["results"]["local_reading"]
    (samples,) = output.rglob("*samples_local_reading.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    score = next(value for key, value in results.items() if key.startswith("exact,"))
    return score, [row["filtered_resps"].strip() for row in rows], done.stdout + done.stderr


def test_the_answers_of_the_plugin_are_ours(converted, task, tmp_path):
    arguments = ("--model", "convllava", "--model_args", f"pretrained={converted}", "--batch_size", "2")
    assert evaluate(task[0], tmp_path, *arguments, "--device", "cpu")[:2] == (0.5, task[1])


def test_images_that_cannot_be_read_are_counted_and_named(converted, task, tmp_path):
    """lmms-eval has no answers that are missing: it stops, or scores a text that says so, and others keep theirs."""
    folder, said = task
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])  # its size is there, its pixels are not
    (folder / "4.png").unlink()
    arguments = f"pretrained={converted},skip_bad_images=True"
    arguments = ("--model", "convllava", "--model_args", arguments, "--batch_size", "2")
    score, answers, log = evaluate(folder, tmp_path, *arguments, "--device", "cpu")
    assert score == pytest.approx(2 / 6) and [answers[n] for n in (0, 2, 3, 5)] == [said[n] for n in (0, 2, 3, 5)]
    for number in (1, 4):
        assert answers[number] == "[CONVLLAVA_IMAGE_UNREADABLE]"
        assert f"question {number} of local_reading" in log and f"{number}.png" in log
    with pytest.raises(AssertionError, match="2 of 6 questions"):
        evaluate(folder, tmp_path / "again", "--model", "convllava", "--model_args", f"pretrained={converted}")


def test_the_answers_of_our_server_are_ours(converted, served, task, tmp_path):
    """Without `timeout` a slow answer would be given up after 10 seconds, and its error scored as an answer."""
    arguments = f"model_version={converted.name},base_url={served},timeout=600,num_concurrent=4"
    assert evaluate(task[0], tmp_path, "--model", "openai", "--model_args", arguments)[:2] == (0.5, task[1])


def test_boxes_overlap_as_in_the_original(reference):
    """Its RefCOCO tasks compare fractions of the unpadded image; answers hold fractions of the padded square."""
    folder = reference / "evaluation" / "refcoco"
    code = """
import json, sys
from lmms_eval.tasks.refcoco.utils_rec import compute_iou, parse_float_sequence_within
from convllava_hf.evaluation.lmms_eval_model import convert_box
found = []
for answer, row in json.load(sys.stdin):
    (x1, y1, x2, y2), width, height = row["bbox"], row["width"], row["height"]
    box = parse_float_sequence_within(convert_box(answer, width, height))
    found.append(compute_iou(box, [x1 / width, y1 / height, x2 / width, y2 / height]))
print(json.dumps(found))
"""
    expected = json.loads((folder / "expected.json").read_text())
    for name in set(expected) - {"prompt_template", "pattern"}:
        lines = [(folder / f"{file}.jsonl").read_text().splitlines() for file in (f"answers_{name}", name)]
        pairs = [(json.loads(said)["answer"], json.loads(row)) for said, row in zip(*lines, strict=True)]
        done = subprocess.run([PYTHON, "-c", code], input=json.dumps(pairs), capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        for overlap, sample in zip(found, expected[name]["per_sample"], strict=True):
            assert (overlap >= 0.5) == sample["correct"]
            assert overlap == pytest.approx(sample["iou"], abs=2e-3)
