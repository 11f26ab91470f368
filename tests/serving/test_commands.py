"""The commands: what is refused before anything loads, and the real process from start to shutdown."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running_server import build_data_url, run_command
from transformers.image_utils import httpx
from typer.testing import CliRunner

from convllava_hf.cli.app import app
from convllava_hf.inference.answer import answer


CONVLLAVA = Path(sys.executable).with_name("convllava")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "nosuchdir"], "nosuchdir"),
        (["serve", "./no/such"], "./no/such"),
        (["serve", "."], "config.json"),
        (["serve", "owner/name", "--allow-url", "http://x/"], "--allow-url http://x/"),
        (["serve", "owner/name", "--engine", "fast"], "--engine fast"),
        (["demo"], "--server"),
        (["demo", "nosuchdir"], "nosuchdir"),
        (["batch", "photos", "-m", "nosuchdir", "-o", "x"], "nosuchdir"),
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
    told = runner.invoke(app, [*arguments, "0.0.0.0"]).output
    assert "warning" in told and "0.0.0.0" in told and "--api-key" in told
    assert "warning" not in runner.invoke(app, [*arguments, "0.0.0.0", "--api-key", "k"]).output
    assert "warning" not in runner.invoke(app, [*arguments, "127.0.0.1"]).output


def test_vllm_that_is_not_there_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--engine", "vllm"])
    assert done.exit_code == 3 and "pip install vllm" in done.output


@pytest.mark.slow  # a process of its own, which imports everything
def test_the_command_serves_and_shuts_down_in_good_order(converted, tmp_path, pictures, server):
    log = tmp_path / "log"
    command = [CONVLLAVA, "serve", converted, "--device", "cpu", "--dtype", "float32", "--served-model-name", "mine"]
    with run_command(command, log, {**os.environ, "HF_HOME": str(tmp_path / "none")}) as (process, port):
        url = f"http://127.0.0.1:{port}/v1"
        assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "mine"
        assert httpx.get(f"{url}/models", headers={"Host": "evil.example"}).status_code == 403

        pictures[0].save(tmp_path / "picture.png")
        client = [sys.executable, Path(__file__).parents[2] / "examples" / "serve_client.py"]
        client += [tmp_path / "picture.png", "What secret?", "--url", url]
        told = subprocess.run(client, capture_output=True, text=True, check=True, timeout=600).stdout
        assert answer(server.model, server.processor, "What secret?", [pictures[0]], max_new_tokens=4)[:4] in told
        body = json.dumps({"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4})
        curl = ["curl", "-s", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", body]
        assert json.loads(subprocess.run(curl, capture_output=True, check=True, timeout=60).stdout)["choices"]

        chat = [CONVLLAVA.with_name("transformers"), "chat", "mine", url, "do_sample=False", "max_new_tokens=6"]
        # The answer is cut, so "Continue generating?" is asked.
        lines = "Hello?\nn\n!exit\n" + "!exit\n" * 3
        environment = {**os.environ, "HF_HUB_OFFLINE": "0"}  # in its words, a server on loopback is the Hub
        told = subprocess.run(chat, input=lines, env=environment, capture_output=True, text=True, timeout=600)
        expected = answer(server.model, server.processor, "Hello?", max_new_tokens=6)
        assert told.returncode == 0 and expected in " ".join(told.stdout.split()), told.stdout + told.stderr

        with httpx.stream(
            "POST",
            f"{url}/chat/completions",
            json={"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 64},
            timeout=60,
        ) as response:
            process.send_signal(signal.SIGTERM)
            assert list(response.iter_lines())[-2] == "data: [DONE]", "what is under way ends first"
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn hands the signal on when all is done
    text = log.read_text()
    assert "Traceback" not in text and "secret" not in text and build_data_url(pictures[0])[30:60] not in text
    assert "POST /v1/chat/completions 200" in text
