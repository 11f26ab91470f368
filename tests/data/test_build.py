"""LLaVA-format JSON to datasets: every row is either there or named, whatever happens in between."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image
from tiny_data import make_png
from transformers import AutoProcessor

from convllava_hf.data import build as building
from convllava_hf.data import rows as llava_rows
from convllava_hf.data.build import build_dataset
from convllava_hf.data.check import check_dataset
from convllava_hf.data.pictures import find_image
from convllava_hf.data.rows import (
    BadRow,
    check_messages,
    convert_row,
    iterate_json,
    split_content,
)
from convllava_hf.data.sources import Source, read_mixture
from convllava_hf.shipped import list_files, read_chat_template
from convllava_hf.tokens import tokenize_row


def talk(*values: str, image=None, **more) -> dict:
    """A row in LLaVA's form: questions and answers in turn."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "x", **({} if image is None else {"image": image}), "conversations": turns, **more}


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of images: whole ones of three formats, and broken ones."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(make_png(40, 30, 0))
    (folder / "sub" / "b.png").write_bytes(make_png(30, 60, 1))
    file = io.BytesIO()
    Image.open(folder / "a.png").save(file, "JPEG")
    (folder / "c.jpg").write_bytes(file.getvalue())
    (folder / "short.jpg").write_bytes(file.getvalue()[:-200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("<html>404</html>")
    return folder


def write(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def build(sources, output: Path, **kwargs) -> building.DataReport:
    return build_dataset(sources, output, show_progress=False, **kwargs)


GOOD = [
    talk("<image>\nWhat?", "This.", "And [0.1, 0.25, 0.5, 0.75]?", "That.", image="a.png"),
    talk("Why?", "Because."),
    talk("Compare <image> and <image>.", "Same.", image=["sub/b.png", "c.jpg"]),
    talk("Describe.\n<image>", "A box at [12, 20, 30, 40].", image="c.jpg"),
]


# ---- reading JSON


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_rows_are_read_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(llava_rows, "BLOCK", block)
    rows = [talk('ä\\"{]}[', "日本 \U0001f600"), talk("x" * 50, "y"), {}, 12, "a]", None, [1, [2]], 1.5e3]
    forms = [json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), "\ufeff \n" + json.dumps(rows) + "\n\n"]
    for text in forms:
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        assert [json.loads(row.text) for row in iterate_json(tmp_path / "x.json")] == rows
    rows = [row for row in rows if isinstance(row, dict)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert [json.loads(row.text) for row in iterate_json(tmp_path / "x.jsonl")] == rows
    (tmp_path / "x.json").write_text("[ ]")
    assert list(iterate_json(tmp_path / "x.json")) == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[{"a": 1}, {"b": 2}', "after row 1 .line 1.: .*',' or ']'.*ends"),
        ('[{"a": 1},\n {"b": "so', "row 1 .line 2.: .*ends"),
        ('[{"a": 1}, {"b" 2}, {}, {}, {}, {}, {}, {}, {}]', "row 1 .line 1.: .*b. 2.*Expecting ':' delimiter"),
        ('[{"a": 1} {"b": 2}]', "after row 0 .line 1.: .*',' or ']'.*'{'"),
        ('[{"a": 1},]', "row 1 .line 1.: .*']'"),
        ('[{"a": 1}] x', "'x'"),
        ("<html>", "'<html>'"),
        ("", "''"),
        ('{\n"a": 1\n}', "line 1: .*several lines"),
    ],
)
def test_broken_json_is_named(tmp_path, text, error):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"x.json.*{error}"):
        list(iterate_json(tmp_path / "x.json"))


BAD_LINES = [
    (b'{"id": 1 "conversations": []}', "no valid JSON near"),
    (b'{"id": 1, "conversations": [', "no valid JSON near"),
    (b'{"id": "never closed', "Unterminated string"),
    (b"<html>", "no valid JSON near '<html>"),
    (b"\xff", "no"),
    (b'{"id": "\xff", "conversations": []}', "is not UTF-8 near"),
]


@pytest.mark.parametrize("block", [7, 2**20])
@pytest.mark.parametrize("holdout", [0, 1])
def test_a_line_that_is_no_json_is_a_bad_row(tmp_path, monkeypatch, block, holdout):
    monkeypatch.setattr(llava_rows, "BLOCK", block)
    good = json.dumps(talk("What?", "ä"), ensure_ascii=False).encode()
    lines = [good, *(line for bad, _ in BAD_LINES for line in (bad, good)), b'{"id": "cut']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    report = build([(tmp_path / "x.jsonl", None)], tmp_path / "out", on_error="skip", holdout=holdout)
    kept = report.totals["written"] + report.totals["held_out"] + report.totals.get("shares_image", 0)
    assert kept == len(BAD_LINES) + 1
    assert [(bad["row"], bad["line"], bad["kind"]) for bad in report.bad_rows] == [
        (number, number + 1, "malformed row") for number in range(1, len(lines), 2)
    ]
    for bad, error in zip(report.bad_rows, [*(error for _, error in BAD_LINES), "Unterminated string"], strict=True):
        assert error in bad["error"]
        bad["text"].encode()
    with pytest.raises(ValueError, match=r"x.jsonl, row 1 \(line 2\): malformed row: "):
        build([(tmp_path / "x.jsonl", None)], tmp_path / "stopped")


def test_a_list_that_is_no_utf8_names_the_line(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"a": 1},\n {"b":\n "\xff"}, {}]')
    with pytest.raises(ValueError, match=r"x.json, row 1 \(line 3\): .*UTF-8 .*udcff"):
        list(iterate_json(tmp_path / "x.json"))
    (tmp_path / "x.json").write_bytes('[{"a": 1}]'.encode("utf-16"))
    with pytest.raises(ValueError, match="x.json: .*UTF-8"):
        list(iterate_json(tmp_path / "x.json"))


