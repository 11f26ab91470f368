"""The pages of docs/: they build as a site without a broken link, and their pictures are what the script draws."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def list_pages(entries: list) -> list[str]:
    pages = []
    for entry in entries:
        (target,) = entry.values()
        pages += list_pages(target) if isinstance(target, list) else [target]
    return pages


def test_pictures_are_those_of_the_script():
    drawn = load("draw_pictures").PICTURES
    assert {path.name for path in (DOCS / "pictures").iterdir()} == set(drawn)
    for name, draw in drawn.items():
        assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == draw(), "run python docs/draw_pictures.py"


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    there = {path.name for path in DOCS.glob("*.md")}
    assert there <= set(list_pages(nav))
    kept = list_pages(load("site").keep_pages(nav, DOCS))
    assert set(kept) == there and len(kept) == len(there)


def test_links_that_leave_the_pages_become_names():
    assert load("site").on_page_markdown("[cards](../model_cards) [data](data.md)") == "`model_cards` [data](data.md)"


def find_broken_links(page: Path) -> list[str]:
    """Links of a page to files and headings that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        text = file.read_text(encoding="utf-8") if file.suffix == ".md" and file.exists() else ""
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if not file.exists() or (anchor and anchor not in anchors):
            broken.append(target)
    return broken


def test_links_lead_somewhere(tmp_path):
    """Without mkdocs, so that every run checks it."""
    pages = [*DOCS.glob("*.md"), *ROOT.glob("*.md")]
    assert len(pages) >= 20
    assert {page.name: broken for page in pages if (broken := find_broken_links(page))} == {}
    (tmp_path / "page.md").write_text("# A `b`\n[good](#a-b) [bad](#c) [gone](gone.md) [far](https://example.com)")
    assert find_broken_links(tmp_path / "page.md") == ["#c", "gone.md"]


def test_commands_of_the_pages_parse():
    from typer.main import get_command

    from convllava_hf.cli.app import app

    group, count = get_command(app), 0
    parent = group.make_context("convllava", ["ask"])
    for page in sorted(DOCS.glob("*.md")):
        text = "".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["convllava"] or "..." in words or "--install-completion" in words:
                continue
            command, _ = group.commands[words[1]], words.pop(0)
            if words[0] == "data":
                command, _ = command.commands[words[1]], words.pop(0)
            command.make_context(words[0], words[1:], parent=parent)  # raises, or ends the process, where it is wrong
            count += 1
    assert count >= 60


def test_exit_codes_are_the_commands_own():
    from convllava_hf.cli import options

    text = (DOCS / "command_line.md").read_text()
    codes = (options.EXIT_FAILED, options.EXIT_USAGE, options.EXIT_BAD_INPUT, options.EXIT_INTERRUPTED)
    assert codes == (1, 2, 3, 130) and all(f"\n| {code} | " in text for code in codes)


def test_the_templates_of_the_table_are_those_of_init():
    from convllava_hf.conversion.init import CHAT_TEMPLATES

    text = (DOCS / "build_your_own.md").read_text()
    assert all(f"| `{template}` |" in text for template, _, _ in CHAT_TEMPLATES)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch):
    """Half a minute each: a kernel imports everything, one of them trains."""
    nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra `docs`")
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    """Ten seconds: mkdocs reads all sources for the reference."""
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "init_model" in reference and "language model of transformers" in reference
    assert "tokens.svg" in (tmp_path / "site" / "concepts" / "index.html").read_text()
