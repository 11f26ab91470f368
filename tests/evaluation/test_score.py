"""`convllava score`: predictions without a model, with the keys of the recorded numbers."""

import json
import re

import pytest
from test_metrics import assert_equal
from typer.testing import CliRunner

from convllava_hf.cli.app import app
from convllava_hf.evaluation.files import read_rows, write_json_lines
from convllava_hf.evaluation.tasks import score_task


REQUESTS = {"llava_text", "llava_visual", "llava_bench", "llavar_visual", "tinyllava_bench"}
REQUESTS |= {"llavar_context_in_released_format", "llavar_read_string_captions"}
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


# What is recorded beside the scorer's own numbers: conversions, prompts, normalisations, other projects' files.
OMITTED = {
    "scienceqa": {"tinyllava", "convert_to_llava", "convert_to_jsonl"},
    "textvqa": {"normalised"},
    "gqa": {"note"},
    "mmbench": {"en_single_pred_prompt", "cn_single_pred_prompt", "no_suffix", "all_rounds"},
    ("gpt_review", "judge_replies.json"): REQUESTS | {"summary", "released_llavar_reviews"},
    ("gpt_review", "reviews"): {"version_0613", "select_7b", "ignore_0_6", "llavar_variant"},
}


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
    assert set(expected) - set(found) == OMITTED.get((task, predictions), OMITTED.get(task, set()))
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
    assert result.exit_code == 3 and "ZeroDivisionError" in result.stderr
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
    for task, message in (("mmvet", "line 2"), ("nonsense", "'nonsense'"), ("gqa", "--annotations")):
        result = CliRunner().invoke(app, ["score", task, "--predictions", str(tmp_path / "a.jsonl")])
        assert result.exit_code == 3 and message in result.output


def score_lines(tmp_path, task, questions, answers, *more):
    for name, rows in (("q.jsonl", questions), ("a.jsonl", answers)):
        write_json_lines(tmp_path / name, rows)
    command = ["score", task, "--predictions", str(tmp_path / "a.jsonl"), *map(str, more)]
    return CliRunner().invoke(app, [*command, *(["--questions", str(tmp_path / "q.jsonl")] if questions else [])])


@pytest.mark.parametrize("task", ["exact-match", "contains", "anls"])
def test_questions_asked_twice_are_named(task, tmp_path):
    questions = [{"question_id": 3, "text": "?", "answer": answer} for answer in ("x", "y")]
    result = score_lines(tmp_path, task, questions, [{"question_id": 3, "text": "y"}])
    assert result.exit_code == 0 and "asked twice: 1 (3)" in result.stderr


def test_a_category_whose_reference_has_no_points_is_an_error_of_the_original(tmp_path):
    reviews = [
        {"question_id": n, "category": kind, "content": f"{pair[0]} {pair[1]}", "tuple": pair}
        for n, (kind, pair) in enumerate([("conv", [0, 5]), ("detail", [8, 6])])
    ]
    result = score_lines(tmp_path, "gpt-review", [], reviews)
    assert result.exit_code == 3 and "ZeroDivisionError: a category whose reference" in result.stderr
    row = next(line for line in result.stdout.splitlines() if line.startswith("relative score"))
    assert "137.50" in row and row.count("(") == 1, "by ours alone"


@pytest.mark.parametrize("text", ["Yes\nBecause.", "Yes\rBecause.", "Yes\u2028Because."])
def test_an_answer_of_mme_with_a_line_break_is_scored_by_ours(reference, tmp_path, text):
    room = reference / "evaluation" / "mme" / "converter"
    answers = [json.loads(line) for line in (room / "answers" / "toy.jsonl").read_text().splitlines()]
    truths = room / "MME_Benchmark_release_version"
    before = score_lines(tmp_path, "mme", [], answers, "--annotations", truths, "--json")
    whole = dict(answers[0], text=text)
    plain = score_task("mme", write(tmp_path, [dict(whole, text="Yes"), *answers[1:]]), annotations=truths)
    broken = score_task("mme", write(tmp_path, [whole, *answers[1:]]), annotations=truths)
    assert "error" not in json.loads(before.stdout)
    assert ("error" in broken.original) == (text[3] != "\u2028"), "which is no line break to who reads a file"
    found, expected = broken.summarise(), plain.summarise()
    assert found and {name: row["ours"] for name, row in found.items()} == {n: r["ours"] for n, r in expected.items()}
    assert all(("original" in row) == ("error" not in broken.original) for row in found.values())


