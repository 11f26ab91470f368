"""The commands around training data: what they print, and how they fail; the page and the example."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import make_png, save_rows, save_tiny_llava
from typer.testing import CliRunner

from convllava_hf.cli.app import app
from convllava_hf.data.page import read_rows, split_tokens
from convllava_hf.shipped import list_files


def run(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with `one.json`, `bad.json` and images."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.png").write_bytes(make_png(50, 40, 0))
    talk = [{"from": "human", "value": "<image>\nWhat is <b>?"}, {"from": "gpt", "value": "Größe 日本 😀 <i>&amp;</i>"}]
    rows = [{"image": "a.png", "conversations": talk}, {"conversations": [{**talk[0], "value": "Why?"}, talk[1]]}]
    (folder / "one.json").write_text(json.dumps(rows))
    (folder / "bad.json").write_text(json.dumps([*rows, {"image": "b.png", "conversations": talk}]))
    return folder


def test_build_check_and_show(files, checkpoint, tmp_path):
    one, output = files / "one.json", tmp_path / "out"
    code, text = run("build", "--llava-json", one, "--llava-json", one, "--image-root", files, "-o", output)
    assert code == 0 and "one: 2 read, 0 skipped, 2 written, 1 text only, 1 images" in text
    assert "one_2: 2 read" in text and "all: 4 read, 0 skipped, 4 written" in text
    code, text = run("check", output, "--model", checkpoint, "--max-length", 500)
    assert code == 0 and "all: 4 read, 0 skipped, 4 written" in text
    code, text = run("check", output, "--model", checkpoint, "--max-length", 20)
    assert code == 1 and re.search(
        r"train, row 0 .one-00000.parquet.: row too long: has \d+ tokens, 1 images included", text
    )

    code, text = run("show", output, "--out", tmp_path / "page.html", "--model", checkpoint)
    assert code == 0 and "wrote 4 rows" in text
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.links == [] and page.images == 4 and page.text.count("sees 128 x 128 in 4 tokens") == 2
    answer = "Größe 日本 😀 <i>&amp;</i><|im_end|>"
    assert page.texts["loss"] == answer * 4
    assert page.texts["none"].count("Why?") == 2 and "<|im_start|>user\n" in page.texts["none"]
    assert page.texts["image"].count("4 image tokens") == 2

    code, text = run("show", output, "--out", tmp_path / "page.html", "--count", 1)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert code == 0 and "depends on a checkpoint" in page.source and "Größe 日本 😀 <i>&amp;</i>" in page.text


def test_reports_in_json(files, checkpoint, tmp_path):
    """Nothing but the object is on stdout; what it says is what the files say."""
    output, page = tmp_path / "out", tmp_path / "page.html"
    given = ["--llava-json", files / "bad.json", "--image-root", files, "--on-error", "skip", "--json"]
    done = CliRunner().invoke(app, ["data", "build", *map(str, given), "--output", str(output)])
    built = json.loads(done.stdout)
    assert done.exit_code == 0 and built.pop("output") == str(output), done.output
    assert built == json.loads((output / "build_report.json").read_text())
    assert built["totals"]["written"] == 2 and [bad["row"] for bad in built["bad_rows"]] == [2]
    done = CliRunner().invoke(app, ["data", "show", str(output), "--output", str(page), "--json"])
    assert json.loads(done.stdout) == {"output": str(page), "rows": 2, "left_out": 1}
    done = CliRunner().invoke(app, ["data", "check", str(output), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["totals"]["read"] == 2
    short = ["--model", str(checkpoint), "--max-length", "20"]
    done = CliRunner().invoke(app, ["data", "check", str(output), *short, "--json"])
    assert done.exit_code == 1 and len(json.loads(done.stdout)["bad_rows"]) == 2
    assert done.stderr.splitlines()[-1].startswith("error: 2 bad rows")


def test_bad_input_is_named_in_one_line(files, tmp_path):
    one, bad, output = files / "one.json", files / "bad.json", tmp_path / "out"
    for arguments, error in (
        (["-o", output], "give either --llava-json FILE"),
        (["--llava-json", one, "--mixture", "x", "-o", output], "give either --llava-json FILE"),
        (["--mixture", "x", "-o", output], "no mixture 'x'"),
        (["--llava-json", one, "--image-root", files, "--image-root", files, "-o", output], "1 --llava-json and 2"),
        (
            ["--llava-json", one, "-o", output],
            "one.json, row 0 .line 1.: missing image: a.png: this source has no image root",
        ),
        (
            ["--llava-json", bad, "--image-root", files, "-o", output],
            "bad.json, row 2 .line 1.: missing image: .*b.png does not",
        ),
        (["--llava-json", files / "no.json", "-o", output], "sources are missing: .*no.json"),
        (
            ["--mixture", "llava_v1_5_pretrain", "--root", files, "-o", output],
            "blip_laion_cc_sbu_558k.json .from https",
        ),
        (["--llava-json", one, "--max-length", 5, "-o", output], "max_length needs a processor .--model."),
    ):
        code, text = run("build", *arguments, "--num-proc", 1, "--force")
        last = text.strip().splitlines()[-1]
        assert code == 3 and re.match(f"error: .*{error}", last), text
        assert not output.exists()
    assert run("check", tmp_path / "nothing")[0] == run("show", tmp_path, "-o", tmp_path / "x.html")[0] == 3

    code, text = run("build", "--llava-json", bad, "--image-root", files, "-o", output, "--on-error", "skip", "--force")
    assert code == 0 and "3 read, 1 skipped, 2 written" in text and "bad.json, row 2 (line 1): missing image" in text


def test_pages_are_refused_where_they_would_be_wrong(files, tmp_path):
    code, _ = run(
        "build", "--llava-json", files / "one.json", "--image-root", files, "-o", tmp_path / "d", "--images", "paths"
    )
    (files / "a.png").rename(files / "b.png")
    code, text = run("show", tmp_path / "d", "--out", tmp_path / "page.html")
    (files / "b.png").rename(files / "a.png")
    assert code == 3 and re.search(r"train, row 0: .*a.png.*; see `convllava data check`", text)
    assert not (tmp_path / "page.html").exists()


def test_chosen_and_skipped_rows_are_shown(files, tmp_path):
    build = ["build", "--llava-json", files / "bad.json", "--image-root", files, "-o", tmp_path / "d"]
    assert run(*build, "--on-error", "skip")[0] == 0
    code, text = run("show", tmp_path / "d", "--out", tmp_path / "page.html", "--rows", "1")
    assert code == 0 and "wrote 1 rows, and 1 that were left out" in text
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "train, row 1" in page.text and "Why?" in page.text and page.images == 0
    assert "1 rows were left out" in page.text and "row 2 (line 1): missing image" in page.text
    assert run("show", tmp_path / "d", "--out", tmp_path / "page.html", "--rows", "0-1,1")[0] == 0
    for rows, error in (("2", "no row 2 in train: it has 2 rows"), ("a", "--rows 'a': expected numbers")):
        code, text = run("show", tmp_path / "d", "--out", tmp_path / "page.html", "--rows", rows)
        assert code == 3 and error in text
    code, text = run("show", tmp_path / "d", "--out", tmp_path / "page.html", "--split", "test")
    assert code == 3 and "no split 'test'; it has train" in text


def test_check_and_show_number_rows_as_datasets_does(files, tmp_path):
    from datasets import load_dataset

    many = json.loads((files / "one.json").read_text())[1:] * 3
    for name in ("a", "b", "a_2"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{**row, "id": f"{name}{i}"} for i, row in enumerate(many)]))
    sources = [option for name in ("b", "a", "a_2") for option in ("--llava-json", tmp_path / f"{name}.json")]
    assert run("build", *sources, "-o", tmp_path / "d")[0] == 0
    names = load_dataset(str(tmp_path / "d"), split="train")["id"][:]
    assert [row["id"] for _, _, row in read_rows(tmp_path / "d", 99)] == names and len(names) == 9
    from convllava_hf.data.check import check_dataset
    from convllava_hf.data.rows import BadRow

    with pytest.MonkeyPatch.context() as patch:

        def refuse(row, settings):
            raise BadRow("empty answer", row["id"])

        patch.setattr("convllava_hf.data.check._check_row", refuse)
        bad = check_dataset(tmp_path / "d").bad_rows
    assert [(entry["row"], entry["error"]) for entry in bad] == list(enumerate(names))


def test_roles_are_escaped_on_the_page():
    from convllava_hf.data.page import render_page

    row = {"messages": [{"role": "<script>alert(1)</script>", "content": []}], "images": [], "id": "<b>"}
    page = render_page([("train", 0, row)], "rows")
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page


def test_the_picture_is_what_the_model_gets(checkpoint):
    """Cells and all: away from the lines, the drawn picture is the processed one."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    from convllava_hf.data.page import draw_cells

    processor = AutoProcessor.from_pretrained(checkpoint)
    seen, caption = draw_cells(Image.new("RGB", (60, 40), (200, 30, 90)), processor)
    assert seen.size == (128, 128) and caption == "the model sees 128 x 128 in 4 tokens"
    pixels = np.asarray(seen)
    assert pixels[60, 100].tolist() == [200, 30, 90] and (pixels[64] == 255).all() and (pixels[:, 64] == 255).all()


