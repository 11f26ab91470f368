"""The README does what it says: snippets run, commands parse, files and targets exist, links point somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    shlex.split(line, comments=True)
    for language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.fixture
def quickstart_folder(converted, tmp_path, monkeypatch):
    """What `make quickstart` leaves, as far as the README uses it, with the tiny reference model in it."""
    (tmp_path / "quickstart" / "samples").mkdir(parents=True)
    (tmp_path / "quickstart" / "checkpoint").symlink_to(converted)
    Image.new("RGB", (128, 96), "white").save(tmp_path / "quickstart" / "samples" / "page.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, quickstart_folder, capsys):
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) == 2 and len(COMMANDS) >= 7


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "convllava"], ids=lambda c: c[1])
def test_convllava_commands_parse(command):
    from typer.main import get_command

    from convllava_hf.cli.app import app

    group = get_command(app)
    subcommand = group.commands[command[1]]
    subcommand.make_context(command[1], command[2:], parent=group.make_context("convllava", ["ask"]))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=lambda c: c[1])
def test_make_targets_exist(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures
    for path in pictures:
        assert (ROOT / path).stat().st_size < 150_000, path
        with Image.open(ROOT / path) as picture:
            picture.verify()


def test_extras_and_files_exist():
    setup = (ROOT / "setup.cfg").read_text()
    for extra in re.findall(r"\.\[([\w,-]+)\]", README):
        assert re.search(rf"^{extra} =", setup, flags=re.MULTILINE), extra
    for path in re.findall(r"`((?:examples|benchmarks|tests)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