def write(folder, rows):
    write_json_lines(folder / "answers.jsonl", rows)
    return folder / "answers.jsonl"


def read_original(task: str, original: dict) -> dict[str, float]:
    """The numbers that the original prints, by the names of ours."""
    if task == "pope":
        parts, every = original["categories"], ("TP", "FP", "TN", "FN")
        right = sum(row["TP"] + row["TN"] for row in parts.values())
        numbers = {"accuracy": 100 * right / sum(row[key] for row in parts.values() for key in every)}
        numbers["F1, mean of categories"] = 100 * sum(row["f1"] for row in parts.values()) / len(parts)
        yes = sum(row["yes_ratio"] * row["samples"] for row in parts.values())
        numbers["yes ratio"] = 100 * yes / sum(row["samples"] for row in parts.values())
        numbers |= {f"F1, {name}": 100 * row["f1"] for name, row in parts.items()}
        return numbers | {f"category: {name}": 100 * row["accuracy"] for name, row in parts.items()}
    if task == "scienceqa":
        row = original["llava"]
        return {"accuracy": row["acc"], "image accuracy": 100 * row["img_correct"] / row["img_count"]}
    if task == "gpt_review":
        line = next(line for line in original["summary"]["files"] if line.startswith("all "))
        return {"relative score": float(line.split()[1])}
    if task == "seed_bench":
        found = re.search(r"Total accuracy: ([\d.]+)%", "\n".join(original["stdout"]))
        return {"accuracy": float(found[1])}
    if task == "mme":
        numbers = {f"{name} (of 200)": row["score"] for name, row in original["tasks"].items()}
        return numbers | {f"category: {name}": 100 * row["acc"] for name, row in original["tasks"].items()}
    return {"accuracy": 100 * original.get("accuracy", original.get("precision_at_1", 0))}


TWICE = [case for case in CASES if case[0] in ("pope", "scienceqa", "textvqa", "gqa", "seed_bench", "refcoco")]
TWICE += [case for case in CASES if case[0] == "mme" and case[2].startswith("converter")]
TWICE += [case for case in CASES if case[0] == "multimodal_ocr"]
TWICE += [("gpt_review", None, "reviews/toy-7b.jsonl", None, ())]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("task", "questions", "predictions", "annotations", "path"), TWICE)
def test_numbers_by_the_originals_rule_are_those_of_the_original(
    reference, tmp_path, task, questions, predictions, annotations, path, twice
):
    folder = reference / "evaluation" / task
    rows = read_rows(folder / predictions)
    if task == "refcoco":
        rows = [{"question_id": n, "text": row["answer"]} for n, row in enumerate(rows)]
    if twice:  # of MME both questions of an image, since lines go by pairs
        rows = (
            rows[:2] + rows
            if task == "mme"
            else [rows[0] | {key: rows[1][key] for key in ("text", "answer") if key in rows[1]}, *rows]
        )
    files = [folder / name if name else None for name in (questions, annotations)]
    score = score_task(task, write(tmp_path, rows), *files)
    found = {name: row["original"] for name, row in score.summarise().items() if "original" in row}
    wanted = read_original(task, json.loads(json.dumps(score.original)))
    if len(wanted) > 2:
        assert set(wanted) == set(found)
    tolerance = {"seed_bench": 0.01, "gpt_review": 0.06}.get(task, 1e-9)  # of the digits that are printed
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=tolerance)
