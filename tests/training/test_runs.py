"""A run's folder: whose it is, one run at a time, and only complete checkpoints count."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import save_rows
from transformers.utils import logging

from convllava_hf.training.runs import (
    MANIFEST,
    UNFINISHED,
    claim_output,
    find_damage,
    find_last_checkpoint,
    place_checkpoint,
    remove_checkpoints,
    replace_model,
    restore_checkpoints,
    write_manifest,
)


RUN = {"recipe": "mine", "data": "rows", "model": "tiny", "rows per step": "4 x 1"}


def save_checkpoint(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(bytes(step))
    write_manifest(folder)
    return folder


@pytest.fixture
def warnings(caplog):
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_newest_complete_checkpoint_counts(tmp_path, warnings):
    assert find_last_checkpoint(tmp_path) is None
    for step in (2, 10, 12, 14, 16):
        save_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12" / "optimizer.pt").write_bytes(b"cut")
    (tmp_path / "checkpoint-14" / "scheduler.pt").unlink()
    (tmp_path / "checkpoint-16" / MANIFEST).unlink()
    assert find_last_checkpoint(tmp_path).name == "checkpoint-10"
    for message in (
        "checkpoint-12 is passed over: optimizer.pt has 3 bytes instead of 12",
        "checkpoint-14 is passed over: scheduler.pt is missing",
        f"checkpoint-16 is passed over: it has no {MANIFEST}",
    ):
        assert message in warnings.text


@pytest.mark.parametrize("name", [MANIFEST, "trainer_state.json"])
@pytest.mark.parametrize("content", [b"", b'{"glob', b"\xff", b"[]", b'"text"'])
def test_lists_that_cannot_be_read(tmp_path, name, content):
    folder = save_checkpoint(tmp_path, 2)
    (folder / name).write_bytes(content)
    assert "cannot be read" in find_damage(folder)


def test_used_folder_is_refused(tmp_path):
    with claim_output(tmp_path / "new" / "run", RUN, resume=False, replace=False):
        assert json.loads((tmp_path / "new" / "run" / "_run.json").read_text()) == RUN
    save_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=r"\(checkpoint-2\).*--resume_from_checkpoint last"):
        with claim_output(tmp_path, RUN, resume=False, replace=False):
            pass
    with claim_output(tmp_path, RUN, resume=False, replace=True):
        remove_checkpoints(tmp_path)
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("key", list(RUN))
def test_another_run_is_not_resumed(tmp_path, key):
    with claim_output(tmp_path, RUN, resume=False, replace=False):
        save_checkpoint(tmp_path, 2)
    with claim_output(tmp_path, RUN, resume=True, replace=False):
        pass
    with pytest.raises(ValueError, match=f"{key} '{RUN[key]}'.*'other'"):
        with claim_output(tmp_path, {**RUN, key: "other"}, resume=True, replace=False):
            pass


def test_two_runs_exclude_each_other(tmp_path):
    with claim_output(tmp_path, RUN, resume=False, replace=False):
        with pytest.raises(OSError, match=tmp_path.name):
            with claim_output(tmp_path, RUN, resume=True, replace=False):
                pass
    with claim_output(tmp_path, RUN, resume=False, replace=False):
        pass


def test_lock_of_a_killed_run_is_free(tmp_path):
    program = (
        "import sys, os; from convllava_hf.training.runs import claim_output\n"
        "with claim_output(sys.argv[1], {}, False, False): print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == "held" and done.returncode == -signal.SIGKILL
    (tmp_path / UNFINISHED / "checkpoint-2").mkdir(parents=True)
    with claim_output(tmp_path, RUN, resume=False, replace=False):
        assert not (tmp_path / UNFINISHED).exists()


def read_weights(output: Path, step: int) -> bytes:
    return (output / f"checkpoint-{step}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("is_new_whole", [True, False])
def test_checkpoint_whose_replacement_was_killed_is_put_back(tmp_path, is_new_whole):
    """Old and new lie in the folder of unfinished things, as between the two renames; the new one counts if whole."""
    save_checkpoint(tmp_path, 2)
    (tmp_path / "_run.json").write_text(json.dumps(RUN))
    old = save_checkpoint(tmp_path / UNFINISHED, 4)
    old.rename(old.with_name("checkpoint-4.replaced"))
    new = save_checkpoint(tmp_path / UNFINISHED, 4)
    (new / "model.safetensors").write_bytes(b"new!" if is_new_whole else b"new")
    with claim_output(tmp_path, RUN, resume=True, replace=False):
        assert find_last_checkpoint(tmp_path).name == "checkpoint-4"
        assert read_weights(tmp_path, 4) == (b"new!" if is_new_whole else bytes(4))
        assert not (tmp_path / UNFINISHED).exists()


def test_damaged_checkpoint_gives_way_to_a_whole_one_that_was_to_replace_it(tmp_path):
    (save_checkpoint(tmp_path, 4) / "model.safetensors").write_bytes(b"cut")
    save_checkpoint(tmp_path / UNFINISHED, 4)
    restore_checkpoints(tmp_path)
    assert find_damage(tmp_path / "checkpoint-4") is None and not (tmp_path / UNFINISHED).exists()


def test_kill_between_the_renames_loses_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 4)
    (save_checkpoint(tmp_path / UNFINISHED, 4) / "model.safetensors").write_bytes(b"new!")
    program = (
        "import os, sys; from pathlib import Path\n"
        "from convllava_hf.training.runs import UNFINISHED, place_checkpoint\n"
        "folder, rename = Path(sys.argv[1]), Path.rename\n"
        "Path.rename = lambda path, to: rename(path, to) and os.kill(os.getpid(), 9)\n"
        "place_checkpoint(folder / UNFINISHED / 'checkpoint-4', folder / 'checkpoint-4')"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "checkpoint-4").exists()
    restore_checkpoints(tmp_path)
    assert find_last_checkpoint(tmp_path).name == "checkpoint-4" and read_weights(tmp_path, 4) == b"new!"


def test_old_checkpoint_returns_when_the_new_one_cannot_be_moved(tmp_path):
    save_checkpoint(tmp_path, 4)
    with pytest.raises(FileNotFoundError):
        (tmp_path / UNFINISHED).mkdir()
        place_checkpoint(tmp_path / UNFINISHED / "checkpoint-4", tmp_path / "checkpoint-4")
    assert find_damage(tmp_path / "checkpoint-4") is None


def test_checkpoints_of_no_known_run_are_resumed_only_by_name(tmp_path, warnings):
    """Without the file that tells of the run they may be another's; a folder that holds a model alone is no run."""
    named = save_checkpoint(tmp_path / "run", 2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for folder, resume in ((named.parent, True), (tmp_path / "model", True), (tmp_path / "model", str(named))):
        with pytest.raises(ValueError, match="_run.json.*--resume_from_checkpoint .*-STEP"):
            with claim_output(folder, RUN, resume, replace=False):
                pass
        assert not (folder / "_run.json").exists()
    with claim_output(named.parent, RUN, str(named), replace=False):
        assert "_run.json" in warnings.text and str(named) in warnings.text
    with claim_output(named.parent, RUN, resume=True, replace=False):  # from then on it is known
        pass


def test_saved_model_leaves_no_weights_of_the_one_before(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    unfinished = tmp_path / UNFINISHED
    unfinished.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (unfinished / name).write_bytes(b"new")
    replace_model(tmp_path, unfinished)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("parts")
    checkpoint, data = save_tiny_checkpoint(folder / "model"), save_rows(folder / "data", 8)
    return ["--model_name_or_path", str(checkpoint), "--dataset_name", str(data), "--max_steps", "2"]


def test_used_folder_is_refused_before_anything_is_loaded(parts, tmp_path):
    from convllava_hf.training.run import run_recipe

    save_checkpoint(tmp_path / "used", 2)
    parts = ["--model_name_or_path", "nowhere", *parts[2:], "--output_dir", str(tmp_path / "used")]
    with pytest.raises(ValueError, match=r"used.*checkpoint-2"):
        run_recipe("tiny_cpu_stage1", parts)


def test_last_of_an_unknown_run_is_refused_before_anything_is_loaded(parts, tmp_path):
    from convllava_hf.training.run import run_recipe

    save_checkpoint(tmp_path, 2)
    parts = ["--model_name_or_path", str(tmp_path / "nowhere"), *parts[2:], "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="_run.json"):
        run_recipe("tiny_cpu_stage1", [*parts, "--resume_from_checkpoint", "last"])
    with pytest.raises(OSError, match="nowhere"):
        run_recipe("tiny_cpu_stage1", [*parts, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")])


@pytest.mark.parametrize(
    ("file", "recipe"), [("model.safetensors", "tiny_cpu_stage1"), ("optimizer.pt", "tiny_cpu_stage3")]
)
def test_full_disk_leaves_no_half_checkpoint(parts, tmp_path, file, recipe):
    """Writes end where the machine's limit on a file's size ends them: Rust's and torch's errors, not imitations."""
    from convllava_hf.training.run import run_recipe

    run_recipe(recipe, [*parts, "--output_dir", str(tmp_path / "a"), "--save_steps", "1"])
    sizes = json.loads((tmp_path / "a" / "checkpoint-1" / MANIFEST).read_text())
    limit = sizes[file] - 1000
    assert sizes[file] == max(sizes.values())  # so that no other file meets the limit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(OSError, match="b: .*: none"):
            run_recipe(recipe, [*parts, "--output_dir", str(tmp_path / "b"), "--save_steps", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert not names & {UNFINISHED, "checkpoint-1", "checkpoint-2", "model.safetensors"}


def test_code_of_a_checkpoint_never_runs(parts, tmp_path):
    """`auto_map` everywhere it is followed, in a checkpoint, under a recipe that asks for trust."""
    import shutil

    from convllava_hf.training.run import run_recipe

    hostile, mark = tmp_path / "hostile", tmp_path / "executed"
    shutil.copytree(parts[1], hostile)
    (hostile / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('x')\nclass Evil: pass\n")
    for path in hostile.glob("*config*.json"):
        content = json.loads(path.read_text())
        names = ["AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor"]
        content["auto_map"] = dict.fromkeys(names, "evil.Evil")
        content["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        path.write_text(json.dumps(content))
    recipe = tmp_path / "recipe.yaml"
    from convllava_hf.shipped import find_file

    recipe.write_text("trust_remote_code: true\n" + find_file("recipe", "tiny_cpu_stage1").read_text())
    arguments = ["--model_name_or_path", str(hostile), *parts[2:], "--output_dir", str(tmp_path / "out")]
    run_recipe(str(recipe), arguments)
    assert not mark.exists()
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps({**config, "model_type": "unknown"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        run_recipe(str(recipe), [*arguments, "--overwrite_output_dir", "true"])
    assert not mark.exists()
