"""Checkpoints of other families whose config.json asks for what timm would unpickle, or for layers without end."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import timm
from peft import LoraConfig, get_peft_model
from tiny_data import save_rows, save_tiny_llava
from tiny_sources import edit_json
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from convllava_hf.checkpoints.architecture import check_architecture, check_source
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.cli.app import app


COMMANDS = {
    "doctor": ["doctor", "{evil}"],
    "info": ["info", "{evil}"],
    "plan": ["plan", "{evil}", "--stage", "2"],
    "plan --memory": ["plan", "{evil}", "--stage", "3", "--memory"],
    "ask": ["ask", "What?", "-m", "{evil}", "--device", "cpu"],
    "merge": ["merge", "{adapter}", "--base", "{evil}", "--output", "{out}"],
    "insert-projector": ["insert-projector", "{evil}", "--projector", "{projector}", "--output", "{out}"],
    "init": ["init", "--vision", "{tower}", "--text", "{evil}", "--output", "{out}"],
    "export": ["export", "{evil}", "--to", "onnx", "--output", "{out}"],
    "push": ["push", "{evil}", "someone/evil", "--dry-run"],
    "train": ["train", "tiny_cpu_stage1", "--model_name_or_path", "{evil}", "--dataset_name", "{data}"],
}
COMMANDS["train"] += ["--output_dir", "{out}"]


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def parts(reference, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    llava = save_tiny_llava(folder / "llava")
    model = AutoModelForImageTextToText.from_pretrained(llava)
    get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", r=2)).save_pretrained(folder / "lora")
    projector = folder / "projector.safetensors"
    assert CliRunner().invoke(app, ["extract-projector", str(llava), "--output", str(projector)]).exit_code == 0
    found = {
        "llava": llava,
        "adapter": folder / "lora",
        "projector": projector,
        "tower": reference / "convllava" / "vision",
    }
    return {**found, "data": save_rows(folder / "data", 2)}


@pytest.fixture
def evil(parts, tmp_path, monkeypatch) -> Path:
    """A LLaVA of transformers, and a pickle beside it; timm leaves a mark as well, whatever its version unpickles."""
    folder = Path(shutil.copytree(parts["llava"], tmp_path / "evil"))
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"weight": Evil(tmp_path / "mark")}))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (tmp_path / "mark").touch())
    monkeypatch.setattr("convllava_hf.export.run.check_packages", lambda *_: None)
    return folder


def get_tower(kind: str | None, path: Path) -> dict:
    return {
        **({"model_type": kind} if kind else {}),
        "architecture": "convnext_atto",
        "model_args": {"checkpoint_path": str(path)},
    }


def run(command: str, evil: Path, parts: dict[str, Path]) -> tuple[int, str]:
    out = evil.parent / "out"
    done = CliRunner().invoke(app, [word.format(evil=evil, out=out, **parts) for word in COMMANDS[command]])
    assert not (evil.parent / "mark").exists() and not (out / "config.json").exists()
    return done.exit_code, done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_lets_timm_unpickle(command, evil, parts):
    edit_json(evil / "config.json", vision_config=get_tower("timm_wrapper", evil.parent / "weights.pth"))
    code, output = run(command, evil, parts)
    line = next(line for line in output.splitlines() if "checkpoint_path" in line)
    assert code and "model_args of 'convnext_atto' has checkpoint_path" in line and "Traceback" not in output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("part, key", [("text_config", "num_hidden_layers"), ("vision_config", "depths")])
def test_no_command_builds_layers_without_end(command, part, key, evil, parts):
    settings = json.loads((evil / "config.json").read_text())[part]
    if key == "depths":
        settings = {"model_type": "convnext", "num_stages": 4, "hidden_sizes": [8] * 4}
    value = [10**6] * 4 if key == "depths" else 10**6
    edit_json(evil / "config.json", **{part: {**settings, key: value}})
    code, output = run(command, evil, parts)
    line = next(line for line in output.splitlines() if "1000000" in line)
    assert code and f"{key} = {value}; expected at most 1024" in line and "Traceback" not in output


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"vision_config": get_tower(None, Path("x"))}, "checkpoint_path='x'"),
        ({"a": [{"b": get_tower("gemma3n_vision", Path("x"))}]}, "model_args={'checkpoint_path': 'x'}"),
        ({"vision_config": {"model_type": "timm_wrapper", "architecture": "hf-hub:x/y"}}, "'hf-hub:x/y'"),
        ({"vision_config": {"model_type": "gemma3n_vision", "architecture": "local-dir:x"}}, "'local-dir:x'"),
        ({"vision_config": {"model_type": "detr", "backbone": "hf-hub:x/y"}}, "backbone='hf-hub:x/y'"),
        ({"vision_config": {"model_type": "timm_wrapper", "architecture": ["x"]}}, r"architecture=\['x'\]"),
        ({"encoder_layers": 10**6}, "encoder_layers = 1000000; .*1024"),
        ({"n_routed_experts": 10**6}, "n_routed_experts = 1000000; .*1024"),
        ({"depths": [400] * 4}, "depths = .*1600; .*1024"),
        ({"hidden_size": 10**9}, "hidden_size = 1000000000; .*65536"),
    ],
)
def test_other_ways_to_the_same(settings, problem):
    with pytest.raises(ValueError, match=problem):
        check_architecture(settings)


def test_what_models_ask_for_is_not_refused():
    text = {
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "max_position_embeddings": 2**20,
    }
    check_architecture({"text_config": text, "vision_config": {"model_type": "convnext", "depths": [3, 3, 27, 3, 6]}})
    mobile = {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc", "model_args": None}
    check_architecture({"vision_config": mobile, "text_config": {"shared_expert_intermediate_size": 5632}})
    check_architecture({"vision_config": {"model_type": "timm_wrapper", "architecture": "fastvit_mci3"}})


def test_files_that_transformers_would_read_instead_are_looked_at(evil, tmp_path):
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.4.0.0.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    edit_json(evil / "config.json", configuration_files=["config.4.0.0.json"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(evil)}))
    for source in (evil, adapter):
        with pytest.raises(ConversionError, match="num_hidden_layers = 1000000"):
            check_source(source)
