"""The scorers give what the originals' code gives, on the recorded inputs: per sample and in total."""

import json
from pathlib import Path

import openpyxl
import pytest

from convllava_hf.evaluation.choices import (
    build_mmbench_prompts,
    convert_mmbench,
    find_letter,
    read_mmbench,
    score_scienceqa,
    score_seed,
)
from convllava_hf.evaluation.files import read_json_lines, write_json_lines
from convllava_hf.evaluation.gpt_review import (
    build_requests,
    parse_review,
    print_llavar_summary,
    print_summary,
    read_scores,
)
from convllava_hf.evaluation.grounding import pad_box, parse_box, place_box, score_refcoco
from convllava_hf.evaluation.metrics import (
    convert_mmvet,
    convert_vizwiz,
    convert_vqav2,
    score_gqa,
    score_multimodal_ocr,
    score_plain,
    score_pope,
    score_textvqa,
)
from convllava_hf.evaluation.mme import convert_mme, read_mme_truths, score_mme, score_mme_task
from convllava_hf.evaluation.normalisers import normalise_vqa
from convllava_hf.evaluation.results import write_submission
from convllava_hf.evaluation.scores import mean_of


@pytest.fixture(scope="module")
def folder(reference: Path) -> Path:
    return reference / "evaluation"


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def assert_equal(found, expected, path="", tolerance=1e-9):
    """Equal in every key and value, numbers to the tolerance."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and set(found) == set(expected), (path, found, expected)
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}.{key}", tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{path}[{i}]", tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance, rel=0), path
    else:
        assert found == expected and isinstance(found, bool) == isinstance(expected, bool), path


def test_scienceqa(folder):
    room = folder / "scienceqa"
    expected = read(room / "expected.json")
    split = read(room / "pid_splits.json")["test"]
    score = score_scienceqa(read(room / "problems.json"), split, read_json_lines(room / "predictions.jsonl"))
    expected["llavar"].pop("note")
    found = json.loads(json.dumps(score.original))
    for key in ("llava", "llavar", "official_categories"):
        assert_equal(found[key], expected[key], key)
    assert len(score.problems["questions without an answer"]) == 1
    # The original fails "(A)", "A." and "b"; ours reads them.
    accuracy = score.summarise()["accuracy"]
    assert accuracy["original"] == 40 and accuracy["ours"] > 40


@pytest.mark.parametrize("name", ["answers.jsonl", "answers_one_missing.jsonl"])
def test_pope(folder, name):
    room = folder / "pope"
    labels = {file.stem.removeprefix("coco_pope_"): read_json_lines(file) for file in (room / "coco").iterdir()}
    score = score_pope(read_json_lines(room / "llava_pope_test.jsonl"), read_json_lines(room / name), labels)
    assert_equal(score.original, read(room / "expected.json")[name])
    # The original counts on shifted pairs without a word; ours names the missing answers.
    assert len(score.problems["questions without an answer"]) == (2 if "missing" in name else 0)


def test_pope_counts_no_in_capitals_as_yes_and_ours_does_not():
    labels = {"random": [{"label": "no"}, {"label": "yes"}, {"label": "no"}, {"label": "yes"}]}
    questions = [{"question_id": i, "category": "random"} for i in range(4)]
    answers = [{"question_id": i, "text": text} for i, text in enumerate(["NO", "Yes", "no", "no"])]
    accuracy = score_pope(questions, answers, labels).summarise()["accuracy"]
    assert (accuracy["original"], accuracy["ours"]) == (50, 75)


def test_pope_division_by_zero_is_the_originals():
    questions, labels = [{"question_id": 0, "category": "random"}], {"random": [{"label": "no"}]}
    score = score_pope(questions, [{"question_id": 0, "text": "no"}], labels)
    assert score.original["error"].startswith("ZeroDivisionError")
    assert score.summarise()["accuracy"]["ours"] == 100


def test_textvqa(folder):
    room, expected = folder / "textvqa", read(folder / "textvqa" / "expected.json")
    normalised = expected.pop("normalised")
    score = score_textvqa(read(room / "TextVQA_0.5.1_val.json"), read_json_lines(room / "answers.jsonl"))
    assert_equal(score.original, expected)
    assert [row["input"] for row in normalised] == read(room / "normalisation_inputs.json")
    assert [normalise_vqa(row["input"]) for row in normalised] == [row["output"] for row in normalised]


def test_vqav2_and_vizwiz_submissions(folder):
    room = folder / "vqav2"
    broken = []
    answers = read_json_lines(room / "merge.jsonl", broken)
    score = convert_vqav2(read_json_lines(room / "llava_vqav2_mscoco_test2015.jsonl"), answers, len(broken))
    assert_equal(score.original, read(room / "expected.json"))
    assert score.problems["answered twice"] == [262144000] and score.problems["answers without a question"] == [1]
    room = folder / "vizwiz"
    questions, answers = read_json_lines(room / "llava_test.jsonl"), read_json_lines(room / "answers.jsonl")
    assert_equal(convert_vizwiz(questions, answers).original, read(room / "expected.json"))
    assert "AssertionError" in convert_vizwiz(questions, answers[1:]).original["error"]


def test_gqa(folder):
    room, expected = folder / "gqa", read(folder / "gqa" / "expected.json")
    expected.pop("note")
    score = score_gqa(read(room / "testdev_balanced_questions.json"), read_json_lines(room / "answers.jsonl"))
    assert_equal(score.original, expected)


def test_mmbench(folder, tmp_path):
    room, expected = folder / "mmbench", read(folder / "mmbench" / "expected.json")
    rows = read_mmbench(room / "mmbench_dev_20230712.tsv")
    letter = "Answer with the option's letter from the given choices directly."
    for name, suffix, all_rounds in (
        ("en_single_pred_prompt", letter, False),
        ("cn_single_pred_prompt", "请直接回答选项字母。", False),
        ("no_suffix", "", False),
        ("all_rounds", letter, True),
    ):
        prompts = build_mmbench_prompts(rows, suffix, all_rounds)
        for prompt in prompts:
            system = expected[name][0]["full_prompt"].split("<image>")[0]
            prompt["full_prompt"] = f"{system}<image>\n{prompt.pop('text')} ASSISTANT:"
        assert_equal(prompts, expected[name], name)
    score = convert_mmbench(rows, read_json_lines(room / "answers.jsonl"))
    assert_equal(json.loads(json.dumps(score.original["submission"])), expected["submission"])
    write_submission(tmp_path, score.original)
    table = openpyxl.load_workbook(tmp_path / "submission.xlsx").active.iter_rows(values_only=True)
    rows = [["" if cell is None else cell for cell in row] for row in table]
    assert rows == [expected["submission"]["columns"], *expected["submission"]["rows"]]


def test_seed(folder):
    room = folder / "seed_bench"
    score = score_seed(read(room / "SEED-Bench.json"), read_json_lines(room / "answers.jsonl"))
    assert_equal(score.original, read(room / "expected.json"))


def test_seed_stops_where_no_answer_of_a_type_is_right_and_ours_does_not(folder):
    room = folder / "seed_bench"
    answers = read_json_lines(room / "answers.jsonl")
    for answer in answers:
        answer["text"] = "X"
    score = score_seed(read(room / "SEED-Bench.json"), answers)
    assert score.original["error"].startswith("KeyError") and score.summarise()["accuracy"]["ours"] == 0


def test_mmvet(folder):
    room = folder / "mmvet"
    assert_equal(convert_mmvet(read_json_lines(room / "answers.jsonl")).original, read(room / "expected.json"))


def test_mme(folder):
    room, expected = folder / "mme", read(folder / "mme" / "expected.json")
    tasks = {file.stem: file.read_text().splitlines(keepends=True) for file in (room / "results").iterdir()}
    score = score_mme(tasks)
    assert_equal(score.original["results"], expected["results"])
    assert score.summarise()["Perception (of 2000)"]["original"] == pytest.approx(
        expected["results"]["total"]["Perception"]
    )
    for name, numbers in expected["llavar_ocr"].items():
        lines = (room / "llavar_ocr" / f"{name}.txt").read_text().splitlines(keepends=True)
        assert_equal(score_mme_task(lines)[0], numbers, name)
    converter = room / "converter"
    truths = read_mme_truths(converter / "MME_Benchmark_release_version")
    files = convert_mme(truths, read_json_lines(converter / "answers" / "toy.jsonl"))
    assert {f"{name}.txt": text for name, text in files.items()} == expected["converter"]


def test_multimodal_ocr(folder):
    room = folder / "multimodal_ocr"
    for name, expected in read(room / "expected.json").items():
        if not name.startswith("released"):
            assert_equal(score_multimodal_ocr(read(room / f"{name}.json")).original, expected, name)


def test_refcoco(folder):
    room = folder / "refcoco"
    expected = read(room / "expected.json")
    for name in set(expected) - {"prompt_template", "pattern"}:
        answers = [row["answer"] for row in read_json_lines(room / f"answers_{name}.jsonl")]
        score = score_refcoco(read_json_lines(room / f"{name}.jsonl"), answers)
        assert_equal(score.original, expected[name], name, 1e-4)


def test_boxes_come_back_from_the_padded_square():
    for height, width in ((480, 640), (640, 480), (301, 200), (64, 64)):
        box = (10, 20, 50, 60)
        text = str([round(value, 6) for value in pad_box(box, height, width)])
        assert place_box(parse_box(text), height, width) == pytest.approx(box, abs=0.01)


def test_gpt_review_requests(folder):
    room, expected = folder / "gpt_review", read(folder / "gpt_review" / "expected.json")
    cases = {"llava_text": ("text",) * 2, "llava_visual": ("visual",) * 2, "llava_bench": ("bench",) * 2}
    cases |= {"llavar_visual": ("llavar",) * 2, "llavar_read_string_captions": ("llavar", "llavar_read")}
    for name, (kind, prefix) in cases.items():
        questions, references, answers = (
            read_json_lines(room / f"{prefix}_{part}.jsonl") for part in ("questions", "answers_ref", "answers_model")
        )
        context = [] if kind == "text" else read_json_lines(room / f"{kind}_context.jsonl")
        if prefix == "llavar_read":
            context = [
                {**row, "instances": []} for row in read_json_lines(room / "llavar_context_released_format.jsonl")
            ]
        built = build_requests(questions, references, answers, context, kind)
        assert_equal([row["request"] for row in built], expected[name]["requests"], name)
        for row, review in zip(built, expected[name]["reviews"], strict=True):
            content = review["content"]
            assert_equal({**row["review"], "content": content, "tuple": parse_review(content)}, review, name)
    released = read_json_lines(room / "llavar_context_released_format.jsonl")
    with pytest.raises(KeyError, match="instances"):
        build_requests(questions, references, answers, released, "llavar")


def test_gpt_review_replies_and_summaries(folder, tmp_path):
    room, expected = folder / "gpt_review", read(folder / "gpt_review" / "expected.json")
    assert_equal(
        [{"reply": reply, "scores": parse_review(reply)} for reply in read(room / "judge_replies.json")],
        expected["parse_score"],
    )
    files = list((room / "reviews").iterdir())
    summary = expected["summary"]
    assert print_summary(files) == summary["files"] == summary["dir"]
    # What the original leaves out by options is a choice of files and rows here.
    assert print_summary([file for file in files if "0613" in file.name]) == summary["version_0613"]
    assert print_summary([file for file in files if "7b" in file.name]) == summary["select_7b"]
    file = room / "reviews" / "toy-7b.jsonl"
    kept = [row for row in read_json_lines(file) if row["question_id"] not in (0, 6)]
    write_json_lines(tmp_path / file.name, kept)
    assert print_summary([tmp_path / file.name]) == summary["ignore_0_6"]
    assert print_llavar_summary(file, "reviews/toy-7b.jsonl") == summary["llavar_variant"]


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("(8, 7)\nBoth.", [8, 7]),
        ("8, 7.5\nok", [8, 7.5]),
        ("8/10 7/10", [8, 7]),
        ("Assistant 1: 8 Assistant 2: 7", [8, 7]),
        ("\n8 7", [8, 7]),
        ("8 7 6", None),
        ("eight seven", None),
        ("I give 90 and 85", None),
        ("", None),
    ],
)
def test_replies_that_the_original_cannot_read(reply, scores):
    assert read_scores(reply) == scores


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("(b)", "B"), ("B. iron", "B"), (" A ", "A"), ("The answer is C.", "C"), ("b", "B")),
        *(("E", None), ("A dog", None), ("The answer is A or the answer is B", None), ("", None), ("I think so", None)),
    ],
)
def test_letters_in_usual_forms(text, letter):
    assert find_letter(text, 4) == letter


def test_plain_comparisons_count_missing_answers_as_wrong():
    truths = {1: "Red", 2: ["7", "seven"], 3: "a dog"}
    answers = [{"question_id": 1, "text": "red "}, {"question_id": 2, "text": "There are seven."}]
    exact, contains, anls = (
        score_plain(name, truths, answers).original["per_sample"] for name in ("exact_match", "contains", "anls")
    )
    assert exact == {"1": 1, "2": 0, "3": 0} and contains == {"1": 1, "2": 1, "3": 0}
    assert anls == {"1": 1, "2": 0, "3": 0}
    assert score_plain("anls", {1: "hello"}, [{"question_id": 1, "text": "hallo"}]).original["accuracy"] == 0.8


def test_f1_of_pope_is_of_each_category_and_their_mean():
    """All categories in one would give 2/3 here."""
    questions = [{"question_id": i, "category": "random" if i < 2 else "popular"} for i in range(6)]
    labels = {"random": [{"label": "yes"}, {"label": "no"}], "popular": [{"label": "yes"}] * 3 + [{"label": "no"}]}
    answers = [{"question_id": i, "text": text} for i, text in enumerate(("Yes", "No", "Yes", "No", "No", "No"))]
    score = score_pope(questions, answers, labels)
    numbers = {name: row["original"] for name, row in score.summarise().items()}
    assert numbers["F1, random"] == 100 and numbers["F1, popular"] == pytest.approx(50)
    assert numbers["F1, mean of categories"] == pytest.approx(75) and "F1" not in numbers


def test_textvqa_counts_questions_without_an_answer_as_wrong():
    rows = [{"image_id": "a", "question": f"q{n}", "question_id": n, "answers": ["x"] * 10} for n in range(4)]
    score = score_textvqa({"data": rows}, [{"question_id": "a", "prompt": "Q0\nShort.", "text": "x"}])
    accuracy = score.summarise()["accuracy"]
    assert (accuracy["original"], accuracy["ours"]) == (100, 25)
    assert len(score.problems["questions without an answer"]) == 3


def test_intervals_enclose_their_number_and_follow_the_spread():
    low, high = mean_of([0.0] * 50 + [1.0] * 50).interval()
    assert 38 < low < 43 and 57 < high < 62
    assert mean_of([1.0] * 20).interval() == [100, 100]
