"""The HTTP server: OpenAI's chat completions, models, health and metrics, with limits on everything a client sends."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from .backends import Answer, LocalBackend, RemoteBackend
from .fetch import fetch_image
from .requests import TEXT_BYTES, ChatRequest, RequestError, StreamOptions, parse_request


logger = logging.getLogger(__name__)

HEADER_SECONDS = 15.0  # a connection that sends no whole request header for so long is closed
BODY_SECONDS = 30.0
LARGE_BODIES = 8  # bodies of the largest size that are held at the same time; up to TEXT_BYTES none is large
LARGE_DOWNLOADS = 8
OPEN_PATHS = ("/health", "/load_model")  # need no key, and tell and do nothing that would


@dataclass
class ServerOptions:
    """What clients may do.

    Args:
        name: of the model, in answers and in `/v1/models`. Requests may call it anything.
        api_key: what clients must send; `None` lets everyone in.
        max_image_bytes: of the images of a request together, as files.
        allowed_hosts: hosts that images are fetched from.
        loopback_only: refuse other names of this machine in `Host`, so that no web page can reach a server without a
            key through a name that it points at 127.0.0.1.
    """

    name: str
    api_key: str | None = None
    max_image_bytes: int = 32 * 2**20
    allowed_hosts: Collection[str] = field(default_factory=frozenset)
    loopback_only: bool = False

    @property
    def max_body_bytes(self) -> int:
        return self.max_image_bytes * 4 // 3 + TEXT_BYTES  # base64 takes four characters for three bytes


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self, backend: LocalBackend | RemoteBackend):
        registry = self.registry = prometheus_client.CollectorRegistry()
        make = {"namespace": "convllava", "registry": registry}
        self.requests = prometheus_client.Counter("requests", "Chat completions by HTTP status.", ["status"], **make)
        self.tokens = prometheus_client.Counter(
            "tokens", "Tokens: prompt, image (of the prompt), new.", ["kind"], **make
        )
        self.first = prometheus_client.Histogram("first_token_seconds", "From the request to the first text.", **make)
        self.whole = prometheus_client.Histogram("request_seconds", "From the request to the end.", **make)
        self.cancelled = prometheus_client.Counter("cancelled", "Answers whose client left.", **make)
        waiting = prometheus_client.Gauge("waiting", "Requests that wait.", **make)
        waiting.set_function(lambda: backend.waiting)
        if isinstance(backend, LocalBackend):
            sizes = prometheus_client.Histogram("batch_size", "Chats per batch.", buckets=(1, 2, 4, 8, 16, 32), **make)
            backend.engine.batch_sizes = sizes.observe
            cache = backend.engine.cache
            for name, read in (
                ("image_cache_hits", lambda: cache.hits),
                ("image_cache_misses", lambda: cache.misses),
                ("image_cache_bytes", lambda: cache.num_bytes),
            ):
                prometheus_client.Gauge(name, "Features of images, kept by hash.", **make).set_function(read)


class Guard:
    """ASGI middleware: who may come in, what went out, and no traceback to anyone."""

    def __init__(self, app, options: ServerOptions, metrics: Metrics):
        self.app, self.options, self.metrics = app, options, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), None

        async def send_and_note(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refuse(scope)
            await (refusal or self.app)(scope, receive, send_and_note)
        except Exception as error:  # mostly `fail` has answered; the log gets the place, without what a client sent
            lines = "".join(traceback.format_tb(error.__traceback__))
            logger.error(f"{type(error).__name__} while answering\n{lines}")
            if status is None:
                await build_error("internal error", 500, "server_error")(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - started
            known = {"/health", "/metrics", "/v1/models", "/v1/chat/completions"}
            path = scope["path"] if scope["path"] in known else "(another path)"
            if path == "/v1/chat/completions":
                self.metrics.requests.labels(status or "none").inc()
                self.metrics.whole.observe(seconds)
            logger.info(f"{scope['method'][:10]} {path} {status} {seconds:.3f}s")

    def _refuse(self, scope) -> Response | None:
        headers = dict(scope["headers"])
        if self.options.loopback_only and not is_loopback(headers.get(b"host", b"").decode("latin-1")):
            return build_error("this server answers only to names of this machine", 403, "permission_error")
        if self.options.api_key is None or scope["path"] in OPEN_PATHS:
            return None
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        # Digests have one length, and are compared in constant time: neither tells anything about the key.
        digests = (hashlib.sha256(key).digest() for key in (given, self.options.api_key.encode()))
        if hmac.compare_digest(*digests):
            return None
        return build_error("a valid key is missing: send 'Authorization: Bearer KEY'", 401, "authentication_error")


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes connections on which no request arrives: uvicorn itself waits for a header for ever."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._close_silent, None)

    def _close_silent(self, last):
        if self.transport.is_closing():
            return
        if self.cycle is last and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            self.loop.call_later(HEADER_SECONDS, self._close_silent, self.cycle)


class Bodies:
    """Reads bodies within limits: of each, and of all that are held at the same time."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.held = max_bytes, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held inside the block; raises RequestError (413, 408, 503)."""
        taken = 0

        async def collect() -> bytes:
            nonlocal taken
            data = bytearray()
            async for chunk in request.stream():
                data += chunk
                if len(data) > self.max_bytes:
                    raise RequestError(f"the body has more than {self.max_bytes} bytes", status=413)
                if len(data) > TEXT_BYTES:
                    self.held, taken = self.held + len(data) - taken, len(data)
                    if self.held > LARGE_BODIES * self.max_bytes:
                        raise RequestError("too many large requests; try again", status=503, kind="server_error")
            return bytes(data)

        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            raise RequestError(f"the body has more than {self.max_bytes} bytes", status=413)
        try:
            try:
                body = await asyncio.wait_for(collect(), BODY_SECONDS)
            except asyncio.TimeoutError:  # noqa: UP041 -- another class in Python 3.10
                raise RequestError(f"the body took longer than {BODY_SECONDS:g} seconds", status=408) from None
            yield body
        finally:
            self.held -= taken


