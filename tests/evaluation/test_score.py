"""`convllava score`: predictions without a model, with the keys of the recorded numbers."""

import json

import pytest
from test_metrics import assert_equal
from typer.testing import CliRunner

from convllava_hf.cli.app import app


# task -> questions, predictions, annotations in the folder of the task; where its numbers are in expected.json.
CASES = {
    "scienceqa": ("problems.json", "predictions.jsonl", "pid_splits.json", ()),
    "pope": ("llava_pope_test.jsonl", "answers.jsonl", "coco", ("answers.jsonl",)),
    "textvqa": (None, "answers.jsonl", "TextVQA_0.5.1_val.json", ()),
    "vqav2": ("llava_vqav2_mscoco_test2015.jsonl", "merge.jsonl", None, ()),
    "vizwiz": ("llava_test.jsonl", "answers.jsonl", None, ()),
    "gqa": ("testdev_balanced_questions.json", "answers.jsonl", None, ()),
    "mmbench": ("mmbench_dev_20230712.tsv", "answers.jsonl", None, ()),
    "seed_bench": ("SEED-Bench.json", "answers.jsonl", None, ()),
    "mmvet": (None, "answers.jsonl", None, ()),
    "mme": (None, "results", None, ("results",)),
    "multimodal_ocr": (None, "docVQA.json", None, ("docVQA",)),
    "refcoco": ("refcocog_val.jsonl", "answers_refcocog_val.jsonl", None, ("refcocog_val",)),
    "gpt_review": (None, "judge_replies.json", None, ()),
}


@pytest.mark.parametrize("task", CASES)
def test_keys_are_those_of_the_reference(reference, task):
    folder = reference / "evaluation" / task
    *files, path = CASES[task]
    command = ["score", task.replace("_", "-"), "--json"]
    for name, file in zip(("--questions", "--predictions", "--annotations"), files, strict=True):
        command += [name, str(folder / file)] if file else []
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    for key in path:
        expected = expected[key]
    if task == "mme":
        found = found["results"]
    for key in set(found) & set(expected):
        if isinstance(expected[key], dict):
            expected[key].pop("note", None)
        assert_equal(found[key], expected[key], key, 1e-4 if task == "refcoco" else 1e-9)
    assert set(found) <= set(expected)


def test_both_rules_stand_side_by_side(reference):
    folder = reference / "evaluation" / "scienceqa"
    command = ["score", "scienceqa", "--questions", str(folder / "problems.json")]
    result = CliRunner().invoke(app, [*command, "--predictions", str(folder / "predictions.jsonl")])
    assert result.exit_code == 0, result.output
    assert "original" in result.stdout and "ours" in result.stdout and "40.00 (" in result.stdout
    assert "Total: 20, Correct: 8, Accuracy: 40.00%, IMG-Accuracy: 55.56%" in result.stdout


def test_where_the_original_stops_the_error_is_named(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 0, "category": "random"}\n')
    (tmp_path / "coco_pope_random.json").write_text('{"label": "no"}\n')
    (tmp_path / "a.jsonl").write_text('{"question_id": 0, "text": "no"}\n')
    command = ["score", "pope", "--questions", str(tmp_path / "q.jsonl"), "--annotations", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--predictions", str(tmp_path / "a.jsonl"), "--json"])
    assert result.exit_code == 3 and "ZeroDivisionError" in result.output


def test_files_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question_id": 0}\n{"question_id"')
    for task, message in (("mmvet", "line 2"), ("nonsense", "expected one of"), ("gqa", "is missing")):
        result = CliRunner().invoke(app, ["score", task, "--predictions", str(tmp_path / "a.jsonl")])
        assert result.exit_code == 3 and message in result.output
