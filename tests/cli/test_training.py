"""The commands around training: what they print, and how they fail."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import save_tiny_llava
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from convllava_hf.cli.app import app
from convllava_hf.model.modeling_convllava import set_trainable
from convllava_hf.shipped import list_files
from convllava_hf.training.plans import describe_plan, get_trainable, plan_stored


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def run(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_plan_prints_what_is_trained(checkpoint):
    code, text = run("plan", checkpoint, "--stage", 2, "--vision-from", "stage4", "--dtype", "bfloat16")
    assert code == 0
    rows = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in text.splitlines()[1:10]}
    assert rows["vision tower, stage 3"][0] == "0" and rows["vision tower, stage 4"][1] == "0"
    assert rows["language model"][1] == "0" and rows["all"][0] != "0"
    assert (
        r"trainable: ['multi_modal_projector\.', '(language_model|lm_head)\.', 'vision_tower\..*stages\.[34]\.']"
        in text
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plan_counts_what_the_model_has(checkpoint, tmp_path, stage):
    """Without building it: by the names and shapes that are stored, also under the published names of a LLaVA."""
    for path in (checkpoint, save_tiny_llava(tmp_path / "llava")):
        model = AutoModelForImageTextToText.from_pretrained(path)
        if stage == 2 and path != checkpoint:  # which has no stages
            continue
        set_trainable(model, get_trainable(model.config, stage))
        code, text = run("plan", path, "--stage", stage, "--json")
        assert code == 0, text
        parts = {part["part"]: (part["trainable"], part["frozen"]) for part in json.loads(text)["parts"]}
        assert parts == {part.part: (part.trainable, part.frozen) for part in describe_plan(model)}


def test_plan_refuses_what_is_not_there(checkpoint):
    code, text = run("plan", checkpoint, "--stage", 4)
    assert code == 3 and text.startswith("error: stage=4;")
    code, text = run("plan", checkpoint, "--stage", 2, "--dtype", "int8")
    assert code == 3 and "dtype='int8'" in text


@pytest.mark.parametrize("field", [{"hidden_size": "64"}, {"vocab_size": None}, {"model_type": "nonsense"}])
def test_plan_names_a_configuration_that_no_class_takes(checkpoint, tmp_path, field):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= field
    (copy / "config.json").write_text(json.dumps(config))
    code, text = run("plan", copy, "--stage", 3)
    assert code == 3 and text.startswith("error: ") and "config" in text


def test_a_plan_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="multi_modal_projector"):
        plan_stored({"language_model.model.norm.weight": 8}, [r"multi_modal_projector\."])


def test_recipes_are_listed_found_and_shown():
    code, text = run("recipe")
    assert code == 0 and [line.split()[0] for line in text.splitlines()] == list(list_files("recipe"))
    code, text = run("recipe", "convllava_stage2")
    assert code == 0 and Path(text.strip()).is_file()
    assert run("recipe", "convllava_stage2", "--show")[1].strip() == Path(text.strip()).read_text().strip()
    code, text = run("recipe", "nothing")
    assert code == 3 and "'nothing'" in text and "convllava_stage1" in text


def test_train_says_in_one_line_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("learning_rate: 1.0e-3\noutput_dir: out\n")
    monkeypatch.chdir(tmp_path)
    code, text = run("train", tmp_path / "mine.yaml", "--bf16", "false")
    assert code == 3 and text.strip().splitlines()[-1].startswith("error: ") and "--model_name_or_path" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.yaml"]


def test_plan_of_other_models_prints_what_they_take(tmp_path, checkpoint):
    llava = save_tiny_llava(tmp_path / "llava")
    for stage in (1, 3):
        code, text = run("plan", llava, "--stage", stage)
        assert code == 0 and "trainable: ['multi_modal_projector" in text and "init_kwargs" not in text
    code, text = run("plan", checkpoint, "--stage", 3, "--vision-from", "stage4")
    assert code == 3 and "--vision-from stage4" in text
