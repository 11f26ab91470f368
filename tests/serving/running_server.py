"""Starting a server in a thread, and asking it as clients do."""

import base64
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import uvicorn
from loopback import find_port
from openai import OpenAI
from PIL import Image

# The HTTP client that transformers itself uses: its distribution differs between versions.
from transformers.image_utils import httpx


KEY = "a-key-for-tests"


def build_data_url(image: Image.Image | bytes, kind: str = "png") -> str:
    """An image, or the bytes of a file, as a data: URL."""
    if isinstance(image, Image.Image):
        file = BytesIO()
        image.save(file, kind)
        image = file.getvalue()
    return f"data:image/{kind};base64," + base64.b64encode(image).decode()


def build_content(text: str, *urls: str) -> list[dict]:
    """The content of a message: images, then the text."""
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


@dataclass
class Server:
    """A running server and what stands behind it."""

    port: int
    backend: object
    model: object
    processor: object

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def post(self, body=None, **options) -> httpx.Response:
        """Sends a raw chat completion."""
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | options.pop("headers", {})
        options |= {"json": body} if body is not None else {}
        return httpx.post(f"{self.url}/v1/chat/completions", headers=headers, timeout=120, **options)

    def ask(self, content="Hello?", **settings) -> httpx.Response:
        """Sends one message of a user."""
        return self.post({"messages": [{"role": "user", "content": content}], "max_tokens": 4, **settings})


def start_app(app) -> tuple[uvicorn.Server, threading.Thread, int]:
    """Serves an application on a free port of loopback, as `run_server` does."""
    from convllava_hf.serving.server import PatientProtocol

    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(app, http=PatientProtocol, ws="none", log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    return server, thread, listening.getsockname()[1]


@contextmanager
def run_command(command: list, log: Path, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen, int]]:
    """Starts a server as a process of its own, with `--port`, and kills it in the end.

    Yields:
        The process and its port, as soon as `/health` answers.
    """
    port = find_port()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield process, port
    finally:
        process.kill()
        process.wait()


@contextmanager
def run_front(server: Server) -> Iterator[Server]:
    """Another server, without a key, in front of one: the way to vLLM and other engines behind ours."""
    from convllava_hf.serving.backends import RemoteBackend
    from convllava_hf.serving.server import ServerOptions, build_app

    backend = RemoteBackend(f"{server.url}/v1", "m", KEY, 4_000_000, 64, 8)
    running, thread, port = start_app(build_app(backend, ServerOptions("front")))
    try:
        yield Server(port, backend, server.model, server.processor)
    finally:
        running.should_exit = True
        thread.join(60)
