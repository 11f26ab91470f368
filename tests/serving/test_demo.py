"""The page: what it shows, what it keeps apart, and the page itself in a real headless browser."""

import os
import shutil
import socket
import time
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
    assert f"**{tokens} tokens**" in cost and "MFLOP" in cost
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


def test_operations_are_named_in_units_that_people_read():
    from convllava_hf.serving.picture import name_operations

    assert [name_operations(tera) for tera in (12.23, 3.78, 0.02, 3.43e-6)] == [
        "12.2 TFLOP",
        "3.78 TFLOP",
        "20 GFLOP",
        "3.43 MFLOP",
    ]


def test_nothing_of_a_conversation_is_kept_by_the_page(model):
    """What visitors say lives in gr.State, of which every visitor has a copy; the builders keep no list of it."""
    from convllava_hf.serving.demo import build_page

    page = build_page([model, model])
    states = [block for block in page.blocks.values() if isinstance(block, gradio.State)]
    assert [state.value for state in states] == [[], [], None]


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


def ask(visitor, text: str, answers: int, chat: str = "chat0") -> str:
    """Asks and waits for the end of an answer; returns it."""
    visitor.locator("#question textarea").fill(text)
    visitor.locator("#question textarea").press("Enter")
    told = visitor.locator(f"#{chat} .bot.message, #{chat} .message.bot")
    told.nth(answers - 1).wait_for()
    visitor.wait_for_function(f"() => !document.querySelector('#{chat} .generating, #{chat} .pending')")
    visitor.wait_for_timeout(1000)
    return told.nth(answers - 1).inner_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "width", "height", "count"), [("desktop", 1280, 900, 2), ("phone", 390, 844, 1)])
def test_a_visitor_uploads_asks_and_reads(browser, model, server, pictures, tmp_path, name, width, height, count):
    """Screenshots go to CONVLLAVA_SCREENSHOTS, where it is set."""
    from convllava_hf.serving.demo import build_page, launch_page

    photo, example, bad = (tmp_path / f"{word}.png" for word in ("photo", "example", "bad"))
    pictures[0].save(photo)
    pictures[1].save(example)
    bad.write_bytes(b"no image")
    page = build_page([model] * count, [("What is on it?", str(example))])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch_page(page, "127.0.0.1", port, block=False)
    folder = Path(os.environ.get("CONVLLAVA_SCREENSHOTS", tmp_path))
    first = answer(server.model, server.processor, "What is this?", [pictures[0]], max_new_tokens=64)
    history = [
        {
            "role": "user",
            "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": first},
    ]
    second = answer(server.model, server.processor, "And now?", history=history, max_new_tokens=64)
    try:
        visitor = browser.new_page(viewport={"width": width, "height": height})
        visitor.set_default_timeout(60_000)
        visitor.goto(page.local_url)
        files = visitor.locator("#question input[type=file]")
        files.set_input_files(str(bad))
        visitor.get_by_text("bad.png: an image cannot be used").first.wait_for()
        visitor.screenshot(path=folder / f"{name}-bad.png")
        files.set_input_files(str(photo))
        visitor.locator("#cost").get_by_text("FLOP").wait_for()
        visitor.locator("#seen img").wait_for()
        for number in range(count):
            assert visitor.locator(f"#chat{number}").is_visible()
        assert ask(visitor, "What is this?", 1).split()[:3] == first.split()[:3]
        assert ask(visitor, "And now?", 2).split()[:3] == second.split()[:3], "the conversation goes on"
        for number in range(1, count):
            assert second.split()[0] in visitor.locator(f"#chat{number}").inner_text(), "the other model answers, too"
        visitor.locator("#again").click()
        visitor.wait_for_timeout(500)
        visitor.wait_for_function("() => !document.querySelector('#chat0 .generating, #chat0 .pending')")
        visitor.wait_for_timeout(2000)
        assert visitor.locator("#chat0 .bot.message, #chat0 .message.bot").count() == 2, "it takes the old one's place"
        visitor.screenshot(path=folder / f"{name}.png", full_page=True)
        assert visitor.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"

        stranger = browser.new_page()
        stranger.set_default_timeout(60_000)
        stranger.goto(page.local_url)
        stranger.locator("#question textarea").wait_for()
        assert "What is this?" not in stranger.locator("#chat0").inner_text()

        visitor.locator("#clear").click()
        visitor.wait_for_function("() => !document.querySelector('#chat0').innerText.includes('What is this?')")
        visitor.get_by_text("What is on it?").first.click()
        visitor.wait_for_function("() => document.querySelector('#question textarea').value === 'What is on it?'")
    finally:
        page.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stop_ends_an_answer(browser, model, server):
    from convllava_hf.serving.demo import build_page, launch_page

    page = build_page([model])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch_page(page, "127.0.0.1", port, block=False)
    slow = server.model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    try:
        visitor = browser.new_page()
        visitor.set_default_timeout(60_000)
        visitor.goto(page.local_url)
        visitor.locator("#question textarea").fill("Hello?")
        visitor.locator("#question textarea").press("Enter")
        visitor.locator("#chat0 .bot.message, #chat0 .message.bot").first.wait_for()
        visitor.locator("#stop").click()
        deadline = time.monotonic() + 15  # of the 32 seconds that 64 tokens would take
        while server.backend.engine._running:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        slow.remove()
        page.close()
