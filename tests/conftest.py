"""What every test shares: no network, a Hugging Face home of its own, one torch thread per test process."""

import gc
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest


TRANSFORMERS_MARKS = ("generate", "flash_attn_test", "torch_compile_test", "torch_export_test", "onnx_export_test")
TRANSFORMERS_MARKS += ("flash_attn_3_test", "flash_attn_4_test", "executorch_export_test")
# This file is read before any test imports torch or huggingface_hub, which look at the environment once. The processes
# of pytest-xdist inherit what the controlling process sets here, and so do the subprocesses that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    HOME = tempfile.TemporaryDirectory(prefix="convllava-hf-tests-")  # removed when the interpreter ends
    os.environ["HF_HOME"] = HOME.name
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_TOKEN"):
        os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Shells start background jobs with Ctrl-C ignored, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marks of transformers' own suites known where they run, see `transformers_suite.py`."""
    if "TRANSFORMERS_TESTS" in os.environ:
        for mark in TRANSFORMERS_MARKS:
            config.addinivalue_line("markers", mark)


def pytest_collection_finish() -> None:
    """What tests import stays; a training ends with a collection of garbage, which else takes longer than its steps."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def unquiet():
    """Undoes what quiets a process: `--quiet` of a command, and OpenVINO, which raises the level of the root logger."""
    from convllava_hf.cli.options import QUIET_ENVIRONMENT

    level = logging.root.level
    before = {name: os.environ.get(name) for name in QUIET_ENVIRONMENT}
    yield
    logging.root.setLevel(level)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_warning()


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses connections of this process to other machines, so that no test can come to depend on the network."""
    connect = socket.socket.connect

    def connect_to_loopback(self: socket.socket, address) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            if address[0] not in ("localhost", "::1") and not address[0].startswith("127."):
                raise PermissionError(f"a test tried to reach {address}; tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_loopback)


@pytest.fixture(scope="session")
def photo():
    """Noise, 64 pixels wide and 96 high."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of recorded outputs of the original implementations, one subfolder per model family."""
    return Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights, see `tiny_checkpoint`; who changes it takes a copy."""
    from tiny_checkpoint import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def converted(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference checkpoint in our format, as `convllava convert` makes it."""
    from convllava_hf.conversion.convert import convert_checkpoint

    folder = tmp_path_factory.mktemp("converted") / "ConvLLaVA-tiny"
    convert_checkpoint(reference / "convllava" / "llm", folder, vision_tower=reference / "convllava" / "vision")
    return folder


@pytest.fixture(scope="session")
def convert_family(reference: Path, tmp_path_factory: pytest.TempPathFactory):
    """Converts a reference of the LLaVA family once, as `convllava convert` does, its delta merged first."""
    from convllava_hf.conversion.convert import convert_checkpoint
    from convllava_hf.conversion.deltas import apply_delta

    done = {}

    def convert(family: str) -> Path:
        if family not in done:
            done[family] = tmp_path_factory.mktemp(family) / family
            source = reference / family / "model"
            (tower,) = (path for path in (reference / family).iterdir() if path.name.startswith(("clip-", "tiny-")))
            if not source.exists():
                source = done[family].with_name("merged")
                apply_delta(reference / family / "base", reference / family / "delta", source)
            convert_checkpoint(source, done[family], vision_tower=tower)
        return done[family]

    return convert


@pytest.fixture(scope="module")
def browser():
    """Debian's or Google's Chromium, headless, with a camera that shows a test picture and asks nobody."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine")
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A small Hub on loopback that huggingface_hub of this process is pointed at; see `hub_server`."""
    from hub_server import run_hub

    with run_hub(tmp_path, monkeypatch) as server:
        yield server
