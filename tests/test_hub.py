"""Push and pull against a small Hub on loopback, through huggingface_hub's real client."""

from pathlib import Path

import huggingface_hub
import pytest
from hub_server import WRITE_TOKEN, HubServer
from huggingface_hub import constants
from tiny_checkpoint import save_tiny_checkpoint

from convllava_hf.hub import pull_checkpoint, push_checkpoint


REPO = "someone/tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running server that huggingface_hub of this process is pointed at, by its own settings."""
    with HubServer(tmp_path / "server").run() as server:
        for name, value in (
            ("ENDPOINT", server.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_TOKEN_PATH", str(tmp_path / "no-token")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        yield server


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_push_and_pull_give_the_same_files(hub, checkpoint, tmp_path):
    report = push_checkpoint(checkpoint, REPO)
    assert report.url.startswith(f"{hub.endpoint}/{REPO}/commit/")
    pulled = read_folder(pull_checkpoint(REPO))
    card = pulled.pop("README.md")
    del pulled[".gitattributes"]
    assert pulled == read_folder(checkpoint)
    assert card.startswith(b"---")
    titles = [commit["title"] for commit in hub.read_repo(REPO)["commits"].values()]
    assert titles == ["initial commit", "Upload tiny"]
