"""One real server on loopback for all tests of serving, in a thread, on the converted reference checkpoint."""

from pathlib import Path

import pytest
from PIL import Image
from running_server import KEY, Server, start_app


@pytest.fixture(scope="session")
def server(converted: Path):
    """Limits are small: 4 megapixels, 1 MiB of images, 64 tokens. `localhost` is an allowed host."""
    from convllava_hf.inference.load import load
    from convllava_hf.registration import register
    from convllava_hf.serving.backends import LocalBackend
    from convllava_hf.serving.engine import Engine
    from convllava_hf.serving.server import ServerOptions, build_app

    register()
    model, processor = load(converted, device="cpu", dtype="float32")
    backend = LocalBackend(Engine(model, processor, max_queue=32), 4_000_000, 64)
    options = ServerOptions("tiny", KEY, 2**20, frozenset({"localhost", "images.test"}))
    running, thread, port = start_app(build_app(backend, options))
    yield Server(port, backend, model, processor)
    running.should_exit = True
    thread.join(60)
    assert not thread.is_alive(), "the server did not shut down"


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Photographs of different shapes: noise in three colours."""
    import numpy as np

    random = np.random.default_rng(0)
    sizes = ((96, 64), (64, 64), (40, 120), (64, 96))
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in sizes]