def build_app(backend: LocalBackend | RemoteBackend, options: ServerOptions):
    """The ASGI application.

    Args:
        backend: what answers; closed when the application shuts down.
        options: what clients may do.
    """
    metrics, bodies = Metrics(backend), Bodies(options.max_body_bytes)
    downloads = asyncio.Semaphore(LARGE_DOWNLOADS)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app):
        yield
        await backend.close()

    async def refuse(request: Request, error: RequestError):
        # What is left of a body that was refused is not read: the connection ends.
        return build_error(str(error), error.status, error.kind)

    async def fail(request: Request, error: Exception):
        return build_error(*describe_error(error))  # raised again afterwards: `Guard` logs it

    async def miss(request: Request, error):
        return build_error("no such path or method", error.status_code)

    async def tell_health(request: Request):
        status, code = ("ok", 200) if backend.healthy else ("stopped", 503)
        return JSONResponse({"status": status}, code)

    async def tell_metrics(request: Request):
        return Response(prometheus_client.generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def list_models(request: Request):
        entry = {"id": options.name, "object": "model", "created": created, "owned_by": "convllava-hf"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def load_model(request: Request):
        # `transformers chat` asks for this before it asks anything else. There is nothing to load, whatever it names.
        return Response(write_event({"status": "ready", "cached": True}), media_type="text/event-stream")

    async def complete(request: Request):
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("expected Content-Type: application/json", status=415)
        started = time.perf_counter()
        async with bodies.read(request) as body:
            chat = parse_request(body)
            del body
            files, left = [], options.max_image_bytes
            for url in chat.image_urls:
                async with downloads:
                    files.append(await fetch_image(url, options.allowed_hosts, left))
                left -= len(files[-1])
            answer = await backend.start(chat, files)
        if await request.is_disconnected():
            answer.cancel()
            metrics.cancelled.inc()
            return Response(status_code=499)
        gone = asyncio.ensure_future(cancel_when_gone(request, answer, metrics))
        events = note_events(answer, gone, metrics, started)
        if chat.stream:
            return StreamingResponse(stream_chunks(chat, options.name, answer, events), media_type="text/event-stream")
        text, last = [], None
        async for last in events:
            text.append(last.text)
        if last.error is not None:
            return build_error(*describe_error(last.error))
        message = {"role": "assistant", "content": "".join(text)}
        choice = {"index": 0, "message": message, "finish_reason": last.finish_reason, "logprobs": None}
        head = build_head("chat.completion", options.name)
        return JSONResponse({**head, "choices": [choice], "usage": count_usage(answer, last.new_tokens)})

    app = Starlette(
        routes=[
            Route("/health", tell_health),
            Route("/metrics", tell_metrics),
            Route("/load_model", load_model, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
        exception_handlers={RequestError: refuse, Exception: fail, 404: miss, 405: miss},
        lifespan=lifespan,
    )
    return Guard(app, options, metrics)


async def cancel_when_gone(request: Request, answer: Answer, metrics: Metrics) -> None:
    """Waits for the client to leave, and ends its answer then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    metrics.cancelled.inc()
    answer.cancel()


async def note_events(answer: Answer, gone: asyncio.Future, metrics: Metrics, started: float):
    """The events of an answer, which the metrics count; ends the answer when its reader ends early."""
    first = True
    metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
    metrics.tokens.labels("image").inc(answer.image_tokens)
    try:
        async for event in answer.events:
            if first:
                metrics.first.observe(time.perf_counter() - started)
                first = False
            if event.finish_reason:
                metrics.tokens.labels("new").inc(event.new_tokens)
            yield event
    finally:
        gone.cancel()
        answer.cancel()


async def stream_chunks(chat: ChatRequest, name: str, answer: Answer, events) -> AsyncIterator[str]:
    """The answer as server-sent events. What is there at the same time goes out together, as each write costs."""
    head = build_head("chat.completion.chunk", name)
    wanted = chat.stream_options or StreamOptions()
    delta, usage = {"role": "assistant", "content": ""}, {}
    if wanted.include_usage and wanted.continuous_usage_stats:
        usage = {"usage": count_usage(answer, 0)}
    ready = write_event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}], **usage})
    async for event in events:
        if event.error is not None:
            message, status, kind = describe_error(event.error)
            yield ready + write_event({"error": {"message": message, "type": kind, "code": status}})
            return
        if event.text or event.finish_reason:
            choice = {"index": 0, "delta": {"content": event.text} if event.text else {}}
            ready += write_event({**head, "choices": [{**choice, "finish_reason": event.finish_reason}]})
        if not event.finish_reason:
            yield ready
            ready = ""
    if wanted.include_usage:
        ready += write_event({**head, "choices": [], "usage": count_usage(answer, event.new_tokens)})
    yield ready + "data: [DONE]\n\n"


def build_head(kind: str, name: str) -> dict:
    """What every answer and every piece of one begins with."""
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": name}


def write_event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def count_usage(answer: Answer, new_tokens: int) -> dict:
    """OpenAI's `usage`; `image_tokens` is how much of the prompt stands for images."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": answer.prompt_tokens + new_tokens,
        "prompt_tokens_details": {"image_tokens": answer.image_tokens},
    }


def describe_error(error: Exception) -> tuple[str, int, str]:
    """Message, status and kind of an error; of an unexpected one nothing but that it happened."""
    if isinstance(error, RequestError):
        return str(error), error.status, error.kind
    return "internal error", 500, "server_error"


def build_error(message: str, status: int, kind: str = "invalid_request_error") -> JSONResponse:
    """An error in OpenAI's format. Bodies may be unread, so the connection ends; 429 and 503 say when to come back."""
    headers = {"Connection": "close"} | ({"Retry-After": "1"} if status in (429, 503) else {})
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def is_loopback(host: str) -> bool:
    """Whether a host, as it stands in a URL, is this machine by its own names."""
    name, _, port = host.rpartition(":")
    if not port.isdigit() or (":" in name and not name.endswith("]")):  # no port; an address of version 6 has colons
        name = host
    name = name.strip("[]").lower()
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def run_server(app, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM; requests under way then have half a minute to end."""
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=32768,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=30,
    )
    uvicorn.Server(config).run()
