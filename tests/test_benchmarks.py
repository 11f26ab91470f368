"""The benchmarks run to their end on tiny work. What they measure is never asserted, only that it is there."""

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as its own folder sees it."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def run(load, capsys, tmp_path):
    """Runs a benchmark with a line of arguments; returns what it printed and what it wrote as JSON."""

    def run_main(name: str, arguments: str) -> tuple[str, dict]:
        file = tmp_path / "results.json"
        load(name).main([*shlex.split(arguments), "--json", str(file)])
        return capsys.readouterr().out, json.loads(file.read_text())

    return run_main


def read_table(text: str, title: str) -> list[dict[str, str]]:
    """The rows of the Markdown table under a heading."""
    lines = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.slow  # every variant has a process of its own, which imports everything
def test_preprocess_compares_every_variant(run, load):
    variants = load("preprocess").VARIANTS
    tiny = "--cases 96x64 0.01 --batches 1 2 --batch-case 96x64 --side 128 --repeats 1"
    text, results = run("preprocess", tiny)
    rows = read_table(text, "One image, to 128 pixels")
    assert [(row["image"], row["variant"]) for row in rows] == [
        (image, variant) for image in ("96x64", "0.01") for variant in variants
    ]
    assert [row["images"] for row in read_table(text, "Batches of 96x64")[:: len(variants)]] == ["1", "2"]
    assert {row["pixels"] for row in read_table(text, "Images")} == {"96x64", "116x87"}
    # Sides of 1536 pixels have targets, others do not.
    assert "Targets" not in text
    assert all(values["seconds"] > 0 for variants in results["images"].values() for values in variants.values())
    differences = {(row["image"], row["variant"]): row["largest"] for row in results["differences"]}
    for image in ("96x64", "0.01"):
        assert differences[image, "ours"] < 2.5
        assert differences[image, "ours, Pillow"] < 1e-3


def test_input_compares_every_way(run, load, monkeypatch):
    monkeypatch.setattr(load("input"), "SIZES", ((300, 200), (64, 48)))
    text, results = run("input", "--images 4 --side 64 --batch 1 --workers 1")
    rows = read_table(text, "Input at 64 pixels, 6.9 images/s wanted")
    assert [row["way"] for row in rows] == list(load("input").WAYS)
    assert all(int(row["workers to keep up"]) >= 1 and row["of a step"].endswith("%") for row in rows)
    assert all(row["images_per_second"] > 0 for row in results["results"])


@pytest.mark.slow
def test_training_compares_every_variant(run, load):
    pytest.importorskip("trl", reason="training needs the extra `train`")
    text, results = run("training", "--repeats 1 --steps 2 --batch 2 --side 64 --sides 64")
    assert [row["trained"] for row in read_table(text, load("training").ACTIVATIONS)] == ["all", "stage 2"]
    assert len(read_table(text, "Batches")) == 5 and len(read_table(text, "Collator")) == 2
    assert len(read_table(text, "Cache")) == 3 and len(read_table(text, "Without padding")) == 4
    assert [row["answers"] for row in read_table(text, "Evaluation")] == ["0", "8", "32"]
    assert len(read_table(text, "Memory")) == 6
    assert [row["rounds"] for row in read_table(text, "Masks (16 rows of 2048 tokens)")] == ["1", "5", "20"]
    assert results["gradients"] == 0.0


def test_preprocess_photographs_are_not_trivial_to_decode(load):
    preprocess = load("preprocess")
    assert preprocess.get_size("12") == (4000, 3000)
    bits_per_pixel = len(preprocess.make_photograph(320, 240, 90)) * 8 / (320 * 240)
    assert 1 < bits_per_pixel < 6


def test_vision_measures_every_tower(run):
    tiny = "--device cpu --depths 1 1 1 1 1 --widths 8 16 16 16 32 --resolutions 64 128 --native-side 128"
    text, results = run("vision", f"{tiny} --channels-last --repeats 1 --matmul 64")
    work = read_table(text, "Work")
    assert [row["tokens"] for row in work] == ["1", "4", "64", "144", "256", "576", "576"]
    assert work[-1]["tower"].startswith("CLIP") and work[-1]["TFLOP"] == "0.382"
    times = read_table(text, "Time and memory")
    assert [row["tower"] for row in times] == ["ours", "stock", "ours, channels_last"] * 2
    ratios = read_table(text, "Work by aspect ratio, 1536 pixels")
    assert [row["tokens"] for row in ratios] == ["576", "432", "540", "576", "336", "576", "576", "408", "560"]
    assert len(read_table(text, "Time by aspect ratio, 128 pixels")) == 9
    assert all(entry["difference"] < 1e-3 for entry in results["times"])


