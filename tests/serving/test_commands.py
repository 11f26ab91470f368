"""The commands: what is refused before anything loads, and the real process from start to shutdown."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running_server import build_data_url
from transformers.image_utils import httpx
from typer.testing import CliRunner

from convllava_hf.cli.app import app


CONVLLAVA = Path(sys.executable).with_name("convllava")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "nosuchdir"], "there is no folder 'nosuchdir'"),
        (["serve", "./no/such"], "there is no folder"),
        (["serve", "."], "holds no config.json"),
        (["serve", "owner/name", "--allow-url", "http://x/"], "expected the name of a host"),
        (["serve", "owner/name", "--engine", "fast"], "expected transformers or vllm"),
        (["demo"], "expected a CHECKPOINT"),
        (["demo", "nosuchdir"], "there is no folder"),
        (["batch", "photos", "-m", "nosuchdir", "-o", "x"], "there is no folder"),
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3 and message in done.output
    assert time.monotonic() - started < 20


def test_listening_to_everyone_without_a_key_warns(monkeypatch, tmp_path):
    from convllava_hf.cli import serving

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.delenv("CONVLLAVA_API_KEY", raising=False)

    def stop(*arguments, **settings):
        raise ValueError("stop here")

    monkeypatch.setattr(serving, "load_engine", stop)
    runner = CliRunner()
    arguments = ["serve", str(tmp_path), "--host"]
    assert "everyone who reaches 0.0.0.0" in runner.invoke(app, [*arguments, "0.0.0.0"]).output
    assert "everyone" not in runner.invoke(app, [*arguments, "0.0.0.0", "--api-key", "k"]).output
    assert "everyone" not in runner.invoke(app, [*arguments, "127.0.0.1"]).output


@pytest.mark.slow  # a process of its own, which imports everything
def test_the_command_serves_and_shuts_down_in_good_order(converted, tmp_path, pictures):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [CONVLLAVA, "serve", converted, "--port", str(port), "--device", "cpu", "--served-model-name", "mine"]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "HF_HOME": str(tmp_path / "none")}
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1"
        assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "mine"
        assert httpx.get(f"{url}/models", headers={"Host": "evil.example"}).status_code == 403

        subprocess.run(
            [
                sys.executable,
                Path(__file__).parents[2] / "examples" / "serve_client.py",
                save(pictures[0], tmp_path),
                "What secret?",
                "--url",
                url,
            ],
            check=True,
            timeout=600,
        )
        body = json.dumps({"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4})
        curl = ["curl", "-s", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", body]
        assert json.loads(subprocess.run(curl, capture_output=True, check=True, timeout=60).stdout)["choices"]

        with httpx.stream(
            "POST",
            f"{url}/chat/completions",
            json={"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 64},
            timeout=60,
        ) as response:
            process.send_signal(signal.SIGTERM)
            assert list(response.iter_lines())[-2] == "data: [DONE]", "what is under way ends first"
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn hands the signal on when all is done
    finally:
        process.kill()
    text = log.read_text()
    assert "Traceback" not in text and "secret" not in text and build_data_url(pictures[0])[30:60] not in text
    assert "POST /v1/chat/completions 200" in text


def save(picture, folder: Path) -> Path:
    picture.save(folder / "picture.png")
    return folder / "picture.png"
