"""A Hub that fails at random: pushing and pulling end in one line or do what they are asked, nothing half lies under a
final name, and the same command ends well once the Hub does.

Seeded by the number of the round, which a failure names. A small run by default, a long one marked `slow`.
"""

import hashlib
import random
import re
import shutil
from pathlib import Path

import pytest
from hub_server import WRITE_TOKEN, Fault
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.hub.client import HubError
from convllava_hf.hub.pull import pull_checkpoint
from convllava_hf.hub.push import push_checkpoint


ROUNDS = [12, pytest.param(300, marks=pytest.mark.slow)]
REPO = "someone/tiny"
STATUS = [400, 401, 403, 404, 409, 412, 416, 429, 500, 502, 503, 504]
ZEROS = "0" * 40


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """The client waits for seconds before it asks again."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**14)


def draw_fault(dice: random.Random, requests: list[tuple[str, str]]) -> Fault:
    """A fault at one of the requests that a healthy run makes, or at all of a kind."""
    method, path = dice.choice(requests)
    path = dice.choice([re.escape(path), re.sub(r"[0-9a-f]{40,}", ".*", path), ".*"])
    odd = dice.choice(
        [
            {"ETag": f'"{ZEROS}"'},
            {"X-Linked-Etag": f'"{ZEROS}"'},
            {"X-Repo-Commit": ZEROS},
            {"X-Linked-Size": "1"},
            {"Location": "/nowhere"},
            {"Content-Type": "text/html"},
            {"Link": '<http://elsewhere.example/x>; rel="next"'},
        ]
    )
    kind = dice.choice(
        [
            {"status": dice.choice(STATUS)},
            {"drop_after": dice.choice([0, 1, 100, dice.randrange(300_000)])},
            {"corrupt": True},
            {"cut": dice.choice([0, 1, dice.randrange(1000)])},
            {"headers": odd},
        ]
    )
    return Fault(method, path, times=dice.choice([1, 1, 2, 1000]), skip=dice.choice([0, 0, 1, 5]), **kind)


def try_with_faults(hub, faults: list[Fault], action, number: int) -> bool:
    """Whether it succeeds; if not, in one line."""
    hub.faults[:] = faults
    try:
        action()
        return True
    except (HubError, ConversionError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 and WRITE_TOKEN not in str(error), f"round {number}"
        return False
    except Exception as error:
        raise AssertionError(f"round {number}, {faults}: {type(error).__name__}: {error}") from error
    finally:
        hub.faults.clear()


def hash_files(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".convllava")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("rounds", ROUNDS)
def test_pulling_from_a_hub_that_fails(hub, checkpoint, rounds, tmp_path):
    push_checkpoint(checkpoint, REPO, shard_size="100KB")
    hub.requests.clear()
    output, cache = tmp_path / "place" / "output", Path(constants.HF_HUB_CACHE)
    whole = hash_files(pull_checkpoint(REPO, output))
    requests = sorted({(request.method, request.path) for request in hub.requests})
    for number in range(rounds):
        shutil.rmtree(output.parent, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
        dice = random.Random(number)
        faults = [draw_fault(dice, requests) for _ in range(dice.randint(1, 3))]
        place = output if number % 2 else None

        def pull(place=place, force=False):
            close_session()  # the next command is another process, which does not find connections that were dropped
            return pull_checkpoint(REPO, place, force=force)

        done = try_with_faults(hub, faults, pull, number)
        assert output.exists() == (done and place == output), f"round {number}, {faults}"
        assert not output.exists() or hash_files(output) == whole, f"round {number}, {faults}"
        if not done:
            try_with_faults(
                hub, [], lambda place=place: pull_checkpoint(REPO, place), number
            )  # removes what is damaged
        assert hash_files(pull(force=True)) == whole, f"round {number}, {faults}"


@pytest.mark.parametrize("rounds", ROUNDS)
def test_pushing_to_a_hub_that_fails(hub, checkpoint, rounds):
    def push():
        close_session()
        return push_checkpoint(checkpoint, REPO, shard_size="100KB")

    def list_published() -> dict[str, str]:
        return {name: entry["oid"] for name, entry in hub.list_files(REPO).items()}

    push_checkpoint(checkpoint, REPO)
    before, old, objects = hub.read_repo(REPO), list_published(), set((hub.root / "objects").iterdir())
    hub.requests.clear()
    push()
    new = list_published()
    requests = sorted({(request.method, request.path) for request in hub.requests})
    for number in range(rounds):
        hub.write_repo(REPO, before)
        for path in set((hub.root / "objects").iterdir()) - objects:
            path.unlink()
        dice = random.Random(number)
        faults = [draw_fault(dice, requests) for _ in range(dice.randint(1, 3))]
        try_with_faults(hub, faults, push, number)
        assert list_published() in (old, new), f"round {number}, {faults}"
        push()
        assert list_published() == new, f"round {number}, {faults}"
        assert [path.name for path in checkpoint.parent.iterdir()] == ["tiny"], f"round {number}, {faults}"
