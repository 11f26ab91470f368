"""Models behind OpenAI's API: they answer questions about images, and they judge. Retries; every reply is kept."""

import base64
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging

from ..images import ImageError, load_image
from .run import Answerer, append_answers, open_images
from .tasks import PromptStyle, Question


logger = logging.get_logger(__name__)


# The first bytes of formats that servers read; others are sent as PNG.
MIME_TYPES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}


def connect(url: str, timeout: float = 120.0, retries: int = 5):
    """A client of a server; its key is `OPENAI_API_KEY` of the environment, if there is one.

    Raises:
        ImportError: the extra `eval` is not installed.
    """
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ImportError("servers need one more package: pip install 'convllava-hf[eval]'.") from error
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return OpenAI(base_url=url.rstrip("/"), api_key=key, timeout=timeout, max_retries=retries)


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
    client, model: str, images: Path | None, style: PromptStyle, max_new_tokens: int, settings: dict
) -> Answerer:
    """Answers batches by a server, all questions of a batch at once. A request that keeps failing gives its error.

    Args:
        client: from `connect`.
        model: as the server calls it.
        images: folder of the images.
        style: where images stand; the template is the server's.
        max_new_tokens: longest answer.
        settings: `temperature`, `seed`.
    """
    from openai import OpenAIError

    def ask(question: Question) -> str | Exception:
        try:
            addresses = [encode_image(source) for source in open_images(question, images)]
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


class Judge:
    """Asks a judge, and keeps every reply in a file the moment it arrives: nothing is asked, or paid for, twice.

    Args:
        client: from `connect`.
        cache: JSON Lines of replies; made where it is missing.
        workers: requests at a time.
    """

    def __init__(self, client, cache: Path, workers: int = 4):
        self.client, self.cache, self.workers, self._lock = client, cache, workers, threading.Lock()
        self.replies = {}
        if cache.exists():
            content = cache.read_bytes()
            os.truncate(cache, content.rfind(b"\n") + 1)  # a line that a crash tore
            rows = map(json.loads, content[: content.rfind(b"\n") + 1].splitlines())
            self.replies = {row["request"]: row for row in rows}

    def ask_all(self, requests: list[dict]) -> tuple[list[str | None], dict]:
        """Replies in the order of the requests, `None` where they keep failing.

        Args:
            requests: `judge`, `messages`, `temperature`, `max_tokens`.

        Returns:
            The replies; and `prompt_tokens`, `completion_tokens` of all of them, `cached` and `failed` requests.
        """
        keys = [hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest() for request in requests]
        todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.replies}
        with ThreadPoolExecutor(self.workers) as pool:
            list(tqdm(pool.map(self._ask, todo, todo.values()), total=len(todo), unit=" reviews"))
        found = [self.replies.get(key) for key in keys]
        usage = {kind: sum(row[kind] or 0 for row in found if row) for kind in ("prompt_tokens", "completion_tokens")}
        usage |= {"cached": len(set(keys)) - len(todo), "failed": sum(row is None for row in found)}
        return [row["content"] if row else None for row in found], usage

    def _ask(self, key: str, request: dict) -> None:
        from openai import OpenAIError

        arguments = {"model" if name == "judge" else name: value for name, value in request.items()}
        try:
            reply = self.client.chat.completions.create(**arguments)
        except OpenAIError as error:
            logger.warning(f"The judge did not answer: {error}")
            return
        if not reply.choices or reply.choices[0].message.content is None:
            return
        row = {
            "request": key,
            "content": reply.choices[0].message.content,
            "model": reply.model,
            "prompt_tokens": reply.usage and reply.usage.prompt_tokens,
            "completion_tokens": reply.usage and reply.usage.completion_tokens,
        }
        with self._lock:
            append_answers(self.cache, [row])
            self.replies[key] = row


def judge_answers(judge: Judge, built: list[dict], output: Path) -> dict:
    """Has answers reviewed and writes `reviews.jsonl`, as the original does; what has no reply is left out and named.

    Args:
        judge: whom to ask.
        built: from `gpt_review.build_requests`.
        output: folder of the results.

    Returns:
        Tokens and counts, and the ids of questions without a review.
    """
    from .gpt_review import parse_review

    replies, usage = judge.ask_all([row["request"] for row in built])
    rows = [
        {**row["review"], "content": reply, "tuple": parse_review(reply)}
        for row, reply in zip(built, replies, strict=True)
        if reply is not None
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output / "reviews.jsonl").write_text(lines, encoding="utf-8")
    reviewed = {row["question_id"] for row in rows}
    missing = [row["review"]["question_id"] for row in built if row["review"]["question_id"] not in reviewed]
    return {**usage, "without a review": missing}