def test_vision_counts_the_released_tower(load):
    """The work of the released tower, from its shapes alone: the number that README.md compares with others."""
    vision = load("vision")
    with torch.device("meta"):
        tower = vision.build_vision_tower(vision.ConvLlavaConfig())
    assert round(vision.count_flops(tower, 1536, 1536) / vision.TERA, 2) == 3.78


def test_data_measures_ways_of_building(run):
    text, results = run("data", "--rows 300 --processes 2 --ways 'ours, paths' json.load")
    rows = read_table(text, "Building")
    assert [(row["rows"], row["way"], row["processes"]) for row in rows] == [
        ("300", "ours, paths", "2"),
        ("300", "json.load", "1"),
    ]
    assert all(entry["seconds"] > 0 for entry in results["results"])


@pytest.fixture
def model(tmp_path) -> Path:
    from tiny_checkpoint import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path / "tiny")


def test_evaluation_compares_batch_sizes(run, model):
    tiny = f"--model {model} --device cpu --questions 4 --batches 1 4 --new-tokens 2 --repeats 1"
    rows = read_table(run("evaluation", tiny)[0], "Speed")
    assert [row["batch"] for row in rows] == ["1", "4"] and rows[1]["equal answers"] == "4/4"


def test_reading_measures_sizes_and_budgets(run, model, tmp_path):
    tiny = f"--model {model} --device cpu --sizes 8 20 --budgets 1 4 --side 128 --documents 4"
    rows = read_table(run("reading", f"{tiny} --plot {tmp_path / 'plot.png'}")[0], "Reading")
    assert [(row["tokens"], row["text size"]) for row in rows] == [("1", "8"), ("1", "20"), ("4", "8"), ("4", "20")]
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_plot_of_reading_names_the_size_of_the_font(load, tmp_path):
    """A digit is about 0.7 of its font's size high: the axis must not say height."""
    reading = load("reading")
    row = {"tokens": 4, "text size": 8, "accuracy": 50, "low": 40, "high": 60}
    reading.plot([row], tmp_path / "plot.svg")
    assert "<!-- font size (em) in pixels of the page -->" in (tmp_path / "plot.svg").read_text()


def test_documents_of_reading_show_their_truth_and_nothing_is_cut(load):
    import random

    reading = load("reading")
    font = reading.find_fonts()[0]
    for kind in reading.KINDS:
        page, question, truth = reading.draw_document(kind, 16, 256, font, random.Random(0))
        again = reading.draw_document(kind, 16, 256, font, random.Random(0))
        assert page.tobytes() == again[0].tobytes() and (question, truth) == again[1:]
        assert page.convert("L").getextrema()[0] < 60 and truth.replace(".", "").isdigit()


@pytest.mark.slow
def test_waits_of_training_and_answering_are_those_that_must_be(run):
    """One in `forward`, which compares placeholders with features; a step looks whether its loss is a number."""
    pytest.importorskip("trl", reason="training needs the extra `train`")
    text, results = run("waits", "--side 128 --images 2")
    table = read_table(text, "Waits, copies and launches")
    assert [row["work"] for row in table[:2]] == ["training step, pad, 2 images", "training step, native, 2 images"]
    found = {name: values["waits"] for name, values in results["results"].items()}
    step, first = found["training step, pad, 2 images"], found["answer, first token, native"]
    assert step["bool in trainer.training_step"] == step["float in trainer._get_grad_norm"] == 1
    assert step["item in import_utils.torch_compilable_check"] == first["item in import_utils.torch_compilable_check"]
    assert not {line for line in (*step, *first) if "_list_sizes" in line}


