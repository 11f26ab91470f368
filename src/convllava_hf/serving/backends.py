"""Where answers come from: the engine of this process, or a server of the same API behind this one."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO

# The HTTP client that transformers itself fetches images with: its distribution differs between versions.
from transformers.image_utils import httpx

from .engine import Engine, Event, Job, Settings
from .grammar import GrammarCompiler
from .prompts import ImageInput, Prompt, build_input_ids, hash_image, list_messages, open_checked, prepare_image
from .requests import ChatRequest, RequestError


PREPARING_THREADS = 2  # decoding and resizing; more would take the cores that the model computes on


@dataclass
class Answer:
    """An answer under way.

    Args:
        prompt_tokens, image_tokens: length of the prompt, and how much of it stands for images.
        events: the pieces; the last one has a `finish_reason` or an `error`.
        cancel: ends it; safe to call at any time and more than once.
    """

    prompt_tokens: int
    image_tokens: int
    events: AsyncIterator[Event]
    cancel: Callable[[], None]


class LocalBackend:
    """Prepares chats in threads and answers them with an engine.

    Args:
        engine: the engine; closed by `close`.
        max_pixels: most pixels of an image.
        max_tokens: longest answer that a client can ask for.
    """

    def __init__(self, engine: Engine, max_pixels: int, max_tokens: int):
        self.engine, self.max_pixels, self.max_tokens = engine, max_pixels, max_tokens
        text = engine.model.config.get_text_config()
        self.grammars = GrammarCompiler(engine.processor.tokenizer, text.vocab_size, engine.end_ids)
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="convllava-prepare")
        # Chats that are prepared and not begun hold pixels: so many and no more.
        self._prepared = asyncio.Semaphore(2 * engine.max_batch)

    async def start(self, request: ChatRequest, files: list[bytes]) -> Answer:
        """Begins an answer; `files` are those of the request's images, in order. Raises RequestError."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        with self.engine.expect_chat(), ExitStack() as undo:
            await self._prepared.acquire()
            undo.callback(self._prepared.release)
            job = Job(*await loop.run_in_executor(self._threads, self._prepare, request, files), deliver)
            self.engine.submit(job)
            place = undo.pop_all()  # closed when the answer begins; closing it once more does nothing

        def cancel() -> None:
            place.close()
            self.engine.cancel(job)
            queue.put_nowait(Event(finish_reason="stop"))

        async def read_events() -> AsyncIterator[Event]:
            event = Event()
            while event.finish_reason is None and event.error is None:
                event = await queue.get()
                place.close()
                while not queue.empty() and event.finish_reason is None and event.error is None:
                    more = queue.get_nowait()
                    event = Event(event.text + more.text, more.finish_reason, more.new_tokens, more.error)
                yield event

        return Answer(len(job.prompt.input_ids), job.prompt.image_tokens, read_events(), cancel)

    def _prepare(self, request: ChatRequest, files: list[bytes]) -> tuple[Prompt, Settings]:
        processor, room = self.engine.processor, self.engine.context
        images, taken = [], 0
        for data in files:
            key = hash_image(data, request.max_image_tokens)
            features = self.engine.cache.get(key)
            if features is None:
                image = prepare_image(processor, data, key, self.max_pixels, request.max_image_tokens)
            else:
                image = ImageInput(key, len(features), features=features)
            images.append(image)
            taken += image.num_tokens
            if room is not None and taken >= room:
                raise RequestError(f"the images take {taken} tokens or more; the model takes {room} together")
        input_ids = build_input_ids(processor, list_messages(request), [image.num_tokens for image in images], room)
        prompt = Prompt(input_ids, images)
        wanted = request.max_completion_tokens or request.max_tokens
        return prompt, Settings(
            max_new_tokens=self.engine.choose_length(prompt, wanted, self.max_tokens),
            temperature=request.temperature or 0.0,
            top_p=request.top_p or 1.0,
            top_k=request.top_k,
            seed=request.seed,
            stop=tuple(request.stop),
            matcher=self.grammars.compile(request.schema_text) if request.schema_text else None,
        )

    @property
    def waiting(self) -> int:
        return self.engine.waiting

    @property
    def healthy(self) -> bool:
        return self.engine.alive

    async def close(self) -> None:
        """Ends what runs, and the threads."""
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        self._threads.shutdown(wait=False, cancel_futures=True)


