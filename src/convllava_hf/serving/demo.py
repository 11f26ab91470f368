"""The demonstration page: images and questions, answers as they form, and what the model sees and spends.

Every visitor's images and conversation live in that visitor's browser session; the page itself keeps nothing.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image

from ..images import load_image
from .backends import LocalBackend, RemoteBackend
from .picture import count_operations, draw_boxes, name_operations, show_cells
from .prompts import open_checked, prepare_image
from .requests import ChatRequest, RequestError


MAX_PIXELS = 40_000_000
MAX_ANSWER = 512
EXAMPLE_QUESTIONS = ("Which number is on the page?", "How many shapes are there?")
STYLE = """
footer {display: none !important}
.gradio-container {max-width: 1200px !important; width: 100% !important; margin: auto}
@media (max-width: 600px) {.gradio-container {padding: 4px !important}}
#again, #stop, #clear {flex: 1 1 auto}
"""


@dataclass
class Model:
    """One of the models on the page.

    Args:
        name: its heading.
        backend: what answers.
    """

    name: str
    backend: LocalBackend | RemoteBackend


def read_images(files: list[str]) -> list[bytes]:
    """The files of a message, each checked and named in the message of a `gr.Error` where it is bad."""
    found = []
    for path in files:
        data = Path(path).read_bytes()
        try:
            open_checked(data, MAX_PIXELS)
        except RequestError as error:
            raise gr.Error(f"{Path(path).name}: {error}", print_exception=False) from None
        found.append(data)
    return found


def build_request(history: list[dict], budget: int | None) -> tuple[ChatRequest, list[bytes]]:
    """The conversation as a request, and the files of its images in order.

    Args:
        history: messages as the page keeps them: `{"role", "text", "files"}`.
        budget: most tokens of an image; `None` as trained.
    """
    messages, files = [], []
    for message in history:
        read = read_images(message["files"])
        files += read
        # The bytes travel beside the request: these URLs only hold the places.
        content = [{"type": "image_url", "image_url": {"url": "data:,"}} for _ in read]
        content.append({"type": "text", "text": message["text"]})
        messages.append({"role": message["role"], "content": content})
    body = {"messages": messages, "max_tokens": MAX_ANSWER, "max_image_tokens": budget}
    return ChatRequest.model_validate(body), files


def show_history(history: list[dict]) -> list[dict]:
    """The conversation as the chat component shows it."""
    shown = []
    for message in history:
        shown += [{"role": message["role"], "content": {"path": path}} for path in message["files"]]
        if message["text"]:
            shown.append({"role": message["role"], "content": message["text"]})
    return shown


async def stream_answer(model: Model, history: list[dict], budget: int | None) -> AsyncIterator[str]:
    """The answer to a conversation, longer each time; raises gr.Error."""
    try:
        request, files = build_request(history, budget)
        answer = await model.backend.start(request, files)
    except (RequestError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from None
    text = ""
    try:
        async for event in answer.events:
            if event.error is not None:
                raise gr.Error(str(event.error) or "no answer", print_exception=False)
            text += event.text
            yield text
    finally:  # also where the visitor presses Stop or leaves
        answer.cancel()


def describe_image(model: Model, path: str | None, budget: int | None) -> tuple[Image.Image | None, str]:
    """How an image looks to a model, and what it costs.

    Args:
        model: of the page; of a remote one nothing is known.
        path: of the image file.
        budget: most tokens; `None` as trained.
    """
    if path is None or not isinstance(model.backend, LocalBackend):
        return None, ""
    (data,) = read_images([path])
    engine = model.backend.engine
    try:
        image = prepare_image(engine.processor, data, "shown", MAX_PIXELS, budget)
    except RequestError as error:
        return None, str(error)
    height, width = image.pixel_values.shape[-2:]
    tower, text = count_operations(engine.model, height, width, image.num_tokens)
    cost = f"**{image.num_tokens} tokens** from {width}x{height} pixels; "
    cost += f"{name_operations(tower)} in the tower and {name_operations(text)} in the language model"
    return show_cells(engine.processor, image.pixel_values, image.num_tokens), cost


def choose_budgets(model: Model) -> int | None:
    """The most tokens that an image of this model can take; `None` where images have a fixed number."""
    if not isinstance(model.backend, LocalBackend):
        return None
    settings = model.backend.engine.processor.image_processor
    if not hasattr(settings, "num_image_tokens"):
        return None
    return max(1, settings.num_image_tokens(settings.size["height"], settings.size["width"]))


def build_page(models: list[Model], examples: list[tuple[str, str]] = ()) -> gr.Blocks:
    """The page.

    Args:
        models: one, or two that answer side by side.
        examples: pairs of a question and the path of an image.
    """
    most = choose_budgets(models[0])
    with gr.Blocks(title="convllava", analytics_enabled=False) as page:
        gr.Markdown(f"### {' and '.join(model.name for model in models)}")
        # One conversation per model, and the image that is shown, in the visitor's session.
        histories, shown = [gr.State([]) for _ in models], gr.State(None)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    chats = [
                        gr.Chatbot(
                            label=model.name, height=420, elem_id=f"chat{number}", buttons=["copy"], min_width=260
                        )
                        for number, model in enumerate(models)
                    ]
                question = gr.MultimodalTextbox(
                    placeholder="Ask about an image: drop it here, paste it, or press the paper clip",
                    file_count="multiple",
                    file_types=["image"],
                    sources=["upload"],
                    show_label=False,
                    elem_id="question",
                    submit_btn=True,
                )
                with gr.Row():
                    again = gr.Button("Regenerate", elem_id="again", min_width=80, size="md")
                    stop = gr.Button("Stop", elem_id="stop", min_width=80, size="md")
                    clear = gr.Button("Clear", elem_id="clear", min_width=80, size="md")
                if examples:
                    rows = [[{"text": text, "files": [path]}] for text, path in examples]
                    gr.Examples(rows, [question], label="Examples")
            with gr.Column(scale=2, min_width=300):
                budget = gr.Slider(
                    1,
                    most or 1,
                    value=most or 1,
                    step=1,
                    label="Tokens of an image, at most: fewer are faster and see less",
                    visible=most is not None and most > 1,
                    elem_id="budget",
                )
                cost = gr.Markdown(elem_id="cost")
                seen = gr.Image(label="As the model sees it", interactive=False, elem_id="seen", height=320)
                boxes = gr.Image(
                    label="Boxes of the answer", interactive=False, visible=False, elem_id="boxes", height=320
                )
                with gr.Accordion("Camera", open=False):
                    camera = gr.Image(sources=["webcam"], type="filepath", label="Camera", height=240, elem_id="camera")

        def limit(value):
            return None if most is None or value >= most else int(value)

        def preview(message, history, value, old):
            """Shows the last image, and takes bad files out of the question. Runs with every key that is pressed."""
            message = message or {"text": "", "files": []}
            good, bad = [], []
            for path in message["files"]:
                try:
                    read_images([path])
                    good.append(path)
                except gr.Error as error:
                    bad.append(path)
                    if old is None or path not in old["bad"]:  # the event of an upload can come twice
                        gr.Warning(error.message)
            path = ([path for told in history for path in told["files"]] + good or [None])[-1]
            new = {"path": path, "budget": value, "bad": bad}
            changed = [gr.skip()] * 2
            if old is None or {**new, "bad": old["bad"]} != old:
                changed = describe_image(models[0], path, limit(value))
            return [{"text": message["text"], "files": good} if bad else gr.skip(), *changed, new]

        def take(message, *kept):
            text, files = (message["text"] or "").strip(), message["files"]
            if not text:
                raise gr.Error("Write a question.", print_exception=False)
            read_images(files)
            new = {"role": "user", "text": text, "files": files}
            histories = [[*history, new] for history in kept]
            return [None, *histories, *map(show_history, histories)]

        def take_back(*kept):
            if not kept[0]:
                raise gr.Error("There is nothing to regenerate.", print_exception=False)
            histories = [history[:-1] if history[-1]["role"] == "assistant" else history for history in kept]
            return [*histories, *map(show_history, histories)]

        def draw(history, value):
            last = next((message["text"] for message in reversed(history) if message["role"] == "assistant"), "")
            files = [path for message in history for path in message["files"]]
            drawn = None
            if files:
                shown, _ = describe_image(models[0], files[-1], limit(value))
                drawn = draw_boxes(shown or load_image(files[-1]), last)
            return gr.Image(drawn, visible=drawn is not None)

        def answer_with(model):
            async def answer(history, value):
                if not history or history[-1]["role"] != "user":
                    return
                async for text in stream_answer(model, history, limit(value)):
                    told = [*history, {"role": "assistant", "text": text, "files": []}]
                    yield told, show_history(told)

            return answer

        def add_photo(path, message):
            message = message or {"text": "", "files": []}
            return {"text": message["text"], "files": [*message["files"], *([path] if path else [])]}

        asked = question.submit(take, [question, *histories], [question, *histories, *chats], show_progress="hidden")
        repeated = again.click(take_back, histories, [*histories, *chats], show_progress="hidden")
        running = []
        for begun in (asked, repeated):
            for model, history, chat in zip(models, histories, chats, strict=True):
                told = begun.success(answer_with(model), [history, budget], [history, chat], show_progress="minimal")
                running.append(told)
                if model is models[0]:
                    told.then(draw, [history, budget], boxes, show_progress="hidden")
        stop.click(None, cancels=running)
        gr.on(
            [clear.click, *(chat.clear for chat in chats)],  # the chats have a bin of their own
            lambda: [*([] for _ in histories), *([] for _ in chats), None, None, "", gr.Image(None, visible=False)],
            None,
            [*histories, *chats, shown, seen, cost, boxes],
            cancels=running,
        )
        added = camera.change(add_photo, [camera, question], question, show_progress="hidden")
        for event in (question.change, budget.release, added.then):
            told = [question, seen, cost, shown]
            event(preview, [question, histories[0], budget, shown], told, show_progress="hidden")
    return page


def read_examples(folder: Path) -> list[tuple[str, str]]:
    """Pictures beside a checkpoint, as the quickstart leaves them in `samples`, with questions that it teaches."""
    paths = sorted((folder.parent / "samples").glob("*.png"))[:3]
    return [(question, str(path)) for path in paths for question in EXAMPLE_QUESTIONS]


def launch_page(page: gr.Blocks, host: str, port: int, block: bool = True) -> None:
    """Shows the page until Ctrl-C; files beyond 32 MB are refused, and nothing of the machine is served."""
    page.queue(default_concurrency_limit=8, max_size=64)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=False,
        max_file_size="32mb",
        ssr_mode=False,
        footer_links=[],
        css=STYLE,
        prevent_thread_lock=not block,
        blocked_paths=[str(Path.cwd())],
    )
