"""Where a checkpoint is written: nothing is lost, nothing is left half."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
from tiny_sources import edit_weights, list_hidden
from transformers.utils.logging import disable_propagation, enable_propagation

from convllava_hf.checkpoints.reading import CheckpointReader
from convllava_hf.checkpoints.staging import stage_output
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.checkpoints.writing import write_checkpoint
from convllava_hf.conversion.convert import convert_checkpoint


def test_existing_output_is_kept_without_force(released, tmp_path):
    output = tmp_path / "model"
    first = convert_checkpoint(released / "llm", output, vision_tower=released / "vision")
    with pytest.raises(ConversionError, match="model .*--force"):
        convert_checkpoint(released / "llm", output, vision_tower=released / "vision")
    before = (output / "model.safetensors").stat().st_ino

    again = convert_checkpoint(released / "llm", output, vision_tower=released / "vision", force=True)
    assert (output / "model.safetensors").stat().st_ino != before
    assert first.content["files"] == again.content["files"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failure_with_force_keeps_the_old_output(broken):
    output = broken / "model"
    convert_checkpoint(broken / "llm", output, vision_tower=broken / "vision")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    edit_weights(broken / "vision/pytorch_model.bin", lambda w: w["embeddings.layernorm.bias"].fill_(1e6))
    with pytest.raises(ConversionError, match="65504"):
        convert_checkpoint(broken / "llm", output, vision_tower=broken / "vision", dtype="float16", force=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert list_hidden(broken) == []


def test_force_never_deletes_what_is_no_model(released, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(ConversionError, match="thesis.tex|file"):
            convert_checkpoint(released / "llm", tmp_path / name, vision_tower=released / "vision", force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_source_is_never_replaced(broken):
    (broken / "config.json").write_text("{}")
    for output in (broken / "llm", broken / "vision", broken):
        with pytest.raises(ConversionError, match=re.escape(str(output))):
            convert_checkpoint(broken / "llm", output, vision_tower=broken / "vision", force=True)
    assert (broken / "llm" / "tokenizer.model").exists()


def test_checkpoints_of_a_training_run_are_never_replaced(released, tmp_path):
    convert_checkpoint(released / "vision", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-100").mkdir()
    (tmp_path / "run" / "checkpoint-100" / "weights").write_text("a day of work")
    with pytest.raises(ConversionError, match="checkpoint-100"):
        convert_checkpoint(released / "vision", tmp_path / "run", force=True)
    assert (tmp_path / "run" / "checkpoint-100" / "weights").read_text() == "a day of work"


def test_empty_folder_and_missing_parents_are_fine(released, tmp_path):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "a" / "b" / "model"):
        convert_checkpoint(released / "vision", output)
        assert (output / "config.json").exists()
        assert oct(output.stat().st_mode)[-3:] == oct(output.parent.stat().st_mode)[-3:] or os.umask(0o022) >= 0


def test_interruption_leaves_nothing(released, tmp_path, monkeypatch):
    read, calls = CheckpointReader.read, []

    def interrupt(self, name):
        calls.append(name)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(CheckpointReader, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(released / "llm", tmp_path / "model", vision_tower=released / "vision")
    assert len(calls) == 60
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_in_the_middle_of_writing(released, tmp_path):
    """A real limit of the system (`ulimit -f`) stops the writing of the one weight file of 0.6 MB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(ConversionError, match=os.strerror(errno.EFBIG)) as raised:
            convert_checkpoint(released / "llm", tmp_path / "model", vision_tower=released / "vision")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Free some space or choose another --output" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# Subprocesses that only read and write call themselves as the command line does: registration is then left out, which
# would load all of transformers.
FULL_DISK = """
import os, subprocess, sys
sys.argv[0] = "convllava"
from pathlib import Path
import torch
from tokenizers import Tokenizer, models
from convllava_hf.checkpoints.staging import stage_output
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.checkpoints.writing import TensorToWrite, write_checkpoint

mount = Path(sys.argv[1])
tensors = [TensorToWrite(str(n), (1000,), torch.float32, lambda: torch.ones(1000)) for n in range(8)]
# Too small to begin with; then bytes enough, but no room for as many files: for the second shard, for the last one, and
# for the tokenizer, whose library is written in Rust and has errors of its own.
for options in ("size=8m", "size=64m,nr_inodes=4", "size=64m,nr_inodes=10", "size=64m,nr_inodes=11"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=True)
    try:
        with stage_output(mount / "model", 32_000, force=False) as folder:
            write_checkpoint(folder, tensors, max_shard_size=4000)
            Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    except ConversionError as error:
        print("REFUSED", options, len(error.__cause__.args) if error.__cause__ else None, error)
    print("LEFT", os.listdir(mount))
    subprocess.run(["umount", mount], check=True)
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount], check=True)
for force in (False, True):
    try:
        with stage_output(mount, 0, force=force):
            print("WORKED")
    except ConversionError as error:
        print("MOUNT POINT", error)
"""


def test_full_disk(tmp_path):
    """Real file systems without room, mounted in a namespace of this test's own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a file system of its own")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *lines, first, second = done.stdout.splitlines()
    assert first == second and first.startswith(f"MOUNT POINT {tmp_path} is a mount point"), done.stdout
    assert [line.split()[0] for line in lines] == ["REFUSED", "LEFT"] * 4, done.stdout
    assert set(lines[1::2]) == {"LEFT []"}
    assert "0.01 GB free; expected 0.03 GB" in lines[0]
    assert all(os.strerror(errno.ENOSPC) in line and "Free some space" in line for line in lines[2::2])


def test_disk_that_forgets_is_noticed(released, tmp_path, monkeypatch):
    """What is on the disk is read back: one bit that flips after writing is an error."""

    def write_and_flip(folder, *args):
        files = write_checkpoint(folder, *args)
        path = folder / files[0].name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return files

    monkeypatch.setattr("convllava_hf.conversion.writer.write_checkpoint", write_and_flip)
    with pytest.raises(ConversionError, match="model.safetensors"):
        convert_checkpoint(released / "vision", tmp_path / "tower")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_named(tmp_path, caplog):
    stale = tmp_path / ".model.incomplete-0123"
    for folder in (stale, tmp_path / ".other.incomplete-0123"):
        folder.mkdir()
    enable_propagation()
    with stage_output(tmp_path / "model", 0, False) as folder:
        (folder / "config.json").write_text("{}")
    disable_propagation()
    assert [record.getMessage().split()[0] for record in caplog.records] == [str(stale)] and stale.exists()


def test_library_errors_other_than_the_disk_are_not_disguised(tmp_path):
    with pytest.raises(ZeroDivisionError), stage_output(tmp_path / "model", 0, False):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
