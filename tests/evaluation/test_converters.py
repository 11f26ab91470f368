"""Files of the originals converted: ScienceQA in every format, mixtures, GIFs."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from convllava_hf.cli.app import app
from convllava_hf.evaluation.converters import INPUTS, OUTPUTS, convert_scienceqa, list_instructions


def test_scienceqa_in_every_recorded_format(reference):
    folder = reference / "evaluation" / "scienceqa"
    problems, splits, expected = (
        json.loads((folder / name).read_text()) for name in ("problems.json", "pid_splits.json", "expected.json")
    )
    for name, rows in expected["convert_to_llava"].items():
        assert convert_scienceqa(problems, splits["test"], name) == rows, name
    for name, rows in expected["convert_to_jsonl"].items():
        assert list_instructions(convert_scienceqa(problems, splits["test"], name)) == rows


def test_every_format_of_the_originals_is_known(reference):
    problems = json.loads((reference / "evaluation" / "scienceqa" / "problems.json").read_text())
    for asked in INPUTS:
        for answered in OUTPUTS:
            (row,) = convert_scienceqa(problems, ["14824"], f"{asked}-{answered}")
            question, answer = (turn["value"] for turn in row["conversations"])
            assert ("BECAUSE: Maps" in question) == ("L" in asked) and "B." in answer
    with pytest.raises(ValueError, match="QCM-X"):
        convert_scienceqa(problems, [], "QCM-X")


def test_rounds_of_a_mixture_become_questions(tmp_path):
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cup."), ("human", "Which colour?"), ("gpt", "Red.")]
    conversations = [{"from": who, "value": text} for who, text in turns]
    (tmp_path / "mix.json").write_text(json.dumps([{"id": "a", "image": "a.jpg", "conversations": conversations}]))
    file = tmp_path / "questions.jsonl"
    result = CliRunner().invoke(app, ["eval-convert", "mixture", str(tmp_path / "mix.json"), "--out", str(file)])
    assert result.exit_code == 0, result.output
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"question_id": "a-0", "image": "a.jpg", "text": "What is it?", "answer": "A cup."},
        {"question_id": "a-1", "image": "a.jpg", "text": "Which colour?", "answer": "Red."},
    ]


def test_gifs_become_jpegs_and_broken_ones_are_named(tmp_path):
    Image.linear_gradient("L").save(tmp_path / "book.gif")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    result = CliRunner().invoke(app, ["eval-convert", "images", str(tmp_path)])
    assert result.exit_code == 3 and "broken.gif" in result.output
    with Image.open(tmp_path / "book.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))
