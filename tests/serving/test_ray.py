"""The examples for Ray, as they are run: two replicas of which one is killed, and batch work by two workers.

Needs `pip install "ray[data,serve]"`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running_server import build_content, build_data_url, run_command
from transformers.image_utils import httpx

from convllava_hf.inference.answer import answer


EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
ENVIRONMENT = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "OMP_NUM_THREADS": "1",
}
pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def list_processes(driver: int) -> dict[int, str]:
    """The processes that a driver and its children started, and their command lines."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            commands[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)

    def belongs(process: int) -> bool:
        return process == driver or (process in parents and belongs(parents[process]))

    return {process: commands[process] for process in parents if belongs(process)}


def find_replicas(driver: int) -> set[int]:
    """The processes of replicas, by the titles that Ray gives them."""
    titles = list_processes(driver)
    return {process for process in titles if "ServeReplica:convllava:Replica" in titles[process]}


def wait_for(check, what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_replica_is_killed_and_no_request_is_lost(converted, server, pictures, tmp_path):
    contents = ["Hello?", build_content("What is this?", build_data_url(pictures[0]))]
    expected = [server.ask(content, max_tokens=24).json()["choices"][0]["message"]["content"] for content in contents]
    statuses, wrong, ended = [], [], threading.Event()

    def ask(number: int, url: str):
        """Whole answers and streams in turns, until the end."""
        while not ended.is_set():
            number += 1
            messages = [{"role": "user", "content": contents[number % 2]}]
            body = {"messages": messages, "max_tokens": 24, "stream": number % 4 > 1}
            try:
                reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
                statuses.append(reply.status_code)
                if body["stream"]:
                    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
                    told = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                else:
                    told = reply.json()["choices"][0]["message"]["content"]
                if told != expected[number % 2]:
                    wrong.append((told, expected[number % 2]))
            except Exception as error:
                statuses.append(repr(error))

    log = tmp_path / "log"
    command = [sys.executable, EXAMPLES / "ray_serve.py", converted, "--dtype", "float32", "--max-tokens", "64"]
    with run_command(command, log, ENVIRONMENT) as (process, port):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: len(find_replicas(process.pid)) == 2, "two replicas")
        threads = [threading.Thread(target=ask, args=(number, url)) for number in range(6)]
        [thread.start() for thread in threads]
        try:
            wait_for(lambda: len(statuses) >= 12, "answers before")
            first = find_replicas(process.pid)
            victim = min(first)
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: len(find_replicas(process.pid) - first) == 1, "a replica in its place")
            answered = len(statuses)
            wait_for(lambda: len(statuses) >= answered + 12, "answers afterwards")
        finally:
            ended.set()
            [thread.join() for thread in threads]
        assert set(statuses) == {200}, [status for status in statuses if status != 200][:3]
        assert not wrong, wrong[:3]
        # The front has the rules of the server.
        refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": [], "tools": []})
        assert refused.status_code == 400 and "tools" in refused.json()["error"]["message"]
        assert f'convllava_requests_total{{status="200"}} {len(statuses)}' in httpx.get(f"{url}/metrics").text


def test_two_workers_answer_a_folder_and_go_on_where_they_stopped(converted, server, pictures, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "answers.jsonl"
    photos.mkdir()
    for number in range(6):
        pictures[number % 4].save(photos / f"{number}.png")
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "late").mkdir()
    command = [sys.executable, EXAMPLES / "ray_batch.py", photos, "What is this?", converted, output]
    command += ["--workers", "2", "--max-new-tokens", "8", "--dtype", "float32"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["id"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert set(found) == {*(f"{number}.png" for number in range(6)), "broken.png"}
    assert "broken.png" in found["broken.png"]["error"] and found["broken.png"]["answer"] is None
    expected = answer(server.model, server.processor, "What is this?", [pictures[1]], max_new_tokens=8)
    assert found["1.png"] == {"id": "1.png", "question": "What is this?", "answer": expected, "error": None}

    # As a killed run leaves it: two answers, and the beginning of a third.
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:20])
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert "5 rows" in done.stdout, done.stdout + done.stderr[-3000:]
    again = output.read_text().splitlines(keepends=True)
    assert again[:2] == lines[:2] and sorted(again) == sorted(lines)