def test_without_the_extra_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("convllava_hf.cli.data.find_spec", lambda name: None)
    code, text = run("check", tmp_path)
    assert code == 3 and text == "error: training data needs the extra `train`: pip install 'convllava-hf[train]'.\n"


def test_mixtures_are_listed():
    code, text = run("mixtures")
    assert code == 0 and [line.split()[0] for line in text.splitlines()] == list(list_files("mixture"))


def test_llava_of_transformers_counts_and_shows_too(files, tmp_path):
    model, output = save_tiny_llava(tmp_path / "llava"), tmp_path / "out"
    options = ["--model", model, "--max-length", 100, "--num-proc", 2]
    code, _ = run("build", "--llava-json", files / "one.json", "--image-root", files, "-o", output, *options)
    assert code == 0
    assert run("show", output, "--out", tmp_path / "page.html", "--model", model)[0] == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    lengths = [int(number) for number in re.findall(r">(\d+) tokens, \d+ of them", page.source)]
    assert "4 image tokens" in page.text and len(lengths) == 2
    code, text = run("check", output, "--model", model, "--max-length", max(lengths))
    assert code == 0
    code, text = run("check", output, "--model", model, "--max-length", max(lengths) - 1)
    assert code == 1 and f"has {max(lengths)} tokens" in text


