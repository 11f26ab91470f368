"""Mutated JSON and images: a row is written or named, a file is read or refused in one line, and nothing else happens.

Every run draws the same inputs. The default run is small; the long one is marked `slow`.
"""

import io
import json
import random
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from convllava_hf.data.build import build_dataset
from convllava_hf.data.check import check_dataset
from convllava_hf.data.holdout import plan_holdout
from convllava_hf.data.rows import iterate_json
from convllava_hf.data.sources import Source
from convllava_hf.images import decode_image


RUNS = [pytest.param(150, id="short"), pytest.param(20_000, id="long", marks=pytest.mark.slow)]  # slow: minutes
GOOD = {
    "id": 1,
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}],
}
# What stands in for a value of a row.
STRANGERS = (
    *(None, True, -1, 1e308, [], {}, "", "<image>" * 3, "\ud83d", "\0", "../a.png", "/dev/zero", ".", "x" * 5000),
    *(["a.png"] * 3, {"from": "gpt"}, [[["a.png"]]], "a.png\n", "http://localhost/a.png", "~/a.png"),
)
TOKENS = (b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"\xff", b"\0", b"9" * 5000, b"[" * 3000, b"NaN", b"\\ud800")


def mutate_bytes(content: bytes, rng: random.Random, tokens: tuple[bytes, ...]) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            content[place:place] = rng.choice(tokens)
        elif kind == 1:
            del content[place : place + rng.randint(1, 40)]
        elif kind == 2 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        else:
            content = content[: max(place, 1)]
    return bytes(content)


def mutate_row(rng: random.Random) -> dict:
    row = json.loads(json.dumps(GOOD))
    for _ in range(rng.randint(0, 2)):
        holder = rng.choice([row, *row["conversations"]] if isinstance(row.get("conversations"), list) else [row])
        if isinstance(holder, dict) and holder:
            holder[rng.choice(list(holder))] = rng.choice(STRANGERS)
    return row


def draw_images() -> list[bytes]:
    picture, found = Image.linear_gradient("L").resize((24, 16)), []
    for kind, mode in (("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("GIF", "P"), ("WEBP", "RGB")):
        file, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6
        image = picture.convert("RGB").convert(mode) if mode != "I;16" else picture.convert("I;16")
        image.save(file, kind, **({"exif": exif} if kind in ("JPEG", "WEBP") else {}))
        found.append(file.getvalue())
    return found


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (9, 7)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize("count", RUNS)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, root, count):
    rng = random.Random(0)
    files = [json.dumps([GOOD] * 3, indent=1).encode(), "\n".join([json.dumps(GOOD)] * 3).encode()]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(count):
        (tmp_path / "x.json").write_bytes(mutate_bytes(rng.choice(files), rng, TOKENS))
        try:
            rows = list(iterate_json(tmp_path / "x.json"))
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / 'x.json'}") and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        assert all(1 <= row.line <= 100 for row in rows)
        try:
            plan_holdout([Source(tmp_path / "x.json", root)], 1)
        except ValueError as error:
            assert "hold out fewer" in str(error)
        outcomes["read"] += 1
    assert min(outcomes.values()) > count // 20  # both happen


@pytest.mark.parametrize("count", RUNS)
def test_every_mutated_row_is_written_or_named(tmp_path, root, count):
    rng = random.Random(1)
    rows = [mutate_row(rng) for _ in range(count)]
    lines = [json.dumps(row) for row in rows]
    for _ in range(count // 30):
        lines[rng.randrange(count)] = rng.choice(
            ['{"a": ' + "[" * 5000 + "]" * 5000 + "}", '{"id": ' + "1" * 5000 + "}"]
        )
    (tmp_path / "x.jsonl").write_text("\n".join(['{"id": 0}', *lines]))
    source = Source(tmp_path / "x.jsonl", root)
    report = build_dataset([source], tmp_path / "out", on_error="skip", show_progress=False, holdout=5)
    totals = report.totals
    assert totals["read"] == count + 1
    assert totals["read"] - totals["skipped"] - totals.get("shares_image", 0) == totals["written"] + totals["held_out"]
    assert totals["written"] and len(report.bad_rows) == totals["skipped"] > count // 10
    assert all(bad["line"] == bad["row"] + 1 and "\n" not in bad["error"] for bad in report.bad_rows)
    built = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert sum(map(len, built.values())) == totals["written"] + totals["held_out"]
    assert not check_dataset(tmp_path / "out").bad_rows


@pytest.mark.parametrize("count", RUNS)
def test_mutated_images_are_rgb_or_named(tmp_path, root, count):
    """What the build takes, training opens."""
    rng = random.Random(2)
    images = draw_images()
    rows = []
    for number in range(count):
        name = f"{number}.img"
        (root / name).write_bytes(
            mutate_bytes(rng.choice(images), rng, (b"\xff\xd8", b"\0" * 40, b"IHDR", b"Exif\0\0"))
        )
        rows.append({**GOOD, "id": number, "image": name})
    (tmp_path / "x.json").write_text(json.dumps(rows))
    source = Source(tmp_path / "x.json", root)
    report = build_dataset([source], tmp_path / "out", on_error="skip", images="paths", show_progress=False)
    bad = {entry["row"] for entry in report.bad_rows}
    assert {entry["kind"] for entry in report.bad_rows} == {"undecodable image"} and 0 < len(bad) < count
    for number in range(count):
        image = {"bytes": None, "path": str(root / f"{number}.img")}
        if number in bad:
            with pytest.raises(ValueError):
                decode_image(image)
        else:
            assert decode_image(image).mode == "RGB"