def test_the_working_directory_is_a_root_like_any_other(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    assert find_image("a.png", Path(".")) == root / "a.png"
    with pytest.raises(BadRow, match=r"\.\./a\.png"):
        find_image("../a.png", Path("."))


def test_other_encodings_and_endless_rows_are_refused(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_bytes('[{"a": "ä"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x.json, row 0 \(line 1\): .*UTF-8 .*\\udce4"):
        list(iterate_json(tmp_path / "x.json"))
    monkeypatch.setattr(llava_rows, "LONGEST_ROW", 1000)
    monkeypatch.setattr(llava_rows, "BLOCK", 100)
    (tmp_path / "x.json").write_text('[{"a": 1}, {"b": "' + "x" * 10**6)
    with pytest.raises(ValueError, match="row 1 .line 1.: .*Unterminated string"):
        list(iterate_json(tmp_path / "x.json"))


# ---- rows


@pytest.fixture(scope="module")
def processor(converted):
    return AutoProcessor.from_pretrained(converted)


@pytest.mark.parametrize(
    "value",
    [
        "<image>\nQ",
        "<image>\n<image>\nQ",
        "Q\n<image>",
        "Q <image> R",
        "a<image><image>b",
        "<image>Q",
        "<image>",
        "Q",
        "<image>\n",
        "<image>\n\nQ",
        "<image><image>\nQ",
        "<image>\n<image>Q",
        "",
        " Q ",
    ],
)
def test_kept_images_are_rendered_where_they_were(value, processor):
    messages = [{"role": "user", "content": split_content(value, "keep")}, {"role": "assistant", "content": "A"}]
    assert f"USER: {value} ASSISTANT: A" in processor.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("value", "moved"),
    [
        ("Q\n<image>", "<image>\nQ"),
        ("a <image> b", "<image>\na  b"),
        ("<image>", "<image>"),
        (" Q ", " Q "),
        ("a<image>b<image>", "a<image>b<image>"),
    ],
)
def test_one_image_goes_to_the_front(value, moved):
    assert split_content(value) == split_content(moved, "keep")


@pytest.mark.parametrize(
    ("row", "kind", "error"),
    [
        ({"id": 1}, "malformed row", '`conversations`.*{"id": 1}'),
        (["x"], "malformed row", '`conversations`.*."x".'),
        (talk(), "malformed row", "`conversations`"),
        ({"conversations": [{"from": "human"}]}, "malformed row", "turn 0 .*`from` .*`value`"),
        (talk("<image>", "A", image=3), "malformed row", "image='3'"),
        (talk("Q", "\ud83d"), "malformed row", "turn 1"),
        ({"conversations": [{"from": "bot", "value": "Q"}]}, "unknown role", "'bot' .*turn 0.*human, gpt"),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "unknown role", "'human'.* turn 0.*human, gpt"),
        (talk("Q"), "turn order", "^user;"),
        (talk("Q", "A", "Q"), "turn order", "^user assistant user;"),
        ({"conversations": [{"from": "gpt", "value": "Q"}]}, "turn order", "^assistant;"),
        ({"conversations": [{"from": "human", "value": "Q"}] * 2}, "turn order", "^user user"),
        (talk("Q", " \n"), "empty answer", "message 1"),
        (talk("Q", "A", image="a.png"), "image count", "1 .*<image> .*0"),
        (talk("<image> <image>", "A", image="a.png"), "image count", "1 .*<image> .*2"),
        (talk("<image>", "A"), "image count", "0 .*<image> .*1"),
        (talk("Q", "<image>", image="a.png"), "image count", "<image>.*message 1"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, kind, error):
    with pytest.raises(BadRow, match=re.escape(kind)) as caught:
        messages, names, _ = convert_row(row)
        check_messages(messages, len(names))
    assert caught.value.kind == kind and re.search(error, caught.value.error)


def test_first_turns_of_the_assistant_are_dropped_and_system_messages_stay():
    messages, _, dropped = convert_row(
        {"conversations": [{"from": "gpt", "value": "Hi"}, *talk("Q", "A")["conversations"]]}
    )
    assert dropped and [message["role"] for message in messages] == ["user", "assistant"]
    row = {"conversations": [{"from": "system", "value": "Be brief."}, *talk("Q", "A")["conversations"]]}
    messages, _, dropped = convert_row(row)
    check_messages(messages, 0)
    assert not dropped and messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


# ---- building


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("images", ["bytes", "paths"])
def test_a_dataset_is_built_and_loads(tmp_path, root, images, num_proc):
    first, second = write(tmp_path / "one.json", GOOD), tmp_path / "two.jsonl"
    second.write_text("\n".join(json.dumps(row) for row in GOOD[:2]))
    report = build(
        [(first, root), Source(second, root)], tmp_path / "out", images=images, num_proc=num_proc, shard_rows=3
    )
    assert report.counts["one"] == {"read": 4, "skipped": 0, "written": 4, "images": 4, "text_only": 1} | {
        key: 0 for key in ("repeated", "dropped_first_turns", "held_out") if key in report.counts["one"]
    }
    assert report.totals["written"] == 6 and not report.bad_rows
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    parquet = ["train/one-00000.parquet", "train/one-00001.parquet", "train/two-00000.parquet"]
    assert names == [".convllava-manifest.json", "build_report.json", *parquet]
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out" / "build_report.json").read_text())["totals"] == report.totals

    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert rows.column_names == ["messages", "images", "image_sizes", "id"] and len(rows) == 6
    assert rows["image_sizes"][:] == [[[30, 40]], [], [[60, 30], [30, 40]], [[30, 40]], [[30, 40]], []]
    assert [len(row["images"]) for row in rows] == [1, 0, 2, 1, 1, 0]
    assert rows[2]["images"][0].size == (30, 60) and rows[2]["images"][1].format == "JPEG"
    assert rows[0]["messages"][2]["content"][0]["text"] == "And [0.1, 0.25, 0.5, 0.75]?"
    assert len(load_dataset(str(tmp_path / "out"), data_files="train/two-*.parquet", split="train")) == 2
    streamed = list(load_dataset(str(tmp_path / "out"), split="train", streaming=True))
    assert [row["messages"] for row in streamed] == [row["messages"] for row in rows]
    assert streamed[3]["images"][0].size == (40, 30)

    checked = check_dataset(tmp_path / "out")
    assert not checked.bad_rows and checked.totals["written"] == 6 and checked.totals["images"] == 5
    if images == "paths":
        (root / "a.png").unlink()
        bad = check_dataset(tmp_path / "out").bad_rows
        assert [(Path(b["file"]).name, b["row"], b["parquet"], b["kind"]) for b in bad] == [
            ("train", 0, "one-00000.parquet", "missing image"),
            ("train", 4, "two-00000.parquet", "missing image"),
        ]


BAD = [
    (talk("<image>\nQ", "A", image="gone.png"), "missing image", "images/gone.png does not exist"),
    (talk("<image>\nQ", "A", image="../one.json"), "missing image", "lies outside of"),
    (talk("<image>\nQ", "A", image="/etc/hostname"), "missing image", "lies outside of"),
    (talk("<image>\nQ", "A", image="https://example.com/a.png"), "missing image", "does not exist"),
    (talk("<image>\nQ", "A", image="short.jpg"), "undecodable image", "truncated"),
    (talk("<image>\nQ", "A", image="empty.png"), "undecodable image", "empty.png: this is an empty file"),
    (
        talk("<image>\nQ", "A", image="text.png"),
        "undecodable image",
        "text.png: this is an HTML page; did the download fail?",
    ),
    (talk("Q", ""), "empty answer", "message 1"),
]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_rows_are_named_and_counts_add_up(tmp_path, root, num_proc):
    file = write(tmp_path / "one.json", [*GOOD, *(row for row, _, _ in BAD), *GOOD])
    report = build([(file, root)], tmp_path / "out", on_error="skip", num_proc=num_proc, shard_rows=5)
    assert [(bad["file"], bad["row"], bad["kind"]) for bad in report.bad_rows] == [
        (str(file), row, kind) for row, (_, kind, _) in enumerate(BAD, 4)
    ]
    for bad, (_, _, error) in zip(report.bad_rows, BAD, strict=True):
        assert error in bad["error"]
    totals = report.totals
    assert (totals["read"], totals["skipped"], totals["written"]) == (16, 8, 8)
    assert f"{file}, row 4 (line 1, id 'x'): missing image" in report.summary()
    assert "8 bad rows: 4 missing image, 3 undecodable image, 1 empty answer" in report.summary(2)
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 8


@pytest.mark.parametrize("num_proc", [1, 2])
def test_stops_at_bad_rows_and_goes_on_when_they_are_mended(tmp_path, root, num_proc):
    file = write(tmp_path / "one.json", [*GOOD, talk("<image>\nQ", "A", image="late.png"), GOOD[1]])
    with pytest.raises(ValueError, match=r"one.json, row 4 .line 1, id 'x'.: missing image: .*late.png "):
        build([(file, root)], tmp_path / "out", num_proc=num_proc, shard_rows=2)
    assert not (tmp_path / "out").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("train/*.parquet")}
    assert {path.name for path in done} >= {"one-00000.parquet"} and "one-00002.parquet" not in {
        path.name for path in done
    }
    with pytest.raises(FileExistsError, match=r"out.partial .*\(images\)"):
        build([(file, root)], tmp_path / "out", images="paths", shard_rows=2)

    (root / "late.png").write_bytes(make_png(8, 8, 2))
    report = build([(file, root)], tmp_path / "out", num_proc=num_proc, shard_rows=2)
    assert report.totals["written"] == 6
    assert all((tmp_path / "out" / "train" / path.name).stat().st_mtime_ns == mtime for path, mtime in done.items())
    with pytest.raises(FileExistsError, match=r"out .*--output.*--force"):
        build([(file, root)], tmp_path / "out")
    assert build([(file, root)], tmp_path / "out", force=True, images="paths").totals["written"] == 6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    with pytest.raises(FileExistsError, match=r"mine .*a\.txt"):
        build([(file, root)], tmp_path / "mine", force=True)


@pytest.mark.parametrize("name", [".git/HEAD", "notes.txt", "images/a.png", "train/notes.parquet"])
def test_force_replaces_only_what_a_build_wrote(tmp_path, root, name):
    file, output = write(tmp_path / "one.json", GOOD), tmp_path / "out"
    build([(file, root)], output)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"out .*{re.escape(name)}"):
        build([(file, root)], output, force=True)
    assert (output / name).read_text() == "mine" and (output / "train" / "one-00000.parquet").is_file()
    (output / name).unlink()
    if (output / name).parent not in (output, output / "train"):
        (output / name).parent.rmdir()
    assert build([(file, root)], output, force=True).totals["written"] == 4
    (output / "build_report.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"\(build_report\.json\)"):
        build([(file, root)], output, force=True)


@pytest.mark.parametrize("name", [".git/HEAD", "notes.txt", "train/notes.txt"])
@pytest.mark.parametrize("force", [False, True])
def test_an_unfinished_build_with_other_files_in_it_stays(tmp_path, root, name, force):
    file, work = write(tmp_path / "one.json", [*GOOD, talk("Q", "")]), tmp_path / "out.partial"
    with pytest.raises(ValueError, match="empty answer"):
        build([(file, root)], tmp_path / "out", shard_rows=2)
    (work / name).parent.mkdir(exist_ok=True)
    (work / name).write_text("mine")
    write(file, GOOD)
    with pytest.raises(FileExistsError, match=f"out.partial .*{re.escape(name)}"):
        build([(file, root)], tmp_path / "out", shard_rows=2, force=force)
    assert (work / name).read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_folder_of_someones_dataset_is_no_unfinished_build(tmp_path, root):
    """Files named as on the Hub, without the settings that a build writes first."""
    theirs = tmp_path / "out.partial" / "train" / "train-00000-of-00001.parquet"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(FileExistsError, match="out.partial"):
        build([(write(tmp_path / "one.json", GOOD), root)], tmp_path / "out")
    assert theirs.read_text() == "mine"


def test_what_a_build_left_out_is_not_left_out_by_one_that_stops(tmp_path, root):
    row = talk("<image>\nQ", "A", image="late.png")
    sources = [
        Source(write(tmp_path / "one.json", [*GOOD, row]), root, rows=9)
    ]  # fails at the end, so it is unfinished
    with pytest.raises(ValueError, match=r"one.json .*\b5\b.*\b9\b"):
        build(sources, tmp_path / "out", on_error="skip")
    sources = [replace(sources[0], rows=5)]
    with pytest.raises(ValueError, match="row 4 .*: missing image"):
        build(sources, tmp_path / "out")
    (root / "late.png").write_bytes(make_png(8, 8, 2))
    report = build(sources, tmp_path / "out")
    assert report.totals["written"] == 5 and not report.bad_rows


def test_builds_killed_as_they_begin_or_end_go_on(tmp_path, root, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    file = write(tmp_path / "one.json", GOOD)
    (tmp_path / "out.partial" / ".build").mkdir(parents=True)  # its settings are not there yet
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("convllava_hf.data.build.put_in_place", stop)
        build([(file, root)], tmp_path / "out")
    assert not (tmp_path / "out.partial" / "test").exists(), "an empty split"
    report = build([(file, root)], tmp_path / "out")
    assert report.totals["written"] == len(GOOD)


PROGRAM = """
import sys
sys.argv = ["convllava"]  # so that importing the package does not load torch
from convllava_hf.data.build import build_dataset
build_dataset([(sys.stdin.readline().strip(), sys.stdin.readline().strip())], sys.stdin.readline().strip(),
              num_proc=int(sys.stdin.readline()), shard_rows=10, show_progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_killed_builds_go_on(tmp_path, root):
    (root / "big.png").write_bytes(make_png(400, 400, 3))  # takes some milliseconds to decode, so there is time to kill
    rows = [talk(f"<image>\nQ{i}", f"A{i}", image="big.png") for i in range(400)]
    file, output = write(tmp_path / "one.json", rows), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    process.stdin.write(f"{file}\n{root}\n{output}\n2\n")
    process.stdin.close()
    state = tmp_path / "out.partial" / ".build"
    deadline = time.monotonic() + 60
    while len(list(state.glob("one-*.json"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice
    process.wait()
    deadline = time.monotonic() + 10
    while is_group_alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    assert not output.exists()
    done = {
        path.stem: (state.parent / "train" / f"{path.stem}.parquet").stat().st_mtime_ns
        for path in state.glob("one-*.json")
    }
    assert 4 <= len(done) < 40
    # A shard that lost its end with the power counts as undone.
    broken = state.parent / "train" / f"{min(done)}.parquet"
    broken.write_bytes(broken.read_bytes()[:100])
    del done[min(done)]

    report = build([(file, root)], output, shard_rows=10)
    assert report.totals["read"] == report.totals["written"] == 400
    assert all((output / "train" / f"{name}.parquet").stat().st_mtime_ns == mtime for name, mtime in done.items())
    texts = [
        row["messages"][0]["content"][1]["text"]
        for path in sorted(output.glob("train/*.parquet"))
        for row in pq.read_table(path, columns=["messages"]).to_pylist()
    ]
    assert texts == [f"Q{i}" for i in range(400)]
    assert {path.suffix for path in output.rglob("*.*")} == {".json", ".parquet"} and not list(output.glob(".build"))


def is_group_alive(group: int) -> bool:
    """Whether a process of the group runs; those that ended and wait to be collected do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError):
            continue
        if int(its_group) == group and state not in "ZX":
            return True
    return False


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.3, 1.0, 2.0, 2.5])
def test_weights_are_exact(tmp_path, weight):
    # Names of splits in the names of files must not confuse `load_dataset`.
    file = write(tmp_path / "my_test.json", [talk(f"Q{i}", "A") for i in range(40)])
    report = build([Source(file, weight=weight)], tmp_path / "out", shard_rows=7)
    totals = report.totals
    assert totals["written"] == len(load_dataset(str(tmp_path / "out"), split="train")) == int(40 * weight)
    assert totals["read"] - totals.get("left_out", 0) + totals.get("repeated", 0) == totals["written"]


