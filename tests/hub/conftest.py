"""What the tests of the Hub share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny"))
