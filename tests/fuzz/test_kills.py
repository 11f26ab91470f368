"""Commands killed (`kill -9`) at random places: the old result is there or the new one, whole, or what a person needs
to get the old one back; and the same command, run again, ends well.

A command runs in a copy of this process and dies before a call of the system that was drawn (opening, renaming,
connecting), or, every other time, after a part of its time. Seeded by the number of the round, which a failure names. A
small run by default, a long one marked `slow`.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_parts import save_language_model, save_tower
from transformers import AutoModelForImageTextToText

from convllava_hf.checkpoints.staging import MANIFEST, find_replaced, list_foreign, stage_output
from convllava_hf.conversion.convert import convert_checkpoint
from convllava_hf.conversion.deltas import apply_delta
from convllava_hf.conversion.init import init_model
from convllava_hf.conversion.parts import merge_adapter
from convllava_hf.data.build import build_dataset
from convllava_hf.hub.pull import pull_checkpoint
from convllava_hf.hub.push import push_checkpoint
from convllava_hf.registration import register


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are copies of this one")
ROUNDS = [2, pytest.param(100, marks=pytest.mark.slow)]
# Python tells of these before they happen, see the table of audit events in its documentation.
CALLS = ("open", "os.", "shutil.", "tempfile.", "socket.connect", "subprocess.")
# Times and measurements are in them, or hashes of those.
VOLATILE = {MANIFEST, "conversion_report.json", "delta_report.json", "build_report.json", ".build"}
REPO = "someone/tiny"


def run_copy(action: Callable[[], object], kill_at: int | None = None, seconds: float | None = None) -> int:
    """Runs an action in a copy of this process, which dies before its call number `kill_at`, or after `seconds`.

    Returns:
        How many calls it made.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        process, calls = os.getpid(), 0

        def count(event, arguments):
            nonlocal calls
            if event.startswith(CALLS) and os.getpid() == process:
                calls += 1
                if calls == kill_at:
                    os.kill(process, signal.SIGKILL)

        try:
            torch.set_num_threads(1)  # those of the other process are not here
            sys.addaudithook(count)
            if seconds is not None:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process as abruptly
                signal.setitimer(signal.ITIMER_REAL, seconds)
            action()
            os.write(sender, str(calls).encode())
        except BaseException:
            os.write(sender, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
    assert was_killed or said.isdigit(), said or f"status {status}"
    return int(said or 0)


def kill_at_random(action: Callable[[], object], number: int, calls: int, seconds: float):
    dice = random.Random(number)
    place = {"seconds": dice.uniform(0.001, seconds)} if number % 2 else {"kill_at": dice.randrange(1, calls + 1)}
    run_copy(action, **place)


def hash_files(folder: Path) -> dict[str, str] | None:
    """Name -> hash of what is always the same; `None` where there is no folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and not {*path.parts} & VOLATILE]
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return hashes if folder.is_dir() else None


@pytest.fixture(scope="session")
def commands(tmp_path_factory, reference, checkpoint) -> dict[str, Callable[[Path], object]]:
    """Name -> what the command does, of the place for its output, which is replaced if it is there."""
    register()
    folder = tmp_path_factory.mktemp("sources")
    released, delta = reference / "convllava", reference / "llava_v0_delta"
    tower, language = save_tower("convnext", folder / "tower"), save_language_model("qwen3", folder / "language")
    config = LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
    get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), config).save_pretrained(folder / "adapter")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    (folder / "rows.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}] * 40))
    Image.new("RGB", (9, 7)).save(folder / "a.png")
    rows = [(folder / "rows.json", folder)]
    return {
        "convert": lambda output: convert_checkpoint(
            released / "llm",
            output,
            vision_tower=released / "vision",
            max_shard_size="100KB",
            force=output.exists(),
        ),
        "init": lambda output: init_model(tower, language, output, force=output.exists()),
        "merge": lambda output: merge_adapter(folder / "adapter", output, base=str(checkpoint), force=output.exists()),
        "apply-delta": lambda output: apply_delta(
            delta / "base", delta / "delta", output, max_shard_size="100KB", force=output.exists()
        ),
        "data build": lambda output: build_dataset(
            rows, output, shard_rows=10, force=output.exists(), show_progress=False
        ),
    }


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("name", ["convert", "init", "merge", "apply-delta", "data build"])
def test_killed_commands_leave_the_old_or_the_new(commands, name, rounds, tmp_path):
    make, output, before = commands[name], tmp_path / "place" / "output", tmp_path / "before"
    with stage_output(before, 0, False) as folder:
        (folder / "config.json").write_text('{"model_type": "old"}')
    make(output)
    old, new = hash_files(before), hash_files(output)
    shutil.rmtree(output.parent)
    started = time.monotonic()
    calls = run_copy(lambda: make(output))
    seconds = time.monotonic() - started
    assert hash_files(output) == new and calls > 20
    for number in range(rounds):
        shutil.rmtree(output.parent)
        output.parent.mkdir()
        was_there = number % 3 < 2
        if was_there:
            shutil.copytree(before, output)
        kill_at_random(lambda: make(output), number, calls, seconds)
        found, replaced = hash_files(output), find_replaced(output)
        if replaced:  # between two renames; the next command names it, whole as it was
            assert hash_files(replaced) == old and found in (None, new), f"round {number}"
        else:
            assert found in ([old, new] if was_there else [None, new]), f"round {number}"
        assert not output.exists() or list_foreign(output) == [], f"round {number}"
        make(output)
        assert hash_files(output) == new and list_foreign(output) == [], f"round {number}"


@pytest.mark.parametrize("rounds", ROUNDS)
def test_killed_pushes_publish_all_or_nothing(hub, checkpoint, rounds, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "tiny")  # shards stay beside it

    def push():
        return push_checkpoint(folder, REPO, shard_size="100KB")

    def list_published() -> dict[str, str]:
        return {name: entry["oid"] for name, entry in hub.list_files(REPO).items()}

    push_checkpoint(folder, REPO)
    before, old, objects = hub.read_repo(REPO), list_published(), set((hub.root / "objects").iterdir())
    started = time.monotonic()
    calls = run_copy(push)
    seconds, new = time.monotonic() - started, list_published()
    assert new != old and calls > 20
    for number in range(rounds):
        hub.write_repo(REPO, before)
        for path in set((hub.root / "objects").iterdir()) - objects:
            path.unlink()
        kill_at_random(push, number, calls, seconds)
        assert list_published() in (old, new), f"round {number}"
        push()
        assert list_published() == new, f"round {number}"


@pytest.mark.parametrize("rounds", ROUNDS)
def test_killed_pulls_leave_the_old_or_the_new(hub, checkpoint, rounds, tmp_path):
    output = tmp_path / "place" / "output"
    push_checkpoint(checkpoint, REPO, shard_size="100KB")
    started = time.monotonic()
    calls = run_copy(lambda: pull_checkpoint(REPO, output))
    seconds, new = time.monotonic() - started, hash_files(output)
    assert new and calls > 20
    for number in range(rounds):
        shutil.rmtree(output.parent)
        kill_at_random(lambda: pull_checkpoint(REPO, output), number, calls, seconds)
        assert hash_files(output) in (None, new), f"round {number}"
        pull_checkpoint(REPO, output, force=True)
        assert hash_files(output) == new and list_foreign(output) == [], f"round {number}"
