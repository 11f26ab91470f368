"""The quickstart: honest splits, seeds that matter, and a miniature run from data to report."""

import importlib
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from convllava_hf import answer, load


pytest.importorskip("trl", reason="the quickstart trains with TRL, of the extra `train`")
FOLDER = Path(__file__).parent.parent / "examples" / "quickstart"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def pages():
    return importlib.import_module("pages")


def describe(page):
    return page.things, page.kind, page.fingerprint


def test_pages_depend_on_the_seed_alone(pages):
    first = [describe(page) for page in pages.make_pages("train", 24, seed=1)]
    assert first == [describe(page) for page in pages.make_pages("train", 24, seed=1)]
    other = [describe(page) for page in pages.make_pages("train", 24, seed=2)]
    assert not {fingerprint for *_, fingerprint in first} & {fingerprint for *_, fingerprint in other}


def test_splits_share_neither_pictures_nor_handwriting(pages):
    made = {split: pages.make_pages(split, 240, seed=0) for split in pages.SPLIT_SHARES}
    made["train"] += pages.make_pages("train", 240, 0, ("mixed",))
    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        pictures = [{page.fingerprint for page in made[split]} for split in (first, second)]
        scans = [
            {thing.scan for page in made[split] for thing in page.things if thing and thing.is_digit}
            for split in (first, second)
        ]
        assert not pictures[0] & pictures[1] and not scans[0] & scans[1] and scans[0] and scans[1]


def test_answers_are_what_the_pages_show(pages):
    rng, seen = random.Random(0), set()
    for page in pages.make_pages("test", 60, seed=3):
        for task in pages.IMAGE_TASKS:
            pair = pages.ask(page, task, rng)
            if pair is None:
                continue
            seen.add(task)
            things = [(cell, thing) for cell, thing in zip(pages.CELLS, page.things, strict=True) if thing]
            shown = {
                "number": "".join(thing.name for _, thing in things),
                "digit": things[0][1].name,
                "shape": things[0][1].name,
                "colour": things[0][1].colour,
                "position": things[0][0],
                "count": str(len(things)),
            }
            assert pair[1] == shown[task]
    assert seen == set(pages.IMAGE_TASKS)
    with pytest.raises(ValueError, match="'smell'"):
        pages.ask(page, "smell", rng)