def test_tokens_are_counted_at_the_size_of_the_training(files, checkpoint, tmp_path):
    output, options = tmp_path / "out", ["--model", checkpoint, "--max-length", 500, "--image-size", 1536]
    build = ["build", "--llava-json", files / "one.json", "--image-root", files, "-o"]
    code, text = run(*build, tmp_path / "long", *options)
    assert code == 3 and "row too long" in text and "1 images included; at most 500" in text
    code, text = run(*build, tmp_path / "long", *options[:4], "--image-size", 128)
    assert code == 3 and "unfinished build with other settings (image_processor)" in text
    assert run(*build, output)[0] == 0
    assert run("check", output, *options[:4])[0] == 0
    code, text = run("check", output, *options)
    assert code == 1 and "row too long" in text
    code, text = run("check", output, "--image-size", 256)
    assert code == 3 and "--image-size 256 needs --model" in text
    code, text = run("check", output, *options[:4], "--image-size", 250)
    assert code == 3 and "image_size=250; expected a multiple of 64" in text


def test_rows_with_texts_for_contents_are_checked_and_drawn(tmp_path):
    """Such rows TRL takes as well; their images go before the first question."""
    save_rows(tmp_path / "rows", 10)
    assert run("check", tmp_path / "rows")[0] == 0
    drawn = read_rows(tmp_path / "rows", 4, seed=1)
    assert drawn == read_rows(tmp_path / "rows", 4, seed=1) != read_rows(tmp_path / "rows", 4, seed=2)
    assert [number for _, number, _ in read_rows(tmp_path / "rows", 99)] == list(range(10))
    kinds = [[part["type"] for part in row["messages"][0]["content"]] for _, _, row in read_rows(tmp_path / "rows", 99)]
    assert kinds == [["image", "text"]] * 4 + [["text"]] + [["image", "text"]] * 4 + [["text"]]


def test_tokens_that_share_a_character_stay_together(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("a 😀b")["input_ids"]
    assert list(split_tokens(ids, 0, len(ids), tokenizer)) == ["a", " ", "😀", "b"]


def test_the_example_runs(files, checkpoint, tmp_path):
    script = Path(__file__).parents[2] / "examples" / "build_dataset.py"
    arguments = [
        "--llava-json",
        files / "bad.json",
        "--image-root",
        files,
        "--output",
        tmp_path / "d",
        "--model",
        checkpoint,
    ]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3 read, 1 skipped, 2 written" in done.stdout and "num_rows: 2" in done.stdout
    assert "carries loss" in (tmp_path / "d.html").read_text()


class Page(HTMLParser):
    """What a browser would show of a page, after its legend: text, by class of the span that it stands in."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.texts, self.text, self.links, self.images, self.open = source, {}, "", [], 0, []
        self.feed(source[source.index("<h2>") :])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "span":
            self.open.append(attributes["class"])
        self.images += tag == "img"
        for name in ("src", "href"):
            if not attributes.get(name, "data:").startswith("data:"):
                self.links.append(attributes[name])

    def handle_endtag(self, tag):
        if tag == "span":
            self.open.pop()

    def handle_data(self, text):
        self.text += text
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + text
