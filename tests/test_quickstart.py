"""The quickstart: honest splits, seeds that matter, and a miniature run from data to report."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from convllava_hf import answer, load


pytest.importorskip("trl", reason="the quickstart trains with TRL, of the extra `train`")
if Version(transformers.__version__) < Version("5.18"):
    pytest.skip("TRL takes the loss on answers only from transformers 5.18 on", allow_module_level=True)
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
