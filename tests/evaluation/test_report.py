"""The page and the model card that `convllava eval-report` writes."""

import html
import json
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from convllava_hf.cli.app import app
from convllava_hf.evaluation.files import write_json_lines
from convllava_hf.evaluation.report import add_to_card, find_published, render_report
from convllava_hf.evaluation.results import check_run, hash_checkpoint, hash_text, score_run, write_results
from convllava_hf.evaluation.tasks import TASKS


@pytest.fixture(scope="module")
def refcoco(tmp_path_factory, reference):
    """A folder of results about RefCOCO, of recorded answers, and a folder that stands for their checkpoint."""
    root = tmp_path_factory.mktemp("report")
    checkpoint, folder, images = root / "checkpoint", root / "RefCOCOg", root / "images"
    for place in (checkpoint, images):
        place.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Toy\n")
    source = reference / "evaluation" / "refcoco"
    questions = root / "refcocog_val.jsonl"
    rows = [json.loads(line) for line in (source / "refcocog_val.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["image"] = f"{number}.jpg"
        Image.linear_gradient("L").convert("RGB").resize((row["width"], row["height"])).save(images / row["image"])
    write_json_lines(questions, rows)
    asked = {"task": "refcoco", "checkpoint": hash_checkpoint(str(checkpoint)), "questions": hash_text(questions)}
    asked |= {"prompt_style": "convllava", "limit": None, "settings": {}}
    run = {"asked": asked, "questions": str(questions), "annotations": None, "images": str(images)}
    check_run(folder, run)
    answers = [json.loads(line)["answer"] for line in (source / "answers_refcocog_val.jsonl").read_text().splitlines()]
    write_json_lines(folder / "predictions.jsonl", [{"question_id": n, "text": a} for n, a in enumerate(answers)])
    extra = {"task": "refcoco", "model": "toy", "asked": asked, "versions": {"torch": "2.7"}, "questions": len(rows)}
    write_results(folder, score_run(folder, run, questions, None), extra)
    return folder, checkpoint


def test_the_page_shows_numbers_published_ones_and_wrong_answers(refcoco, tmp_path):
    folder, _ = refcoco
    result = CliRunner().invoke(app, ["eval-report", str(folder), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert f"{results['numbers']['accuracy']['ours']:.1f} (" in page
    assert "ConvLLaVA-sft-1536 82" in page and "ConvLLaVA-sft-768 79.8" in page
    wrong = sum(json.loads(line)["ours"] < 0.5 for line in (folder / "outcomes.jsonl").read_text().splitlines())
    assert page.count("<figure>") == page.count("data:image/jpeg") == wrong > 0
    assert "http" not in page.replace("http-equiv", ""), "the page needs no other file"


def test_published_numbers_of_every_family():
    assert find_published("textvqa", {}) == (
        {
            **{"ConvLLaVA-sft-768": 59.1, "ConvLLaVA-sft-1024": 62.5, "ConvLLaVA-sft-1536": 65.8},
            **{"llava-v1.5-7b": 58.2, "llava-v1.5-13b": 61.3},
            **{"TinyLLaVA-3.1B": 59.1, "TinyLLaVA-2.0B": 56.4, "TinyLLaVA-1.5B": 51.7},
        },
        "accuracy",
    )
    assert find_published("refcoco", {"questions": "x/refcoco+_testA.jsonl"})[0]["ConvLLaVA-sft-768"] == 84.9


@pytest.mark.parametrize(
    ("task", "count", "number"),
    [
        *(("mme", 8, 1510.7), ("mmbench", 8, 64.3), ("mmbench_cn", 2, 58.3), ("seed_bench", 5, 58.6)),
        *(("textvqa", 8, 58.2), ("pope", 5, 85.9), ("scienceqa", 5, 66.8), ("gqa", 5, 62.0), ("vqav2", 5, 78.5)),
        *(("vizwiz", 2, 50.0), ("mmvet", 8, 30.5), ("gpt_review", 5, 63.4)),
        *((task, 0, None) for task in ("multimodal_ocr", "exact_match", "contains", "anls")),
    ],
)
def test_published_numbers_of_every_task(task, count, number):
    found, _ = find_published(task, {})
    assert (len(found), found.get("llava-v1.5-7b")) == (count, number)


def test_every_task_is_looked_up():
    marks = next(mark for mark in test_published_numbers_of_every_task.pytestmark)
    assert {case[0] for case in marks.args[1]} | {"refcoco"} == set(TASKS)


def write_evaluation(root, task, questions, answers, annotations=None):
    """A folder of results of recorded answers."""
    asked = {"task": task, "checkpoint": "0", "questions": hash_text(questions), "settings": {}}
    asked |= {"prompt_style": "checkpoint", "limit": None}
    places = {"questions": str(questions), "annotations": annotations and str(annotations), "images": str(root)}
    run, folder = {"asked": asked, **places}, root / "results"
    check_run(folder, run)
    write_json_lines(folder / "predictions.jsonl", answers)
    extra = {"task": task, "model": "toy", "asked": asked, "versions": {}, "questions": len(answers)}
    write_results(folder, score_run(folder, run, questions, annotations), extra)
    return folder


@pytest.mark.parametrize("task", ["textvqa", "mme"])
def test_wrong_answers_of_questions_that_share_an_image_are_shown_with_it(reference, tmp_path, task):
    """Their ids are those of the annotations (TextVQA) or name file and question (MME)."""
    room = reference / "evaluation" / task
    if task == "mme":
        truths, file = (
            room / "converter" / "MME_Benchmark_release_version",
            room / "converter" / "answers" / "toy.jsonl",
        )
    else:
        truths, file = room / "TextVQA_0.5.1_val.json", room / "answers.jsonl"
    answers = [json.loads(line) | {"text": "wrong"} for line in file.read_text().splitlines()]
    questions = tmp_path / "questions.jsonl"
    rows = [{"question_id": a["question_id"], "text": a["prompt"], "image": "x.png"} for a in answers]
    write_json_lines(questions, rows)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    page = render_report([write_evaluation(tmp_path, task, questions, answers, truths)])
    shown = min(len(answers), 24)
    assert page.count("<figure>") >= page.count("data:image/jpeg") >= shown > 1
    for answer in answers[:shown]:
        assert answer["prompt"] in html.unescape(page)


def test_two_sets_of_one_task_stay_in_the_card(refcoco, tmp_path):
    folder, checkpoint = refcoco
    card = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, card)
    for name in ("A", "B", "A"):
        shutil.copytree(folder, tmp_path / name, dirs_exist_ok=True)
        add_to_card([tmp_path / name], card)
    found = [entry for entry in ModelCard.load(card / "README.md").data.eval_results if len(entry.dataset_name) == 1]
    assert sorted(entry.dataset_name for entry in found) == ["A", "A", "B", "B"]


def test_results_go_into_the_card_once(refcoco):
    folder, checkpoint = refcoco
    for _ in range(2):
        result = CliRunner().invoke(app, ["eval-report", str(folder), "--card", str(checkpoint)])
        assert result.exit_code == 0, result.output
    numbers = json.loads((folder / "results.json").read_text())["numbers"]["accuracy"]
    found = ModelCard.load(checkpoint / "README.md").data.eval_results
    assert [entry.metric_value for entry in found] == [round(numbers[rule], 4) for rule in ("original", "ours")]


def test_results_of_another_checkpoint_stay_out_of_a_card(refcoco, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    (tmp_path / "README.md").write_text("# Toy\n")
    result = CliRunner().invoke(app, ["eval-report", str(refcoco[0]), "--card", str(tmp_path)])
    assert result.exit_code == 3 and str(tmp_path) in " ".join(result.output.split())