class RemoteBackend:
    """Passes checked requests on to a server of OpenAI's API, such as vLLM's on loopback.

    That server sees only fields that were checked here, images as `data:` URLs of files that were opened here, and no
    URL of a client.

    Args:
        url: of the server, up to and with `/v1`.
        model: its name for the model.
        key: its key; empty for none.
        max_pixels, max_tokens: as for `LocalBackend`.
        max_queue: most requests under way.
        budgets: whether that server takes `max_image_tokens`, as ours does.
        alive: whether that server's process still runs, where it is known.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str,
        max_pixels: int,
        max_tokens: int,
        max_queue: int,
        budgets: bool = True,
        alive: Callable[[], bool] = lambda: True,
    ):
        self.model, self.max_pixels, self.max_tokens, self.max_queue = model, max_pixels, max_tokens, max_queue
        self.budgets, self.waiting, self._alive = budgets, 0, alive
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(base_url=url, headers=headers, timeout=None, trust_env=False)

    async def start(self, request: ChatRequest, files: list[bytes]) -> Answer:
        """Begins an answer; `files` are those of the request's images, in order. Raises RequestError."""
        if self.waiting >= self.max_queue:
            raise RequestError("too many requests are waiting; try again", status=429, kind="rate_limit_error")
        if request.max_image_tokens is not None and not self.budgets:
            raise RequestError("max_image_tokens is not supported by this engine")
        self.waiting += 1
        response = None
        try:
            body = await asyncio.get_running_loop().run_in_executor(None, self._build_body, request, files)
            message = self._client.build_request("POST", "chat/completions", json=body)
            response = await self._client.send(message, stream=True)
            if response.status_code != 200:
                text = (await response.aread())[:2000].decode(errors="replace")
                status = response.status_code if response.status_code in (400, 413, 429, 503) else 503
                raise RequestError(_read_error(text), status=status)
            lines = response.aiter_lines()
            first = await _read_chunk(lines)
        except BaseException as error:
            self.waiting -= 1
            if response is not None:
                await response.aclose()
            if isinstance(error, httpx.HTTPError):
                raise RequestError("the engine does not answer", status=503, kind="server_error") from None
            raise
        usage = (first or {}).get("usage") or {}
        closing = []

        def close() -> None:
            if not closing:
                self.waiting -= 1
                closing.append(asyncio.ensure_future(response.aclose()))

        async def read_events() -> AsyncIterator[Event]:
            chunk, finish, tokens = first, None, 0
            try:
                while chunk is not None:
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                    for choice in chunk.get("choices", []):
                        finish = choice.get("finish_reason") or finish
                        if text := choice["delta"].get("content"):
                            yield Event(text, new_tokens=tokens)
                    chunk = await _read_chunk(lines)
                if finish is None:
                    raise RuntimeError("it ended in the middle, or with an error")
                yield Event(finish_reason=finish, new_tokens=tokens)
            except (httpx.HTTPError, httpx.StreamError, RuntimeError):
                yield Event(error=RequestError("the engine does not answer", status=503, kind="server_error"))
            finally:
                close()

        details = usage.get("prompt_tokens_details") or {}
        return Answer(usage.get("prompt_tokens", 0), details.get("image_tokens", 0), read_events(), close)

    def _build_body(self, request: ChatRequest, files: list[bytes]) -> dict:
        messages, images = list_messages(request), iter(files)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    file = BytesIO()
                    open_checked(next(images), self.max_pixels).save(file, "PNG", compress_level=1)
                    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
                    part |= {"type": "image_url", "image_url": {"url": url}}
        wanted = request.max_completion_tokens or request.max_tokens or self.max_tokens
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": min(wanted, self.max_tokens),
            "temperature": request.temperature or 0.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "stop": request.stop or None,
            "response_format": request.response_format and request.response_format.model_dump(by_alias=True),
        }
        body |= {key: getattr(request, key) for key in ("top_p", "top_k", "seed", "max_image_tokens")}
        return {key: value for key, value in body.items() if value is not None}

    @property
    def healthy(self) -> bool:
        return self._alive() and not self._client.is_closed

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


async def _read_chunk(lines: AsyncIterator[str]) -> dict | None:
    """The next event of a stream of server-sent events, or `None` at its end."""
    async for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            return json.loads(line[6:])
    return None


def _read_error(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return "the engine refused the request"
