"""Models behind OpenAI's API answer questions about images."""

import base64
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

from ..images import ImageError, load_image
from .answering import Answerer, open_images
from .questions import PromptStyle, Question


TIMEOUT, RETRIES = 120.0, 5  # seconds of a request, and how often it is sent again
# The first bytes of formats that servers read; others are sent as PNG.
MIME_TYPES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}


def connect(url: str):
    """A client of a server; its key is `OPENAI_API_KEY` of the environment, if there is one.

    Raises:
        ImportError: the extra `eval` is not installed.
    """
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ImportError("servers need one more package: pip install 'convllava-hf[eval]'.") from error
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return OpenAI(base_url=url.rstrip("/"), api_key=key, timeout=TIMEOUT, max_retries=RETRIES)


def find_model(client) -> str:
    """The first model that a server lists.

    Raises:
        ValueError: it lists none, or does not answer.
    """
    from openai import OpenAIError

    try:
        found = next(iter(client.models.list().data), None)
    except OpenAIError as error:
        raise ValueError(f"{client.base_url} does not answer ({error}); expected an OpenAI-compatible URL.") from error
    if found is None:
        raise ValueError(f"{client.base_url} lists no model; name it with --model-name.")
    return found.id


def encode_image(source: bytes | Path) -> str:
    """An image as a data URI: its own bytes, where servers read the format."""
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    kind = MIME_TYPES.get(content[:2])
    if kind is None:
        file = BytesIO()
        load_image(content).save(file, "PNG")
        kind, content = "image/png", file.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def make_server_answerer(
    client, model: str, folder: Path | None, style: PromptStyle, max_new_tokens: int, settings: dict
) -> Answerer:
    """Answers batches by a server, all questions of a batch at once. A request that keeps failing gives its error.

    Args:
        client: from `connect`.
        model: as the server calls it.
        folder: of the images.
        style: where images stand; the template is the server's.
        max_new_tokens: longest answer.
        settings: `temperature`, `seed`.
    """
    from openai import OpenAIError

    def ask(question: Question) -> str | Exception:
        try:
            addresses = [encode_image(source) for source in open_images(question, folder)]
        except ImageError as error:
            return error
        pictures = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
        text = [{"type": "text", "text": question.text}]
        content = [*text, *pictures] if style.image_last else [*pictures, *text]
        try:
            reply = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": content}],
                max_tokens=max_new_tokens,
                temperature=settings.get("temperature") or 0.0,
                seed=settings.get("seed", 0),
            )
        except OpenAIError as error:
            return error
        text = reply.choices[0].message.content if reply.choices else None
        return text.strip() if text is not None else ValueError("the reply has no text")

    def answer(questions: list[Question]) -> list[str | Exception]:
        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(ask, questions))

    return answer