def test_sources_of_one_name_are_kept_apart(tmp_path):
    for number, folder in enumerate(("a", "b", "c")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.json", [talk(f"Q{number}", "A")])
    names = ["", "x_2", ""]
    sources = [Source(tmp_path / folder / "x.json", name=name) for folder, name in zip("abc", names, strict=True)]
    assert list(build(sources, tmp_path / "out").counts) == ["x", "x_2", "x_3"]
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 3


def test_sources_are_checked_before_anything_starts(tmp_path, root):
    file = write(tmp_path / "one.json", GOOD)
    missing = [
        Source(file, root),
        Source(tmp_path / "two.json", root, origin="https://a"),
        Source(file, tmp_path / "no"),
    ]
    with pytest.raises(FileNotFoundError, match=r"\S*two.json \(from https://a\).* \S*/no\."):
        build(missing, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    for kwargs, error in (
        ({"images": "jpeg"}, "images='jpeg'.*'bytes' .*'paths'"),
        ({"on_error": "ask"}, "on_error='ask'.*'stop' .*'skip'"),
        ({"max_length": 10}, "max_length .*--model"),
    ):
        with pytest.raises(ValueError, match=error):
            build([(file, root)], tmp_path / "out", **kwargs)
    for kwargs, error in (({"weight": 0}, "weight=0 of one"), ({"image_placement": "back"}, "image_placement='back'")):
        with pytest.raises(ValueError, match=error):
            Source(file, **kwargs)


def test_the_number_of_rows_is_checked(tmp_path, root):
    file = write(tmp_path / "one.json", GOOD)
    with pytest.raises(ValueError, match=r"one.json .*\b4\b.*\b5\b"):
        build([Source(file, root, rows=5)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert build([Source(file, root, rows=5, rows_tolerance=0.2)], tmp_path / "out").totals["written"] == 4
    with pytest.raises(ValueError, match="two.json, row 0"):
        build([(write(tmp_path / "two.json", [{}]), root)], tmp_path / "out2", on_error="skip")


def test_damage_of_a_built_dataset_is_found(tmp_path, root):
    build([(write(tmp_path / "one.json", GOOD), root)], tmp_path / "out", shard_rows=2)
    (tmp_path / "out" / "train" / "one-00001.parquet").rename(tmp_path / "one-00001.parquet")
    with pytest.raises(ValueError, match=r"out .*\b2\b.*build_report.json .*\b4\b"):
        check_dataset(tmp_path / "out")
    (tmp_path / "out" / "train" / "one-00001.parquet").write_bytes((tmp_path / "one-00001.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match="one-00001.parquet"):
        check_dataset(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "images")):
        check_dataset(tmp_path / "images")


def test_built_datasets_are_checked_as_rows_are(tmp_path, root):
    """What other tools wrote in the same form: each kind of bad row is found there as well."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    features = Features.from_arrow_schema(building.get_schema())
    features = Features({name: features[name] for name in ("messages", "images")})
    text = lambda role, value: {"role": role, "content": [{"type": "text", "text": value}]}  # noqa: E731
    image = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Q"}]}
    messages = [
        [text("user", "Q"), text("assistant", "A")],
        [text("user", "Q"), text("tool", "A")],
        [text("assistant", "A")],
        [text("user", "Q"), text("assistant", "")],
        [image, text("assistant", "A")],
        [image, text("assistant", "A")],
    ]
    images = [[], [], [], [], [], [{"bytes": b"no image", "path": None}]]
    rows = Dataset.from_dict({"messages": messages, "images": images}, features=features)
    assert isinstance(features["images"].feature, ImageFeature)
    (tmp_path / "out").mkdir()
    rows.to_parquet(tmp_path / "out" / "x.parquet")
    found = [(bad["row"], bad["kind"]) for bad in check_dataset(tmp_path / "out").bad_rows]
    kinds = ["unknown role", "turn order", "empty answer", "image count", "undecodable image"]
    assert found == list(enumerate(kinds, 1))


# ---- long rows


def test_tokens_are_counted_without_reading_images(processor, reference):
    for row in json.loads((reference / "convllava" / "train.json").read_text()):
        messages, names, _ = convert_row(row)
        images = [Image.open(reference / "convllava" / "images" / name) for name in names]
        encoded = encode(messages, images, processor)["input_ids"][0]
        sizes = [(image.height, image.width) for image in images]
        assert tokenize_row(messages, sizes, processor) == encoded.tolist()


def test_long_rows_are_cut_by_rounds_and_never_inside_an_image(tmp_path, root, processor):
    rows = [
        talk("<image>\nWhat?", "This.", "And?", "A long answer. " * 20, image="a.png"),
        talk("What?", "This.", "<image>\nAnd?", "That. " * 40, image="a.png"),
        talk("<image>" * 30, "Many.", image=["a.png"] * 30),
    ]
    file, settings = write(tmp_path / "one.json", rows), {"processor": processor, "max_length": 100}
    report = build([(file, root)], tmp_path / "out", on_error="skip", long_rows="cut", **settings)
    assert report.counts["one"]["cut"] == 2 and report.counts["one"]["images"] == 1
    (bad,) = report.bad_rows
    assert bad["row"] == 2 and bad["kind"] == "row too long"
    assert re.fullmatch(r"its first round has \d+ tokens, 30 images included; at most 100", bad["error"])
    built = load_dataset(str(tmp_path / "out"), split="train")
    assert [len(row["messages"]) for row in built] == [2, 2] and [len(row["images"]) for row in built] == [1, 0]
    assert not check_dataset(tmp_path / "out", **settings).bad_rows
    assert [b["kind"] for b in check_dataset(tmp_path / "out", processor=processor, max_length=20).bad_rows] == [
        "row too long"
    ] * 2
    report = build([(file, root)], tmp_path / "out2", on_error="skip", processor=processor, max_length=170)
    assert [bad["row"] for bad in report.bad_rows] == [0, 1]
    assert re.fullmatch(r"has \d+ tokens, 1 images included; at most 170", report.bad_rows[0]["error"])


# ---- what is trained on


def encode(messages, images, processor, template=None, **kwargs):
    left = iter(images)
    messages = [
        {**m, "content": [p | {"image": next(left)} if p["type"] == "image" else p for p in m["content"]]}
        for m in messages
    ]
    return processor.apply_chat_template(
        [messages],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        **kwargs,
    )


@pytest.mark.parametrize("version", ["v1", "plain"])
def test_labels_equal_the_originals(version, reference, processor, tmp_path):
    """Rows of the built dataset, rendered by the converted checkpoint, against the recorded labels."""
    folder, compared = reference / "convllava", 0
    expected = json.loads((folder / "expected.json").read_text())["train"][version]
    template = read_chat_template("plain") if version == "plain" else None
    for name in ("train.json", "train_extra.json"):
        build([(folder / name, folder / "images")], tmp_path / name)
        built = load_dataset(str(tmp_path / name), split="train")
        originals = json.loads((folder / name).read_text())
        for row, original in zip(built, originals, strict=True):
            recorded = expected[name][original["id"]]
            if "error" in recorded:
                continue
            kwargs = {"original_masks": True} if version == "v1" else {}
            encoded = encode(row["messages"], row["images"], processor, template, **kwargs)
            ids, masks = encoded["input_ids"][0].tolist(), encoded["assistant_masks"][0].tolist()
            pairs = list(zip(recorded["input_ids"], recorded["labels"], strict=True))
            repeats = [4 if token == -200 else 1 for token, _ in pairs]
            image = processor.image_token_id
            assert ids == [
                image if t == -200 else t for (t, _), n in zip(pairs, repeats, strict=True) for _ in range(n)
            ]
            labels = [label for (_, label), n in zip(pairs, repeats, strict=True) for _ in range(n)]
            assert [token if mask else -100 for token, mask in zip(ids, masks, strict=True)] == labels, original["id"]
            compared += 1
    assert compared == {"v1": 9, "plain": 3}[version]


def test_trl_collates_built_rows(reference, processor, tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    folder = reference / "convllava"
    build([(folder / "train.json", folder / "images")], tmp_path / "out")
    rows = list(load_dataset(str(tmp_path / "out"), split="train"))
    collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    batch = collate(rows)
    assert batch["pixel_values"].shape[0] == 2 and (batch["labels"] != -100).any(1).all()
    assert "pixel_values" not in collate(rows[2:])


def test_stock_trl_trains_on_built_rows_and_evaluates_on_what_is_held_out(tmp_path, root):
    """Columns of ours are no obstacle to `SFTTrainer`, with its own settings."""
    from tiny_data import save_tiny_llava
    from transformers import AutoModelForImageTextToText
    from trl import SFTConfig, SFTTrainer

    for number in range(8):
        (root / f"{number}.png").write_bytes(make_png(30, 30, number))
    rows = [talk(f"<image>\nQ{number}", "A", image=f"{number}.png") for number in range(8)]
    folder = save_tiny_llava(tmp_path / "llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    source = (write(tmp_path / "one.json", rows), root)
    build([source], tmp_path / "out", holdout=2, processor=processor)
    data = load_dataset(str(tmp_path / "out"))
    arguments = SFTConfig(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=None,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model, arguments, processing_class=processor, train_dataset=data["train"], eval_dataset=data["test"]
    )
    assert {"image_sizes", "id", "text_tokens"} <= set(data["train"].column_names)
    trainer.train()
    assert [entry["eval_loss"] > 0 for entry in trainer.state.log_history if "eval_loss" in entry] == [True]


def test_trl_mixes_the_sources_of_one_dataset(tmp_path):
    from trl import DatasetMixtureConfig, get_dataset

    files = [write(tmp_path / f"{name}.json", [talk(name, "A")] * 30) for name in ("one", "two")]
    build([(file, None) for file in files], tmp_path / "out")
    entry = {"path": str(tmp_path / "out"), "split": "train"}
    mixture = [
        {**entry, "data_files": "train/one-*.parquet", "fraction": 0.75},
        {**entry, "data_files": "train/two-*.parquet", "fraction": 0.25},
    ]
    rows = get_dataset(DatasetMixtureConfig(datasets=mixture))["train"]
    texts = [row["messages"][0]["content"][0]["text"] for row in rows]
    assert (texts.count("one"), texts.count("two")) == (30, 10)


# ---- mixtures


def test_every_mixture_is_read_and_names_what_is_missing(tmp_path):
    assert len(list_files("mixture")) == 14
    for name in list_files("mixture"):
        sources = read_mixture(name, tmp_path)
        assert all(source.rows and source.origin.startswith("https://") for source in sources)
        with pytest.raises(FileNotFoundError) as caught:
            build(sources, tmp_path / "out")
        assert all(f"{source.json} (from {source.origin})" in str(caught.value) for source in sources)
    assert not list(tmp_path.iterdir())
    assert {source.image_placement for source in read_mixture("llavar_pretrain")} == {"keep"}


def test_the_docs_tell_of_every_mixture_and_number():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in list_files("mixture"):
        assert f"`{name}`" in text
        for source in read_mixture(name):
            (line,) = [
                line for line in text.split("| source | file |")[1].splitlines() if f"`{source.json.name}`" in line
            ]
            assert f" {source.rows:,} " in line and (f"{source.rows_tolerance:.0%}" in line) == (
                source.rows_tolerance > 0
            )


def test_recipes_name_mixtures_that_exist():
    named = {
        name for file in list_files("recipe").values() for name in re.findall(r"mixture (\w+_\w+)", file.read_text())
    }
    assert named and named <= set(list_files("mixture"))


def test_mixtures_of_ones_own(tmp_path, root):
    write(tmp_path / "one.json", GOOD)
    write(tmp_path / "two.json", GOOD[1:2])
    file = tmp_path / "mine.yaml"
    file.write_text(
        "sources:\n- {json: one.json, image_root: images, weight: 0.5}\n- {json: two.json, name: text, rows: 1}\n"
    )
    report = build(read_mixture(file), tmp_path / "out")
    assert {name: counts["written"] for name, counts in report.counts.items()} == {"one": 2, "text": 1}
    assert len(load_dataset(str(tmp_path / "out"), data_files="train/text-*.parquet", split="train")) == 1
    for text, error in (
        ("sources: [{josn: x}]", "source 0: .*josn.*json"),
        ("- a", file.name),
        ("sources: {", file.name),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=error):
            read_mixture(file)
    with pytest.raises(FileNotFoundError, match="'x'.*convllava_stage1"):
        read_mixture("x")


@pytest.mark.parametrize("name", ["llavar_pretrain", "llavar_finetune", "llavar_finetune_20k", "llava_v0_pretrain"])
def test_llavar_and_llava_v0_files_keep_their_images_in_place(name, tmp_path):
    """Their file names and folders, with images before and after the question, as in the released files."""
    (source,) = read_mixture(name, tmp_path)
    source.image_root.mkdir(parents=True)
    image = "GCC_train_002582585.jpg" if "pretrain" in name else "000000215677.jpg"
    Image.new("RGB", (20, 10)).save(source.image_root / image)
    write(
        source.json,
        [
            talk("Give a brief description.\n<image>", "A box.", image=image),
            talk("<image>\nRead.", "OPEN", image=image),
        ],
    )
    with pytest.raises(ValueError, match=rf"\b2\b.*\b{source.rows:,}"):
        build([source], tmp_path / "out")
    build([replace(source, rows=2)], tmp_path / "out")
    first, second = load_dataset(str(tmp_path / "out"), split="train")["messages"]
    assert [part["type"] for part in first[0]["content"]] == ["text", "image"]
    assert [part["type"] for part in second[0]["content"]] == ["image", "text"]


# ---- mending rows


def test_rows_that_were_edited_are_made_anew_and_the_others_stay(tmp_path, root):
    rows = [talk(f"Q{i}", "A", image=None) for i in range(10)]
    broken = [*rows[:7], talk("Q", ""), *rows[8:]]
    file = tmp_path / "one.json"
    file.write_text(json.dumps(broken, indent=1))
    with pytest.raises(ValueError, match=r"one.json, row 7 .line \d+, id 'x'.: empty answer"):
        build([(file, root)], tmp_path / "out", shard_rows=2)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "train").glob("*.parquet")}
    assert len(done) == 3
    file.write_text("\n" + json.dumps([*rows[:2], talk("edited", "A"), *rows[3:]], indent=1))  # other lines, too
    report = build([(file, root)], tmp_path / "out", shard_rows=2)
    assert report.resumed == {"kept": 2, "redone": 1} and "2 shards stayed, 1 were made anew" in report.summary()
    texts = [row[0]["content"][0]["text"] for row in load_dataset(str(tmp_path / "out"), split="train")["messages"]]
    assert texts == ["Q0", "Q1", "edited", *(f"Q{i}" for i in range(3, 10))]
    same = [name for name in done if (tmp_path / "out/train" / name).stat().st_mtime_ns == done[name]]
    assert sorted(same) == ["one-00000.parquet", "one-00002.parquet"]


def test_shards_of_rows_that_are_no_more_are_removed(tmp_path):
    file = write(tmp_path / "one.json", [talk(f"Q{i}", "A") for i in range(6)])
    with pytest.raises(ValueError, match=r"one.json .*\b9\b"):
        build([Source(file, rows=9)], tmp_path / "out", shard_rows=2)
    write(file, [talk("Q0", "A")])
    assert build([Source(file, rows=1)], tmp_path / "out", shard_rows=2).totals["written"] == 1
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 1


def test_lines_are_those_of_an_editor(tmp_path, root):
    rows = [talk("Q", "A", id="a"), talk("Q", "", id="b"), talk("Q", "A", id="c"), {"id": 4}]
    file = tmp_path / "one.json"
    file.write_text("\n" + json.dumps(rows, indent=2))
    bad_rows = build([(file, root)], tmp_path / "out", on_error="skip").bad_rows
    lines = file.read_text().splitlines()
    assert [(bad["row"], bad["id"]) for bad in bad_rows] == [(1, "b"), (3, "4")]
    for bad, name in zip(bad_rows, ('"b"', "4"), strict=True):
        assert lines[bad["line"] - 1].strip() == "{" and lines[bad["line"]].strip(" ,") == f'"id": {name}'
        assert json.loads(bad["text"])["id"] == json.loads(name)


# ---- every exception of a row is the row's


def test_no_row_stops_the_others(tmp_path, root):
    deep = "[" * 20000 + "]" * 20000
    lines = [
        json.dumps(GOOD[0]),
        '{"id": "deep", "conversations": ' + deep + "}",
        '{"id": ' + "9" * 5000 + "}",
        json.dumps(talk("<image>", "A", image="\udcff.png")),
        json.dumps(talk("<image>", "A", image="a\0.png")),
        json.dumps(talk("<image>", "A", image="x" * 5000)),
        json.dumps(GOOD[1]),
    ]
    (root / os.fsdecode(b"\xff.png")).write_bytes(make_png(4, 4, 0))
    for name, text in (("one.json", f"[{','.join(lines)}]"), ("two.jsonl", "\n".join(['{"a": 1}', *lines]))):
        (tmp_path / name).write_text(text)
        report = build([(tmp_path / name, root)], tmp_path / name.split(".")[0], on_error="skip", num_proc=2)
        first = name == "two.jsonl"
        assert [bad["row"] - first for bad in report.bad_rows][first:] == [1, 2, 3, 4, 5]
        assert report.totals["written"] == 2
        assert "this name is not UTF-8" in report.summary()


def test_an_image_that_the_model_refuses_is_the_rows_fault(tmp_path, root, processor):
    from copy import deepcopy

    processor = deepcopy(processor)
    processor.image_processor.image_aspect_ratio = "native"
    Image.new("RGB", (3000, 10)).save(root / "line.png")
    rows = [GOOD[1], talk("<image>\nQ", "A", image="line.png")]
    report = build([(write(tmp_path / "one.json", rows), root)], tmp_path / "out", on_error="skip", processor=processor)
    assert [bad["row"] for bad in report.bad_rows] == [1] and "200" in report.bad_rows[0]["error"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"\0" * 300, "nothing but zeros"),
        (b"<svg xmlns=''/>", "an SVG drawing"),
        (b'{"error": 404}', "JSON; did the download fail"),
        (b"\0\0\0\x18ftypisom", "a video"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, what):
    from convllava_hf.data.pictures import check_image

    (tmp_path / "x.jpg").write_bytes(content)
    for image in ({"bytes": content, "path": "x.jpg"}, {"bytes": None, "path": str(tmp_path / "x.jpg")}):
        with pytest.raises(BadRow, match=f"x.jpg: this is {what}") as caught:
            check_image(image, "x.jpg")
        assert caught.value.kind == "undecodable image"


def test_links_that_lead_out_of_the_root_need_a_flag(tmp_path, root):
    (tmp_path / "private.png").write_bytes(make_png(8, 8, 0))
    (root / "out.png").symlink_to(tmp_path / "private.png")
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "folder").symlink_to(tmp_path)
    names = ("out.png", "inside.png", "folder/private.png")
    file = write(tmp_path / "one.json", [talk("<image>", "A", image=name) for name in names])
    report = build([(file, root)], tmp_path / "out", on_error="skip")
    assert [bad["row"] for bad in report.bad_rows] == [0, 2]
    assert "by a symbolic link to" in report.bad_rows[0]["error"] and "--follow-links" in report.bad_rows[0]["error"]
    assert build([(file, root)], tmp_path / "out2", follow_links=True).totals["written"] == 3
    (tmp_path / "linked").symlink_to(root)
    assert build([(file, tmp_path / "linked")], tmp_path / "out3", follow_links=True).totals["written"] == 3
    assert find_image("a.png", tmp_path / "linked")  # the root itself may be a link


def test_images_are_opened_as_training_opens_them(tmp_path, root):
    """What training cannot open, the build and the check name; and what they pass, training opens."""
    from convllava_hf.images import decode_image

    file = io.BytesIO()
    Image.open(root / "a.png").save(
        file, "JPEG", exif=b"Exif\0\0" + b"II*\0\x08\0\0\0\x01\0\x12\x01\xff\xff\x01\0\0\0\xff\xff\xff\xff"
    )
    content = file.getvalue()
    (root / "tag.jpg").write_bytes(content)
    try:
        decode_image({"bytes": content, "path": None})
        opens = True
    except ValueError:
        opens = False
    rows = [talk("<image>", "A", image="tag.jpg"), GOOD[1]]
    report = build([(write(tmp_path / "one.json", rows), root)], tmp_path / "out", on_error="skip")
    assert len(report.bad_rows) == (not opens)


def test_sizes_are_those_of_upright_images(tmp_path, root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(root / "turned.jpg", exif=exif)
    file = write(tmp_path / "one.json", [talk("<image>", "A", image="turned.jpg")])
    build([(file, root)], tmp_path / "out")
    (row,) = load_dataset(str(tmp_path / "out"), split="train")
    assert row["image_sizes"] == [[40, 30]] and row["images"][0].size == (30, 40)


# ---- columns and lengths


def test_a_checkpoint_gives_lengths_and_percentiles(tmp_path, root, processor):
    file = write(tmp_path / "one.json", [*GOOD, talk("Q", "A " * 200)])
    report = build([(file, root)], tmp_path / "out", processor=processor)
    rows = load_dataset(str(tmp_path / "out"), split="train")
    lengths = []
    for row in rows:
        sizes = [tuple(size) for size in row["image_sizes"]]
        ids = tokenize_row(row["messages"], sizes, processor)
        assert row["text_tokens"] == len(ids) - ids.count(processor.image_token_id)
        lengths.append(len(ids))
    assert report.percentiles == {
        "50%": sorted(lengths)[2],
        "90%": max(lengths),
        "99%": max(lengths),
        "100%": max(lengths),
    }
    assert json.loads((tmp_path / "out/build_report.json").read_text())["lengths"] == report.percentiles
    assert f"100% up to {max(lengths):,}" in report.summary()
    assert check_dataset(tmp_path / "out", processor=processor).percentiles == report.percentiles


# ---- holding out


@pytest.mark.parametrize("num_proc", [1, 2])
def test_held_out_images_are_in_no_other_split(tmp_path, root, num_proc):
    for number in range(60):
        (root / f"{number}.png").write_bytes(make_png(4, 4, number))
    rows = []
    for number in range(200):
        images = [f"{number * 7 % 60}.png"] * (number % 4 > 0) + [f"{number * 11 % 60}.png"] * (number % 9 == 1)
        rows.append(talk("<image>" * len(images) + f"Q{number}", "A", image=images, id=number))
    sources = [Source(write(tmp_path / "one.json", rows), root, weight=2)]
    report = build(sources, tmp_path / "out", holdout=30, num_proc=num_proc, shard_rows=30)
    data = load_dataset(str(tmp_path / "out"))
    assert list(data) == ["train", "test"]
    names = {split: {image["path"] for row in load_raw(data[split]) for image in row["images"]} for split in data}
    assert names["train"] and names["test"] and not names["train"] & names["test"]
    totals = report.totals
    assert 30 <= totals["held_out"] == len(data["test"]) < 40 and len(set(data["test"]["id"])) == len(data["test"])
    assert totals["written"] == len(data["train"]) == 2 * (200 - totals["held_out"] - totals.get("shares_image", 0))
    assert any(not row["images"] for row in load_raw(data["test"]))  # text-only rows are drawn as well
    assert check_dataset(tmp_path / "out").totals["read"] == totals["written"] + totals["held_out"]
    again = build(sources, tmp_path / "again", holdout=30, shard_rows=50)
    assert again.totals["held_out"] == totals["held_out"]
    assert load_dataset(str(tmp_path / "again"), split="test")["id"][:] == data["test"]["id"][:]
    with pytest.raises(ValueError, match="holdout=200, .*200"):
        build(sources, tmp_path / "all", holdout=200)


def load_raw(dataset):
    from convllava_hf.images import undecode_images

    return undecode_images(dataset)


def test_stage_two_holds_allavas_instructions_as_its_card_counts():
    sources = {source.name: source.rows for source in read_mixture("convllava_stage2")}
    assert round(sum(rows for name, rows in sources.items() if name.startswith("allava")) / 1e6, 1) == 1.4
    assert sources["vision_flan"] // 1000 == 186
    captions = {source.name for source in read_mixture("convllava_stage1")}
    assert captions < set(sources) and not any("instruct" in name for name in captions)
