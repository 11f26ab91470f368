"""The page: what it shows, what it keeps apart, and the page itself in a real headless browser."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from loopback import find_port
from PIL import Image
from running_server import build_data_url
from transformers.image_utils import httpx

from convllava_hf.inference.answer import answer, make_message
from convllava_hf.inference.load import load
from convllava_hf.serving.engine import Event


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


@contextmanager
def show_page(*arguments) -> Iterator[str]:
    """Shows a page of `build_page` and yields its address."""
    from convllava_hf.serving.demo import build_page, launch_page

    page = build_page(*arguments)
    launch_page(page, "127.0.0.1", find_port(), block=False)
    try:
        yield page.local_url
    finally:
        page.close()


def visit(browser, url: str, **settings):
    """A visitor of the page, who sees it."""
    visitor = browser.new_page(**settings)
    visitor.set_default_timeout(60_000)
    visitor.goto(url)
    visitor.locator("#question textarea").wait_for()
    return visitor


def ask(visitor, text: str, answers: int = 1) -> str:
    """Asks and waits for the end of an answer; returns it."""
    visitor.locator("#question textarea").fill(text)
    visitor.locator("#question textarea").press("Enter")
    return read_answer(visitor, answers)


def read_answer(visitor, answers: int) -> str:
    """The last of so many answers, when it has ended."""
    told = visitor.locator("#chat0 .bot.message, #chat0 .message.bot")
    told.nth(answers - 1).wait_for()
    visitor.wait_for_function("() => !document.querySelector('#chat0 .generating, #chat0 .pending')")
    visitor.wait_for_timeout(1000)
    assert told.count() == answers
    return told.nth(answers - 1).inner_text()


# For each button: what its words leave of the width between its paddings.
SPARE = """
() => ['again', 'stop', 'clear'].map((name) => {
  const button = document.getElementById(name);
  const words = document.createRange();
  words.selectNodeContents(button);
  const style = getComputedStyle(button);
  const room = button.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  return room - words.getBoundingClientRect().width + 0.5;  // sizes are rounded
})
"""


@pytest.fixture
def screenshots(tmp_path) -> Path:
    """Where pictures of the page go: `CONVLLAVA_SCREENSHOTS`, where it is set."""
    return Path(os.environ.get("CONVLLAVA_SCREENSHOTS", tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "width", "height", "count"), [("desktop", 1280, 900, 2), ("phone", 390, 844, 1)])
def test_a_visitor_uploads_asks_and_reads(
    browser, model, server, pictures, screenshots, tmp_path, name, width, height, count
):
    photo, example, bad = (tmp_path / f"{word}.png" for word in ("photo", "example", "bad"))
    pictures[0].save(photo)
    pictures[1].save(example)
    bad.write_bytes(b"no image")
    first = answer(server.model, server.processor, "What is this?", [pictures[0]], max_new_tokens=64)
    history = [make_message("user", "What is this?", [pictures[0]]), {"role": "assistant", "content": first}]
    second = answer(server.model, server.processor, "And now?", history=history, max_new_tokens=64)
    with show_page([model] * count, [("What is on it?", str(example))]) as url:
        visitor = visit(browser, url, viewport={"width": width, "height": height})
        files = visitor.locator("#question input[type=file]")
        files.set_input_files(str(bad))
        visitor.get_by_text("bad.png: an image cannot be used").first.wait_for()
        visitor.screenshot(path=screenshots / f"{name}-bad.png")
        files.set_input_files(str(photo))
        visitor.locator("#cost").get_by_text("FLOP").wait_for()
        visitor.locator("#seen img").wait_for()
        for number in range(count):
            assert visitor.locator(f"#chat{number}").is_visible()
        assert ask(visitor, "What is this?").split()[:3] == first.split()[:3]
        assert ask(visitor, "And now?", 2).split()[:3] == second.split()[:3], "the conversation goes on"
        for number in range(1, count):
            assert second.split()[0] in visitor.locator(f"#chat{number}").inner_text(), "the other model answers, too"
        visitor.locator("#again").click()
        visitor.wait_for_timeout(2000)
        assert read_answer(visitor, 2).split()[:3] == second.split()[:3], "it takes the old one's place"
        visitor.screenshot(path=screenshots / f"{name}.png", full_page=True)
        assert visitor.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
        assert min(visitor.evaluate(SPARE)) >= 0, "no word is wider than its button"

        stranger = visit(browser, url)
        assert "What is this?" not in stranger.locator("#chat0").inner_text()

        visitor.locator("#clear").click()
        visitor.wait_for_function("() => !document.querySelector('#chat0').innerText.includes('What is this?')")
        visitor.get_by_text("What is on it?").first.click()
        visitor.wait_for_function("() => document.querySelector('#question textarea').value === 'What is on it?'")


# As a browser does with a picture on its clipboard.
PASTE = """
async (png) => {
  const data = new DataTransfer();
  const bytes = Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0));
  data.items.add(new File([bytes], 'pasted.png', { type: 'image/png' }));
  const paste = new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
  document.querySelector('#question textarea').dispatchEvent(paste);
}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_picture_is_pasted(browser, model, server, pictures):
    expected = answer(server.model, server.processor, "What is this?", [pictures[2]], max_new_tokens=64)
    with show_page([model]) as url:
        visitor = visit(browser, url)
        visitor.evaluate(PASTE, build_data_url(pictures[2]).partition(",")[2])
        visitor.locator("#cost").get_by_text("FLOP").wait_for()
        assert ask(visitor, "What is this?").split()[:3] == expected.split()[:3]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_a_photo_is_taken(browser, model, screenshots, name, width, height):
    with show_page([model]) as url:
        visitor = visit(browser, url, viewport={"width": width, "height": height})
        visitor.get_by_text("Camera").first.click()
        visitor.get_by_text("Click to Access Webcam").click()
        visitor.wait_for_function("() => document.querySelector('#camera video')?.videoWidth > 0")  # it shows something
        visitor.get_by_label("capture photo").click()
        visitor.locator("#cost").get_by_text("FLOP").wait_for()
        assert ask(visitor, "What is this?")
        visitor.screenshot(path=screenshots / f"camera-{name}.png", full_page=True)
        assert visitor.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_boxes_of_an_answer_are_drawn(browser, model, pictures, screenshots, tmp_path, monkeypatch):
    """The quickstart's model names none, so the answer is put into its mouth."""
    start = model.backend.start

    async def answer_with_box(request, files):
        answer = await start(request, files)

        async def events():
            yield Event("It is at [0.25, 0.25, 0.75, 0.75].", "stop")

        return replace(answer, events=events())

    monkeypatch.setattr(model.backend, "start", answer_with_box)
    pictures[0].save(tmp_path / "photo.png")
    with show_page([model]) as url:
        visitor = visit(browser, url)
        visitor.locator("#question input[type=file]").set_input_files(str(tmp_path / "photo.png"))
        visitor.locator("#cost").get_by_text("FLOP").wait_for()
        assert "0.25" in ask(visitor, "Where is it?")
        visitor.locator("#boxes img").wait_for()
        visitor.screenshot(path=screenshots / "boxes.png", full_page=True)
        visitor.locator("#clear").click()
        visitor.locator("#boxes").wait_for(state="hidden")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stop_ends_an_answer(browser, model, server):
    slow = server.model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    try:
        with show_page([model]) as url:
            visitor = visit(browser, url)
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_visitor_cannot_name_files_of_the_machine(model, pictures, tmp_path):
    """Only what was uploaded through the page; asked as programs ask, without a browser."""
    pictures[0].save(tmp_path / "secret.png")

    def call(path) -> str:
        message = {"text": "What?", "files": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]}
        event = httpx.post(f"{url}gradio_api/call/take", json={"data": [message]}).raise_for_status().json()["event_id"]
        return httpx.get(f"{url}gradio_api/call/take/{event}").text

    with show_page([model]) as url:
        for path in (tmp_path / "secret.png", Path(__file__), "/etc/passwd"):
            assert "event: error" in call(path)
            assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
        (uploaded,) = httpx.post(
            f"{url}gradio_api/upload", files={"files": ("photo.png", (tmp_path / "secret.png").read_bytes())}
        ).json()
        assert "event: complete" in call(uploaded)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_shows_the_model_of_the_quickstart(browser, converted, pictures, screenshots, tmp_path):
    """In a copy of the Makefile beside a folder like the quickstart's: with the checkpoint that `QUICKSTART` names."""
    checkpoint = Path(os.environ.get("QUICKSTART", converted)).absolute()
    shutil.copy(Path(__file__).parents[2] / "Makefile", tmp_path)
    (tmp_path / "quickstart" / "samples").mkdir(parents=True)
    (tmp_path / "quickstart" / "checkpoint").symlink_to(checkpoint)
    pictures[1].save(tmp_path / "quickstart" / "samples" / "page.png")
    model, processor = load(checkpoint, device="cpu", dtype="float32")
    port = find_port()
    command = ["make", "demo", f"PY={sys.executable}", f"ARGS=--port {port} --dtype float32"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        visitor = visit(browser, f"http://127.0.0.1:{port}/")
        from convllava_hf.serving.demo import EXAMPLE_QUESTIONS

        visitor.get_by_text(EXAMPLE_QUESTIONS[0]).first.click()
        visitor.locator("#cost").get_by_text("FLOP").wait_for()
        visitor.locator("#question textarea").press("Enter")
        expected = answer(model, processor, EXAMPLE_QUESTIONS[0], [pictures[1]])
        assert read_answer(visitor, 1).split()[:3] == expected.split()[:3]
        visitor.screenshot(path=screenshots / "make-demo.png", full_page=True)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