def test_answers_compares_models_end_to_end(run):
    text, _ = run("answers", "--toy --sides 64 128 --tokens 2")
    rows = read_table(text, "From a file to the first token, 0.1B, float32")
    assert [(row["model"], row["image tokens"]) for row in rows] == [
        ("ConvLLaVA 64 pad", "1"),
        ("ConvLLaVA 128 pad", "4"),
        ("ConvLLaVA 128 native", "4"),  # 4:3: at this size a side is one cell or two
        ("ConvLLaVA 128 native", "2"),
        ("ConvLLaVA 128 native", "2"),
        *[("ConvLLaVA 128 pad", "4")] * 2,
        ("LLaVA-1.5", "4"),
        ("FastVLM", "4"),
    ]
    assert [row["exponent"] != "" for row in read_table(text, "Exponents of growth")][::2] == [True, True]


def test_draft_asks_about_photos_whole_and_shrunk(run, model):
    pytest.importorskip("sklearn", reason="the quickstart draws its pages from scikit-learn's digits")
    text, _ = run("draft", f"--model {model} --pages 3 --scales 3 --device cpu")
    (row,) = read_table(text, "Answers about drafted photos")
    assert row["page, pixels"] == "384" and row["decoded at"] == "192" and float(row["largest"]) > 0


@pytest.fixture
def run_gpu(load, tmp_path):
    """Runs a part of benchmarks/gpu.py on the CPU at toy sizes and returns its cases."""
    gpu = load("gpu")

    def run(part: str) -> dict[str, dict]:
        toy = f"--in-process {part} --toy --device cpu --dtype float32 --repeats 1 --output {tmp_path}"
        gpu.main(toy.split())
        return json.loads((tmp_path / "results.json").read_text())["parts"][part]

    return run


# Every part, and how many cases it has at toy size.
GPU_PARTS = {"correctness": 1, "tower": 13, "first_token": 7, "training": 3, "serving": 1}


@pytest.mark.parametrize("part", GPU_PARTS)
def test_every_part_of_gpu_runs_on_a_cpu(run_gpu, load, tmp_path, part):
    found = run_gpu(part)
    assert set(load("gpu").PARTS) == set(GPU_PARTS) and len(found) == GPU_PARTS[part]
    for values in found.values():
        assert not {"error!", "skipped!"} & values.keys(), values
        assert all(value > 0 for value in values.values() if isinstance(value, float))
    assert f"## {part}" in (tmp_path / "results.md").read_text()
    if part == "serving":
        assert values["known pictures, from the cache"] == 1
    if part == "correctness":
        assert values["failed"] == "none" and values["passed"] >= 18 and "CUDA" in values["skipped"], values


@pytest.mark.slow  # those that compile, and a process of FSDP2
@pytest.mark.timeout(900)
def test_every_gpu_test_runs_on_a_cpu(load, tmp_path):
    """At toy size the part `correctness` leaves the long ones out."""
    gpu, folder = load("gpu"), Path(__file__).with_name("gpu")
    found = [gpu.run_tests(file, SimpleNamespace(device="cpu", toy=False)) for file in sorted(folder.glob("test_*.py"))]
    assert len(found) == 4 and {values["failed"] for values in found} == {"none"}, found
    reasons = "; ".join(values["skipped"] for values in found if values["skipped"] != "none")
    assert all("CUDA" in reason or "does not run here" in reason for reason in reasons.split("; ")), reasons


def test_gpu_goes_on_where_it_stopped(run_gpu, load, tmp_path, monkeypatch):
    """A case with a result is not run again, one that fails is named and the others run, other machines are refused."""
    gpu, ran = load("gpu"), []

    def fail():
        ran.append("second")
        raise ValueError("broken")

    cases = {"first": lambda: ran.append("first") or {"value": 1.0}, "second": fail}
    monkeypatch.setitem(gpu.PARTS, "tower", lambda options: cases)
    assert run_gpu("tower") == {"first": {"value": 1.0}, "second": {"error!": "ValueError: broken"}}
    cases["third"] = lambda: ran.append("third") or {"value": 3.0}
    assert run_gpu("tower")["third"] == {"value": 3.0} and ran == ["first", "second", "third"]
    assert "ValueError: broken" in (tmp_path / "results.md").read_text()
    with pytest.raises(SystemExit, match="--output"):
        gpu.main(f"--in-process tower --device cpu --output {tmp_path}".split())
