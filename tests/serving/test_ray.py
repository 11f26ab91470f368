"""The examples for Ray, as they are run: replicas that are killed, become more, are replaced; work by two workers.

Needs `pip install "ray[data,serve]"`.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from loopback import find_port
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


class Load:
    """Clients that ask without a pause, whole answers and streams in turns, as long as the block runs.

    Args:
        url: of the server.
        contents: what they ask, in turns.
        clients: how many.
        max_tokens: of each answer.

    Attributes:
        answers: (number of the content, answer), in order.
        failures: statuses and errors of the requests that were lost.
    """

    def __init__(self, url: str, contents: list, clients: int = 6, max_tokens: int = 24):
        self.url, self.contents, self.max_tokens, self.ended = url, contents, max_tokens, threading.Event()
        self.answers, self.failures = [], []
        self.threads = [threading.Thread(target=self.ask, args=(number,)) for number in range(clients)]

    def ask(self, number: int):
        while not self.ended.is_set():
            number += 1
            messages = [{"role": "user", "content": self.contents[number % 2]}]
            body = {"messages": messages, "max_tokens": self.max_tokens, "stream": number % 4 > 1}
            try:
                reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=300).raise_for_status()
                if body["stream"]:
                    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
                    told = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                else:
                    told = reply.json()["choices"][0]["message"]["content"]
                self.answers.append((number % 2, told))
            except Exception as error:
                self.failures.append(repr(error))

    def wait(self, more: int) -> None:
        """Waits for more answers."""
        target = len(self.answers) + more
        wait_for(lambda: len(self.answers) >= target or self.failures, f"{more} more answers")

    def __enter__(self):
        [thread.start() for thread in self.threads]
        return self

    def __exit__(self, *error):
        self.ended.set()
        [thread.join() for thread in self.threads]


@pytest.fixture
def contents(pictures) -> list:
    return ["Hello?", build_content("What is this?", build_data_url(pictures[0]))]


def list_answers(server, contents, max_tokens: int) -> set[tuple[int, str]]:
    """What the model answers."""
    replies = [server.ask(content, max_tokens=max_tokens).json() for content in contents]
    return {(number, reply["choices"][0]["message"]["content"]) for number, reply in enumerate(replies)}


def test_a_replica_is_killed_and_no_request_is_lost(converted, server, contents, tmp_path):
    expected = list_answers(server, contents, 24)
    command = [sys.executable, EXAMPLES / "ray_serve.py", converted, "--dtype", "float32", "--max-tokens", "64"]
    with run_command(command, tmp_path / "log", ENVIRONMENT) as (process, port):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: len(find_replicas(process.pid)) == 2, "two replicas")
        with Load(url, contents) as load:
            load.wait(12)
            first = find_replicas(process.pid)
            os.kill(min(first), signal.SIGKILL)
            wait_for(lambda: len(find_replicas(process.pid) - first) == 1, "a replica in its place")
            load.wait(12)
        assert not load.failures, load.failures[:3]
        assert set(load.answers) == expected
        # The front has the rules of the server.
        refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": [], "tools": []})
        assert refused.status_code == 400 and "tools" in refused.json()["error"]["message"]
        answered = f'convllava_requests_total{{status="200"}} {len(load.answers)}'
        assert answered in httpx.get(f"{url}/metrics").text


def test_replicas_become_more_under_load(converted, server, contents, tmp_path):
    command = [sys.executable, EXAMPLES / "ray_serve.py", converted, "--dtype", "float32"]
    command += ["--replicas", "1", "--max-replicas", "2"]
    with run_command(command, tmp_path / "log", ENVIRONMENT) as (process, port):
        wait_for(lambda: len(find_replicas(process.pid)) == 1, "a replica")
        with Load(f"http://127.0.0.1:{port}", contents, clients=40) as load:
            wait_for(lambda: len(find_replicas(process.pid)) == 2, "a second replica")
            load.wait(40)
        assert not load.failures, load.failures[:3]
        assert set(load.answers) == list_answers(server, contents, 24)


@pytest.fixture
def cluster(tmp_path):
    """A cluster of this machine, as `ray start --head` makes it; the process, and what leads to it."""
    port, folder = find_port(), tempfile.mkdtemp(prefix="ray")  # names of sockets have to be short
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port", str(port)]
    command += ["--num-cpus", "4", "--include-dashboard", "false", "--temp-dir", folder]
    environment = {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with (tmp_path / "cluster").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield process.pid, {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_an_update_rolls_and_no_request_is_lost(converted, server, contents, cluster, tmp_path):
    """The second deployment allows shorter answers: each is the old one or the new one, and in the end the new one."""
    head, environment = cluster
    port = find_port()
    command = [sys.executable, EXAMPLES / "ray_serve.py", converted, "--dtype", "float32", "--port", str(port)]

    def deploy(max_tokens: int):
        limit = ["--max-tokens", str(max_tokens), "--detach"]
        done = subprocess.run([*command, *limit], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]

    old, new = (list_answers(server, contents, tokens) for tokens in (24, 8))
    assert not old & new
    deploy(24)
    with Load(f"http://127.0.0.1:{port}", contents) as load:
        load.wait(12)
        first = find_replicas(head)
        assert len(first) == 2
        deploy(8)
        wait_for(lambda: len(find_replicas(head) - first) == 2 and not find_replicas(head) & first, "new replicas")
        load.wait(12)
        begun = len(load.answers)
        load.wait(24)
    assert not load.failures, load.failures[:3]
    assert set(load.answers) == old | new and set(load.answers[begun:]) == new


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