def test_a_miniature_run(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", None)  # which the run sets; this puts it back
    results = importlib.import_module("run").main(
        tmp_path, seed=5, num_pages=60, reading_rows=64, seeing_pages=32, share=0.01, per_task=3
    )
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["seed"] == 5 and results["questions"]["overall"] == 21
    assert set(results["accuracy"]["tasks"]) == set(results["accuracy"]["tasks_images_swapped"]) | {"text"}
    assert not results["targets_met"]  # a model that saw 60 pages knows nothing, and the report says so
    report = (tmp_path / "report.html").read_text()
    assert report.count("<svg") >= 5 and "not met" in report and "http" not in report.replace("http://www.w3.org", "")
    model, processor = load(tmp_path / "checkpoint")
    reply = answer(model, processor, "What is it?", tmp_path / "samples" / "page.png", max_new_tokens=3)
    assert isinstance(reply, str)


@pytest.mark.slow
def test_examples_are_answered_as_they_say(capsys, monkeypatch, tmp_path_factory):
    """On the checkpoint of `make quickstart`: the one in QUICKSTART, or one that is trained here in some minutes."""
    folder = Path(os.environ.get("QUICKSTART") or FOLDER.parents[1] / "quickstart")
    if not (folder / "checkpoint").is_dir():
        folder = tmp_path_factory.mktemp("quickstart")
        importlib.import_module("run").main(folder, seed=0)
    for script, count in (("ask.py", 1), ("batched_generate.py", 4)):
        monkeypatch.setattr(sys, "argv", [script, "--model", str(folder / "checkpoint")])
        capsys.readouterr()
        runpy.run_path(str(FOLDER.parent / script), run_name="__main__")
        lines = [line for line in capsys.readouterr().out.splitlines() if line]
        if script == "ask.py":
            assert lines == ["a white page with a red circle at the top left; expected: red", "red"]
        else:
            pairs = [line.split(" -> ")[1].removesuffix(")").split(" (expected: ") for line in lines]
            assert len(pairs) == count and all(found == expected for found, expected in pairs), lines


def make_results() -> tuple[dict, dict, list[dict]]:
    """What the report is drawn from, with a known curve and one wrong answer."""
    pages = importlib.import_module("pages")
    tasks = dict.fromkeys(pages.TASKS, 0.9)
    results = {
        "seed": 0,
        "parameters": 1000,
        "training_pages": 10,
        "questions": {**dict.fromkeys(pages.TASKS, 90), "overall": 630},
        "accuracy": {
            "overall": 0.9,
            "overall_images_swapped": 0.2,
            "tasks": tasks,
            "tasks_images_swapped": dict.fromkeys(pages.IMAGE_TASKS, 0.2),
        },
        "targets": {"overall": 0.9, "each_image_task": 0.8},
        "targets_met": True,
        "seconds": {"stage 1": {"wall": 3.0, "cpu": 5.0}, "total": {"wall": 3.0, "cpu": 5.0}},
    }
    losses = {"stage 1": [(step, 4.0 if step < 30 else 1.0) for step in range(1, 61)]}
    page = pages.make_pages("test", 1, seed=0)[0].image
    sample = {"task": "digit", "image": page, "question": "Which digit?", "answer": "3", "truth": "8"}
    return results, losses, [sample]


def test_the_report_shows_wrong_answers_or_says_that_there_are_none(tmp_path):
    report = importlib.import_module("report")
    results, losses, samples = make_results()
    report.write_report(str(tmp_path / "one.html"), results, losses, [], samples)
    text = (tmp_path / "one.html").read_text()
    assert "1 of 630 answers are wrong. All of them:" in text and text.count('class="wrong"') == 1
    report.write_report(str(tmp_path / "none.html"), results, losses, [], [])
    assert "There are none: all 630 questions were answered exactly." in (tmp_path / "none.html").read_text()
    report.write_report(str(tmp_path / "many.html"), results, losses, [], samples * 50)
    assert (tmp_path / "many.html").read_text().count('class="wrong"') == 10
    assert f"transformers {transformers.__version__}" in text and "processor cores" in text


def test_the_report_fits_a_phone(tmp_path):
    """In a frame of 390 pixels, which tells how wide its content is, also of a page that is too wide."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    report = importlib.import_module("report")
    results, losses, samples = make_results()
    page, wide = tmp_path / "report.html", tmp_path / "wide.html"
    report.write_report(str(page), results, losses, samples * 4, samples)
    wide.write_text(page.read_text() + '<p style="width: 400px">wide')
    frame = '<iframe src="{}" style="width:390px;border:0" onload="{}"></iframe>'
    width = "this.contentDocument.documentElement.scrollWidth"
    frames = "".join(frame.format(file.name, f"document.title += ' ' + {width}") for file in (page, wide))
    (tmp_path / "frames.html").write_text(frames)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, str(tmp_path / "frames.html")], capture_output=True, text=True, timeout=120)
    widths = sorted(map(int, re.search("<title>(.*)</title>", done.stdout)[1].split()))
    assert widths[0] == 390 and widths[1] > 390


def test_the_running_mean_is_a_mean_and_ticks_are_round(tmp_path):
    report = importlib.import_module("report")
    points = [(step, float(step)) for step in range(1, 101)]
    smooth = report.average(points, 10)
    assert smooth[0] == (10, 5.5) and smooth[-1] == (100, 95.5) and len(smooth) == 91
    assert report.average(points[:3], 10) == [(3, 2.0)]
    assert report.choose_ticks(4.2) == [0, 2, 4] and report.choose_ticks(0.9) == [0, 0.5]
    assert report.choose_ticks(107) == [0, 50, 100] and report.choose_ticks(8.0) == [0, 2, 4, 6, 8]
