"""`convllava score`: predictions without a model, with the keys of the recorded numbers."""

import json

import pytest
from test_metrics import assert_equal
from typer.testing import CliRunner

from convllava_hf.cli.app import app


# Task; questions, predictions, annotations in its folder; where in expected.json its numbers are.
CASES = [
    ("scienceqa", "problems.json", "predictions.jsonl", "pid_splits.json", ()),
    *(
        ("pope", "llava_pope_test.jsonl", name, "coco", (name,))
        for name in ("answers.jsonl", "answers_one_missing.jsonl")
    ),
    ("textvqa", None, "answers.jsonl", "TextVQA_0.5.1_val.json", ()),
    ("vqav2", "llava_vqav2_mscoco_test2015.jsonl", "merge.jsonl", None, ()),
    ("vizwiz", "llava_test.jsonl", "answers.jsonl", None, ()),
    ("gqa", "testdev_balanced_questions.json", "answers.jsonl", None, ()),
    ("mmbench", "mmbench_dev_20230712.tsv", "answers.jsonl", None, ()),
    ("seed_bench", "SEED-Bench.json", "answers.jsonl", None, ()),
    ("mmvet", None, "answers.jsonl", None, ()),
    ("mme", None, "results", None, ("results",)),
    *(("mme", None, f"llavar_ocr/{name}.txt", None, ("llavar_ocr", name)) for name in ("OCR_llava", "OCR_llavar")),
    ("mme", None, "converter/answers/toy.jsonl", "converter/MME_Benchmark_release_version", ("converter",)),
    *(("multimodal_ocr", None, f"{name}.json", None, (name,)) for name in ("STVQA", "ocrVQA", "textVQA", "docVQA")),
    *(
        ("refcoco", f"{name}.jsonl", f"answers_{name}.jsonl", None, (name,))
        for name in ("refcoco_val", "refcoco_testA", "refcoco+_testB", "refcocog_val", "refcocog_test")
    ),
    ("gpt_review", None, "judge_replies.json", None, ()),
    ("gpt_review", None, "reviews", None, ("summary",)),
]


@pytest.mark.parametrize(("task", "questions", "predictions", "annotations", "path"), CASES)
def test_keys_and_values_are_those_of_the_reference(reference, task, questions, predictions, annotations, path):
    folder = reference / "evaluation" / task
    command = ["score", task.replace("_", "-"), "--json", "--predictions", str(folder / predictions)]
    command += ["--questions", str(folder / questions)] if questions else []
    command += ["--annotations", str(folder / annotations)] if annotations else []
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    for key in path:
        expected = expected[key]
        found = found.get(key, found)
    assert found and set(found) <= set(expected)
    for key in found:
        if isinstance(expected[key], dict):
            expected[key].pop("note", None)
        assert_equal(found[key], expected[key], key, 1e-4 if task == "refcoco" else 1e-9)


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
    assert result.exit_code == 3 and "the original's code stops here: ZeroDivisionError" in result.stderr
    assert json.loads(result.stdout)["error"].startswith("ZeroDivisionError")


def test_questions_of_mme_without_an_answer_are_named(reference, tmp_path):
    """The original scores what is there: an image of which neither question was answered would not be missed."""
    room = reference / "evaluation" / "mme" / "converter"
    lines = (room / "answers" / "toy.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[2:] + lines[2:4]))
    command = ["score", "mme", "--annotations", str(room / "MME_Benchmark_release_version")]
    result = CliRunner().invoke(app, [*command, "--predictions", str(tmp_path / "a.jsonl")])
    assert "questions without an answer: 2" in result.stderr and "answered twice: 2" in result.stderr


def test_files_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question_id": 0}\n{"question_id"')
    for task, message in (("mmvet", "line 2"), ("nonsense", "expected one of"), ("gqa", "is missing")):
        result = CliRunner().invoke(app, ["score", task, "--predictions", str(tmp_path / "a.jsonl")])
        assert result.exit_code == 3 and message in result.output
