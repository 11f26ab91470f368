"""TRL's own commands run unchanged on our checkpoints: preferences, rewards, distillation."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import make_png, save_rows, save_tiny_llava

from convllava_hf.conversion.parts import merge_adapter
from convllava_hf.shipped import find_file
from convllava_hf.training.rewards import match_solution


COLUMNS = {
    "sft": ["messages"],
    "dpo": ["prompt", "chosen", "rejected"],
    "kto": ["prompt", "completion", "label"],
    "grpo": ["prompt", "solution"],
    "rloo": ["prompt", "solution"],
    "distillation": ["prompt"],
}
GENERATING = ("grpo", "rloo", "distillation")  # they take no batch of rows with images and rows without
REWARDED = ["--reward_funcs", "odd_rewards.count_odd", "--num_generations", "2", "--max_completion_length", "6"]
SETTINGS = {"grpo": REWARDED, "rloo": REWARDED, "distillation": ["--max_completion_length", "6"]}
REWARD = """
def count_odd(completions, **_):
    return [float(sum(ord(letter) % 2 for letter in answer[0]["content"])) for answer in completions]
"""
TINY = (
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --max_steps 2 --dataloader_num_workers 0 "
    "--bf16 false --tf32 false --use_cpu true --dtype float32 --learning_rate 0.01 --warmup_steps 0 --save_strategy no "
    "--logging_steps 1 --report_to none"
).split()


def say(role: str, text: str, images: int = 0) -> dict:
    parts = [{"type": "image", "text": None}] * images + [{"type": "text", "text": text}]
    return {"role": role, "content": parts}


def make_rows(command: str) -> Dataset:
    """Rows for a command: one image, two of other shapes, and, but for those that generate, none, by turns."""
    rows, counts = [], (1, 2) if command in GENERATING else (1, 2, 0)
    for number in range(12):
        count = counts[number % len(counts)]
        question, right = say("user", f"Question {number}?", count), say("assistant", f"Answer {number}.")
        columns = {
            "messages": [question, right],
            "prompt": [question],
            "chosen": [right],
            "rejected": [say("assistant", "I do not know.")],
            "completion": [right],
            "label": number % 2 == 0,
            "solution": f"Answer {number}.",
        }
        pictures = [
            {"bytes": make_png(40 + 13 * number, 90 - 5 * place, number), "path": None} for place in range(count)
        ]
        rows.append({**{name: columns[name] for name in COLUMNS[command]}, "images": pictures})
    talk = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    kinds = {"label": Value("bool"), "solution": Value("string")}
    features = Features({**{name: kinds.get(name, talk) for name in COLUMNS[command]}, "images": List(Image())})
    return Dataset.from_list(rows, features=features)


@pytest.fixture(scope="module")
def save_data(tmp_path_factory):
    def save(command: str) -> Path:
        folder = tmp_path_factory.mktemp(command) / "data"
        folder.mkdir()
        make_rows(command).to_parquet(folder / "train-00000-of-00001.parquet")
        return folder

    return save


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"convllava": save_tiny_checkpoint(folder / "convllava"), "llava": save_tiny_llava(folder / "llava")}


def find_changed(before: Path, after: Path) -> set[str]:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert set(old) == set(new)
    return {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}


@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_recipe_moves_the_language_model_and_nothing_else(command, models, save_data, tmp_path, monkeypatch):
    """What `trl dpo` and `trl grpo` run in the processes that they start."""
    (tmp_path / "odd_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # `trl grpo` adds the folder that it runs in
    script = importlib.import_module(f"trl.scripts.{command}")
    settings = ["--model_name_or_path", str(models["convllava"]), "--dataset_name", str(save_data(command))]
    settings += ["--config", str(find_file("recipe", f"convllava_{command}")), "--output_dir", "output"]
    parsed = script.make_parser().parse_args_and_config([*settings, *TINY, *SETTINGS.get(command, [])])
    script.main(*parsed)
    merged = merge_adapter(tmp_path / "output", tmp_path / "merged", base=str(models["convllava"]))
    changed = find_changed(models["convllava"], merged)
    expected = {name for name in load_file(models["convllava"] / "model.safetensors") if "language_model" in name}
    assert changed == {name for name in expected if name.endswith("_proj.weight")}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("family", ["convllava", "llava"])
@pytest.mark.parametrize("command", COLUMNS)
def test_command_runs_without_the_package(command, family, models, save_data, tmp_path):
    """In a process that cannot import this package; rows of one image, of two, and of none where TRL takes them."""
    (tmp_path / "convllava_hf.py").write_text("raise ImportError('blocked')")
    (tmp_path / "odd_rewards.py").write_text(REWARD)
    arguments = [str(Path(sys.executable).parent / "trl"), command, "--model_name_or_path", str(models[family])]
    arguments += ["--dataset_name", str(save_data(command)), "--output_dir", "output", *TINY]
    arguments += ["--trust_remote_code", "true", *SETTINGS.get(command, [])]
    if command == "distillation":
        torch.manual_seed(1)
        save = {"convllava": save_tiny_checkpoint, "llava": save_tiny_llava}[family]
        teacher = save(tmp_path / "teacher")
        weights = load_file(teacher / "model.safetensors")
        noisy = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in weights.items()}
        save_file(noisy, teacher / "model.safetensors", metadata={"format": "pt"})
        arguments += ["--teacher_model_name_or_path", str(teacher)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    changed = find_changed(models[family], tmp_path / "output")
    assert any("language_model" in name for name in changed) and any("projector" in name for name in changed)


def test_supervised_training_refuses_recipes_of_other_commands(models, save_data, tmp_path):
    from convllava_hf.training.run import run_recipe

    settings = ["--model_name_or_path", str(models["convllava"]), "--dataset_name", str(save_rows(tmp_path / "rows"))]
    for command in ("dpo", "grpo"):
        with pytest.raises(ValueError, match=f"trl {command}"):
            run_recipe(f"convllava_{command}", [*settings, "--output_dir", str(tmp_path / command)])


def test_reward_is_one_for_the_right_answer():
    answers = [[{"role": "assistant", "content": text}] for text in ("3", " 3\n", "4", "")]
    assert match_solution(answers, ["3"] * 4, prompts=[]) == [1.0, 1.0, 0.0, 0.0]
    assert match_solution(["two  cats"], ["two cats"]) == [1.0]
    named = yaml.safe_load(find_file("recipe", "convllava_grpo").read_text())["reward_funcs"]
    module, name = named[0].rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is match_solution
