"""Where results are put: only what this package made is replaced, and what a killed run leaves is named."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
from transformers.utils.logging import disable_propagation, enable_propagation

from convllava_hf.checkpoints.staging import (
    MANIFEST,
    check_output,
    find_replaced,
    list_foreign,
    stage_file,
    stage_output,
)
from convllava_hf.checkpoints.weight_maps import ConversionError


@pytest.fixture
def made(tmp_path) -> Path:
    """A folder that this package made."""
    with stage_output(tmp_path / "model", 0, False) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text("# A card\n")
        (folder / "model.safetensors").write_bytes(bytes(2**20 + 1))
        (folder / "more").mkdir()
        (folder / "more" / "x.json").write_text("1")
    return tmp_path / "model"


def replace(output: Path):
    with stage_output(output, 0, True) as folder:
        (folder / "config.json").write_text('{"new": 1}')


def test_what_was_made_here_is_replaced(made):
    assert (made / MANIFEST).is_file() and list_foreign(made) == []
    replace(made)
    assert (made / "config.json").read_text() == '{"new": 1}' and not (made / "README.md").exists()


@pytest.mark.parametrize(
    "name", [".git/HEAD", "thesis.tex", "photos/IMG_1.jpg", "README.md", "empty/", "link", "model.safetensors"]
)
def test_force_refuses_what_others_made_or_changed_by_name(made, name):
    """A repository with commits, documents, raw images, an edited card, other weights of another size."""
    path = made / name
    path.parent.mkdir(exist_ok=True)
    if name == "link":
        path.symlink_to("/")
    elif name.endswith("/"):
        path.mkdir()
    else:
        path.write_text("years of work")
    before = sorted(made.rglob("*"))
    with pytest.raises(ConversionError, match=rf"\({name}\).*--force"):
        replace(made)
    assert sorted(made.rglob("*")) == before and [path.name for path in made.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("manifest", [None, "[", "[]", '{"files": 1}', '{"files": {"config.json": 1}}', "[" * 10**5])
def test_folders_without_a_manifest_are_never_replaced(made, manifest):
    (made / MANIFEST).unlink() if manifest is None else (made / MANIFEST).write_text(manifest)
    with pytest.raises(ConversionError, match="config.json"):
        replace(made)


def test_what_appears_during_the_work_is_kept(tmp_path):
    with pytest.raises(ConversionError, match="--force"), stage_output(tmp_path / "model", 0, False):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine").write_text("x")
    assert (tmp_path / "model" / "mine").read_text() == "x"


@pytest.mark.parametrize("after", ["first rename", "second rename"])
def test_a_kill_while_a_model_is_replaced_is_mentioned_and_loses_nothing(made, caplog, after):
    """The first rename takes the old model away, the second puts the new one there."""
    made.rename(made.with_name(".model.replaced-0123"))
    if after == "second rename":
        made.mkdir()
    (old,) = made.parent.glob(".model.replaced-*")
    assert (old / "README.md").read_text() == "# A card\n"
    enable_propagation()
    check_output(made, True)
    disable_propagation()
    way = "rename it to get it back" if after == "first rename" else "delete it if it is not needed"
    assert [str(old) in record.getMessage() and way in record.getMessage() for record in caplog.records] == [True]


def test_a_kill_while_the_old_model_is_deleted_leaves_no_half_of_it_under_its_name(made, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", stop)
        replace(made)
    assert find_replaced(made) is None and (made / "config.json").read_text() == '{"new": 1}'


@pytest.mark.parametrize("force", [False, True])
def test_a_mount_point_is_refused_before_any_work(force):
    """The root of the file system is one everywhere; `test_full_disk` mounts another."""
    with pytest.raises(ConversionError, match="^/ "):
        check_output(Path("/"), force)


def test_a_place_that_takes_no_files_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="file .*--output"):
        check_output(tmp_path / "file" / "model", False)


def test_a_file_appears_when_it_is_whole(tmp_path):
    """A real limit of the system stops the writing in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConversionError, match=f"projector.bin .*{os.strerror(errno.EFBIG)}"):
            with stage_file(tmp_path / "projector.bin") as staging:
                staging.write_bytes(bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    with stage_file(tmp_path / "projector.bin") as staging:
        staging.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["projector.bin"]
