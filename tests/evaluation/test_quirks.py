"""Quirks of the originals' scorers that the recorded inputs do not touch; those that they do are in test_metrics.py."""

import pytest

from convllava_hf.evaluation.choices import build_mmbench_prompts
from convllava_hf.evaluation.converters import convert_scienceqa
from convllava_hf.evaluation.grounding import parse_box
from convllava_hf.evaluation.metrics import parse_pope, score_multimodal_ocr, score_pope
from convllava_hf.evaluation.mme import parse_mme
from convllava_hf.evaluation.normalisers import normalise_vqa


def read_turns(prompt_format: str, **more) -> list[str]:
    problem = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "", "image": None}
    problem |= {"lecture": "LECTURE", "solution": "SOLUTION", **more}
    (row,) = convert_scienceqa({"1": problem}, ["1"], prompt_format)
    return [turn["value"] for turn in row["conversations"]]


def test_scienceqa_swaps_lecture_and_solution_where_one_follows_the_answer_alone():
    assert read_turns("QCM-AL")[1] == "The answer is B. BECAUSE: SOLUTION"
    assert read_turns("QCM-AE")[1] == "The answer is B. BECAUSE: LECTURE"
    assert read_turns("QCM-ALE")[1] == "The answer is B. BECAUSE: LECTURE SOLUTION"


def test_scienceqa_drops_a_label_everywhere_in_a_text_that_begins_with_it():
    quoted = {"question": "He wrote 'Question: why'", "solution": "Answer: none."}
    assert read_turns("QCM-AL", **quoted) == [
        "He wrote 'why'\nContext: N/A\nOptions: (A) x (B) y",
        "The answer is B. BECAUSE: none.",
    ]
    assert "Question: He wrote 'Question: why'" in read_turns("CQM-A", **quoted)[0], "this one begins with Context"


@pytest.mark.parametrize(
    ("text", "said"),
    [("No,thanks", "yes"), ("Well no", "no"), ("It is not", "no"), ("no\n", "yes"), ("Yes. No.", "yes"), ("", "yes")],
)
def test_pope_deletes_commas_and_splits_on_single_spaces(text, said):
    assert parse_pope(text) == said


def test_pope_takes_every_label_but_no_for_yes():
    questions = [{"question_id": n, "category": "random"} for n in range(3)]
    labels = {"random": [{"label": label} for label in ("Yes", "no", "unknown")]}
    answers = [{"question_id": n, "text": text} for n, text in enumerate(("yes", "yes", "yes"))]
    assert score_pope(questions, answers, labels).original["categories"]["random"]["TP"] == 2


def test_pope_stops_where_no_answer_is_a_true_positive():
    """Precision and recall are 0 there, and their mean has no denominator."""
    questions = [{"question_id": n, "category": "random"} for n in range(2)]
    answers = [{"question_id": n, "text": text} for n, text in enumerate(("yes", "no"))]
    score = score_pope(questions, answers, {"random": [{"label": "no"}, {"label": "yes"}]})
    assert score.original["error"].startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("x?y", "xy"),  # deleted at first, where other marks become spaces
        ("x!y", "x y"),
        ("x!y z ! w", "xy z w"),  # one that touches a space anywhere is deleted everywhere
        ("x;y z;\nw", "xy z w"),  # a line break counts as a space
        ("x;y 1,000", "x y 1000"),  # the comma is gone before it can join anything
    ],
)
def test_normalisation_of_vqa(text, normalised):
    assert normalise_vqa(text) == normalised


def test_mmbench_takes_none_in_any_case_for_no_option():
    row = {"index": 0, "question": "Which?", "hint": "NaN", "A": "x", "B": "none", "C": "z", "D": None}
    (prompt,) = build_mmbench_prompts([row])
    assert prompt["text"] == "Which?\nA. x"


@pytest.mark.parametrize(
    ("text", "said"), [("know it", "no"), ("eyes", "yes"), ("  yes", "other"), (" Yes", "yes"), ("yeah", "other")]
)
def test_mme_reads_four_characters(text, said):
    assert parse_mme(text) == said


def test_multimodal_ocr_reads_a_truth_as_text():
    rows = [{"question": "", "answer": said, "gt_answers": ["3.5"]} for said in ("3.5", "345")]
    assert [row["correct"] for row in score_multimodal_ocr(rows).original["per_sample"]] == [1, 0]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("(0.1,0.2,0.3,0.4)", None),
        ("[[0.1,0.2,0.3,0.4]] or [1,1,1,1]", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1,0.2,\n0.3,0.4]", None),
        ("[0.1,0.2,0.3,0.4,0.5]", None),
        ("see [1]: [0.1,0.2,0.3,0.4]", None),
    ],
)
def test_refcoco_reads_square_brackets_on_one_line(text, box):
    assert parse_box(text) == box
