"""The page: what it shows, what it keeps apart, and the page itself in a real headless browser."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from convllava_hf.inference.answer import answer


gradio = pytest.importorskip("gradio")


@pytest.fixture
def model(server):
    from convllava_hf.serving.demo import Model

    return Model("tiny", server.backend)


def test_boxes_are_drawn_where_an_answer_has_them():
    from convllava_hf.serving.picture import draw_boxes

    blank = Image.new("RGB", (200, 100), "white")
    drawn = draw_boxes(blank, "It is at [0.25, 0.5, 0.75, 1.0].")
    assert drawn.getpixel((50, 70)) != (255, 255, 255) and drawn.getpixel((100, 75)) == (255, 255, 255)
    for text in ("No box.", "[1, 2, 3, 4]", "[0.5, 0.5, 0.1, 0.9]", "[0.1.2, 0, 1, 1]"):
        assert draw_boxes(blank, text) is None


def test_the_cost_of_an_image_and_its_cells(model, pictures, tmp_path):
    from convllava_hf.serving.demo import describe_image

    pictures[0].save(tmp_path / "a.png")
    seen, cost = describe_image(model, str(tmp_path / "a.png"), None)
    processor = model.backend.engine.processor
    inputs = processor(images=[pictures[0]], text="<image>")
    tokens = inputs["input_ids"][0].count(processor.image_token_id)
    assert f"**{tokens} tokens**" in cost and "TFLOP" in cost
    assert seen.size == inputs["pixel_values"][0].shape[:0:-1]
    assert "**1 tokens**" in describe_image(model, str(tmp_path / "a.png"), 1)[1]


def test_operations_of_the_tower_are_those_that_it_runs(server):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from convllava_hf.serving.picture import count_operations

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        server.model.model.vision_tower(torch.zeros(1, 3, 128, 128))
    assert count_operations(server.model, 128, 128, 4)[0] * 1e12 == pytest.approx(counter.get_total_flops())


def test_bad_files_get_a_message(tmp_path):
    from convllava_hf.serving.demo import read_images

    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(gradio.Error, match=r"bad\.png: "):
        read_images([str(tmp_path / "bad.png")])


def test_nothing_of_a_conversation_is_kept_by_the_page(model):
    """What visitors say lives in gr.State, of which every visitor has a copy; the builders keep no list of it."""
    from convllava_hf.serving.demo import build_page

    page = build_page([model, model])
    states = [block for block in page.blocks.values() if isinstance(block, gradio.State)]
    assert len(states) == 2 and all(state.value == [] for state in states)
    assert not any(block.elem_id and "shared" in block.elem_id for block in page.blocks.values())


@pytest.fixture(scope="module")
def browser():
    """Debian's or Google's Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_a_visitor_uploads_asks_and_reads(browser, model, server, pictures, tmp_path, name, width, height, request):
    """Screenshots go to CONVLLAVA_SCREENSHOTS, where it is set."""
    from convllava_hf.serving.demo import build_page, launch_page

    pictures[0].save(tmp_path / "photo.png")
    page_server = build_page([model])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch_page(page_server, "127.0.0.1", port, block=False)
    request.addfinalizer(page_server.close)
    expected = answer(server.model, server.processor, "What is this?", [pictures[0]], max_new_tokens=64)

    visitor = browser.new_page(viewport={"width": width, "height": height})
    visitor.set_default_timeout(120_000)
    visitor.goto(page_server.local_url)
    visitor.locator("#question input[type=file]").set_input_files(str(tmp_path / "photo.png"))
    visitor.locator("#cost").get_by_text("TFLOP").wait_for()
    visitor.locator("#question textarea").fill("What is this?")
    visitor.locator("#question textarea").press("Enter")
    answered = visitor.locator("#chat0 .bot.message, #chat0 .message.bot").first
    answered.wait_for()
    visitor.wait_for_function("() => !document.querySelector('#chat0 .generating, #chat0 .pending')")
    first_words = expected.split()[0]
    visitor.wait_for_function("words => document.querySelector('#chat0').innerText.includes(words)", arg=first_words)
    visitor.wait_for_timeout(1000)
    folder = Path(os.environ.get("CONVLLAVA_SCREENSHOTS", tmp_path))
    visitor.screenshot(path=folder / f"{name}.png", full_page=True)
    assert visitor.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"

    stranger = browser.new_page()
    stranger.set_default_timeout(120_000)
    stranger.goto(page_server.local_url)
    stranger.locator("#question textarea").wait_for()
    assert "What is this?" not in stranger.locator("#chat0").inner_text()
