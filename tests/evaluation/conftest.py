"""What the tests of other harnesses share."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest


@pytest.fixture(scope="session")
def served(converted, tmp_path_factory):
    """The address of `convllava serve` on the reference checkpoint, a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, url = tmp_path_factory.mktemp("served") / "log", f"http://127.0.0.1:{port}/v1"
    command = [Path(sys.executable).with_name("convllava"), "serve", converted, "--device", "cpu", "--port", port]
    with open(log, "w") as out:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            urlopen(f"{url}/models").close()
            break
        except URLError:  # not yet
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(60)
