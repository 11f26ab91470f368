"""Every recipe trains, through TRL's own script and through ours, and changes what it says and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import save_rows, save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from convllava_hf.conversion.parts import merge_adapter
from convllava_hf.shipped import FOLDERS, find_file, list_chat_templates, list_files
from convllava_hf.training.run import run_recipe


OURS = {"trainable", "projector_learning_rate", "image_aspect_ratio"}  # settings that TRL lacks
TINY = (
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --max_steps 2 --dataloader_num_workers 0 "
    "--bf16 false --tf32 false --use_cpu true --learning_rate 0.01 --warmup_steps 0 --save_strategy no --report_to none"
).split()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint per architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {"convllava": save_tiny_checkpoint(folder / "convllava"), "llava": save_tiny_llava(folder / "llava")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("data") / "rows", 12)


def is_supervised(name: str) -> bool:
    """Whether `trl sft` and `convllava train` take a recipe; the others are for other commands of TRL."""
    return not name.endswith(("dpo", "grpo"))


def get_family(recipe: str) -> str:
    return "convllava" if recipe.startswith(("convllava", "tiny_cpu", "custom")) else "llava"


def train_with_trl(file: Path, arguments: list[str]) -> None:
    """What `trl sft` runs in the process it starts; the classes are registered, so it needs no trust."""
    from trl.scripts import sft

    parsed = sft.make_parser().parse_args_and_config(["--config", str(file), *arguments])
    sft.main(*parsed)


def train_with_convllava(file: Path, arguments: list[str]) -> None:
    run_recipe(str(file), arguments)


def get_changes(before: Path, after: Path, tmp_path: Path) -> dict[str, bool]:
    """For each tensor of the model, whether a bit of it changed."""
    if (after / "adapter_config.json").is_file():
        after = merge_adapter(after, tmp_path / "merged", base=str(before))
    old, new = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (before, after))
    assert set(old) == set(new)
    return {name: not torch.equal(tensor, new[name]) for name, tensor in old.items()}


def get_changed_parts(before: Path, after: Path, tmp_path: Path) -> dict[str, set[bool]]:
    """For each part of the model, whether its weights changed: {True}, {False}, or both."""
    changed = {}
    for name, is_changed in get_changes(before, after, tmp_path).items():
        part = re.search(r"multi_modal_projector|vision_tower|language_model|lm_head", name)[0]
        if match := re.search(r"vision_tower.*stages\.(\d)\.", name):
            part = f"stage {int(match[1]) + 1}"
        changed.setdefault(part, set()).add(is_changed)
    return changed


def test_there_are_all_recipes():
    assert len(list_files("recipe")) == 25
    assert {path.suffix for path in FOLDERS["recipe"].iterdir()} == {".yaml"}


# Rows per step on 8 GPUs, learning rate, epochs and longest row in the originals' scripts and READMEs; docs/training.md
# says in which.
ORIGINALS = {
    "convllava_stage1": (256, 3e-4, 1, 2048),
    "convllava_stage2": (256, 2e-5, 1, 2048),
    "convllava_stage3": (128, 2e-5, 1, 2048),
    "llava_pretrain": (256, 1e-3, 1, 2048),
    "llava_finetune": (128, 2e-5, 1, 2048),
    "llava_finetune_lora": (128, 2e-4, 1, 2048),
    "llava_v1_pretrain": (128, 2e-3, 1, 2048),
    "llava_v1_finetune": (32, 2e-5, 3, 2048),
    "llava_lightning_finetune": (128, 2e-5, 1, 2048),
    "scienceqa_finetune": (32, 2e-5, 12, 2048),
    "llavar_pretrain": (128, 2e-3, 1, 1024),
    "llavar_finetune": (32, 2e-5, 3, 2048),
    "tinyllava_pretrain": (256, 1e-3, 1, 3072),
    "tinyllava_share_pretrain": (256, 2e-5, 1, 3072),
    "tinyllava_finetune": (128, 2e-5, 1, 3072),
    "tinyllava_finetune_lora": (128, 2e-5, 3, 3072),
}
# Rank, alpha, dropout and the projector's learning rate of those with adapters.
ADAPTERS = {"llava_finetune_lora": (128, 256, 0.05, 2e-5), "tinyllava_finetune_lora": (32, 64, 0.05, None)}


@pytest.mark.parametrize("name", ORIGINALS)
def test_values_are_the_originals(name):
    recipe = yaml.safe_load(find_file("recipe", name).read_text())
    rows = 8 * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    assert (rows, recipe["learning_rate"], recipe["num_train_epochs"], recipe["max_length"]) == ORIGINALS[name]
    shared = {"warmup_steps": 0.03, "lr_scheduler_type": "cosine", "weight_decay": 0.0, "bf16": True, "tf32": True}
    assert recipe.items() >= shared.items()
    names = ("lora_r", "lora_alpha", "lora_dropout", "projector_learning_rate")
    assert tuple(recipe.get(key) for key in names) == ADAPTERS.get(name, (None,) * 4)


def test_every_recipe_is_compared_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = text.partition("## Ours and the originals'")[2].partition("\n# ")[0]
    compared = {name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"\w+", cell)}
    without_original = {name for name in list_files("recipe") if name.startswith("tiny_cpu") or not is_supervised(name)}
    assert set(list_files("recipe")) - without_original <= compared
    assert set(ORIGINALS) < compared


@pytest.mark.parametrize("name", list_files("recipe"))
def test_recipe_is_flat_and_says_how_to_run_it(name):
    text = find_file("recipe", name).read_text()
    head = text.split("\n\n")[0]
    if is_supervised(name):
        assert re.search(rf"convllava\)? train {name} ", head)
        # TRL's command refuses settings of ours rather than train another way.
        assert (f"$(convllava recipe {name})" in head) != bool(OURS & set(yaml.safe_load(text)))
    else:
        assert f"trl {name.split('_')[-1]} --config $(convllava recipe {name}) " in head
    assert "GPU" in head or "one processor core" in head
    assert "# Validation: --eval_strategy steps" in head
    headings = re.findall(r"^# (\w+)$", text, re.MULTILINE)
    assert headings == ["model", "data", "trainer"]
    assert yaml.safe_load(text)["output_dir"] == name


@pytest.mark.parametrize("train", [train_with_trl, train_with_convllava])
@pytest.mark.parametrize("name", [name for name in list_files("recipe") if is_supervised(name)])
def test_recipe_trains_what_it_says(name, train, models, data, tmp_path):
    if "qlora" in name:
        pytest.importorskip("bitsandbytes", reason="4 bits need the extra `quantization`")
    family = get_family(name)
    output = tmp_path / "output"
    settings = ["--model_name_or_path", str(models[family]), "--dataset_name", str(data), "--output_dir", str(output)]
    recipe = yaml.safe_load(find_file("recipe", name).read_text())
    if train is train_with_trl and OURS & set(recipe):
        with pytest.raises(ValueError, match="|".join(OURS)):
            train(find_file("recipe", name), [*settings, *TINY])
        return
    if train is train_with_trl and recipe.get("chat_template_path") == "plain":
        settings += ["--chat_template_path", str(list_chat_templates()["plain"])]
    train(find_file("recipe", name), [*settings, *TINY])
    changed = get_changed_parts(models[family], output, tmp_path)

    moved, frozen = {True}, {False}
    if name.startswith(("llava_v1", "llava_lightning", "llavar", "scienceqa")):
        assert changed["multi_modal_projector"] == {True, False}  # the second layer is the identity there
    else:
        assert changed["multi_modal_projector"] == moved
    stages = [changed.get(f"stage {number}") for number in range(1, 6)]
    if "lora" in name or name.endswith(("a_pretrain", "r_pretrain", "1_pretrain")):
        assert changed["lm_head"] == frozen
        assert all(stage in (None, frozen) for stage in stages)
        assert changed["vision_tower"] == frozen
        if "pretrain" in name:
            assert changed["language_model"] == frozen
        else:
            changes = get_changes(models[family], output, tmp_path / "again")
            in_layers = {name: value for name, value in changes.items() if "language_model" in name}
            # Adapters change the linear layers, and nothing else.
            assert in_layers == {name: name.endswith("_proj.weight") for name in in_layers}
    elif "stage1" in name:
        assert changed["language_model"] == changed["lm_head"] == changed["vision_tower"] == frozen
        assert stages == [frozen] * 4 + [moved]
    else:
        # Rows of the vocabulary that do not occur stay, so a tensor either moved or did not: these all have moved.
        assert changed["language_model"] == changed["lm_head"] == moved
        if family == "convllava":
            assert changed["vision_tower"] == frozen
            assert stages == [frozen] * 2 + [moved] * 3 if "stage2" in name else [frozen] * 5
        else:
            assert changed["vision_tower"] == frozen
    if (output / "config.json").is_file():
        assert "trainable" not in (output / "config.json").read_text()


FAMILIES = {
    "llava_pretrain": "llava_v1_5",
    "llava_finetune": "llava_v1_5",
    "llava_finetune_lora": "llava_v1_5",
    "llava_lightning_finetune": "llava_v0_delta",
    "tinyllava_share_pretrain": "tinyllava",
    "custom_finetune_lora": "llava_v1_5",
    "llava_v1_pretrain": "llava_v0_delta",
    "llava_v1_finetune": "llava_v0_delta",
    "scienceqa_finetune": "llava_v0_delta",
    "llavar_pretrain": "llavar",
    "llavar_finetune": "llavar",
    "tinyllava_pretrain": "tinyllava_llama",
    "tinyllava_finetune": "tinyllava",
    "tinyllava_finetune_lora": "tinyllava_stablelm",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_recipes_of_the_family_run_on_converted_checkpoints(name, convert_family, data, tmp_path):
    """Released formats, converted, trained for two steps on a loss that is a number."""
    model, output = convert_family(FAMILIES[name]), tmp_path / "output"
    settings = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output), *TINY]
    train_with_convllava(find_file("recipe", name), settings)
    changed = get_changed_parts(model, output, tmp_path)
    assert changed["vision_tower"] == {False}
    one_layer = FAMILIES[name] in ("llava_v0_delta", "llavar")  # whose second layer is the identity, and stays it
    assert changed["multi_modal_projector"] == ({True, False} if one_layer else {True})
    assert (True in changed["language_model"]) == ("pretrain" not in name or "share" in name)


def test_captions_without_a_question(reference, converted, tmp_path):
    """`--chat_template_path plain`: the start token, the image, the caption; what is saved still chats."""
    from convllava_hf.data.build import build_dataset
    from convllava_hf.training.run import run_recipe

    rows = [
        {
            "id": str(number),
            "image": next((reference / "convllava" / "images").iterdir()).name,
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": f"{number} birds."},
            ],
        }
        for number in range(4)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    build_dataset([(tmp_path / "rows.json", reference / "convllava" / "images")], tmp_path / "data")
    settings = ["--model_name_or_path", str(converted), "--dataset_name", str(tmp_path / "data")]
    trainer = run_recipe(
        "convllava_stage1", [*settings, "--output_dir", str(tmp_path / "out"), "--chat_template_path", "plain", *TINY]
    )
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer.processing_class.tokenizer
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        text = tokenizer.decode(ids)
        assert text.startswith("<s>") and "Describe" not in text and "USER" not in text
        assert re.fullmatch(r"\d birds\.\n", tokenizer.decode(labels[labels != -100]).lstrip())
    saved, before = (AutoProcessor.from_pretrained(path).chat_template for path in (tmp_path / "out", converted))
    assert saved == before


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_train_the_same_without_recomputing_activations(stage, models, data, tmp_path):
    changed = []
    for recompute in ("true", "false"):
        output = tmp_path / recompute
        settings = ["--model_name_or_path", str(models["convllava"]), "--dataset_name", str(data)]
        settings += ["--output_dir", str(output), *TINY, "--gradient_checkpointing", recompute]
        train_with_convllava(find_file("recipe", f"tiny_cpu_stage{stage}"), settings)
        changed.append(get_changed_parts(models["convllava"], output, tmp_path))
    assert changed[0] == changed[1]


@pytest.mark.parametrize("recompute", ["true", "false"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_train_with_adapters(stage, recompute, models, data, tmp_path, caplog):
    """Exactly the adapted layers and the modules that are saved whole change; what PEFT leaves out is counted."""
    saved = {1: ["stages.4"], 2: ["stages.2", "stages.4"], 3: ["lm_head"]}[stage]
    settings = ["--model_name_or_path", str(models["convllava"]), "--dataset_name", str(data)]
    settings += ["--output_dir", str(tmp_path / "adapter"), *TINY, "--gradient_checkpointing", recompute]
    settings += ["--use_peft", "true", "--lora_target_modules", r".*language_model.*\.(q|v|down)_proj"]
    transformers.utils.logging.enable_propagation()
    train_with_convllava(
        find_file("recipe", f"tiny_cpu_stage{stage}"),
        [*settings, "--lora_modules_to_save", "multi_modal_projector", *saved],
    )
    transformers.utils.logging.disable_propagation()
    changes = get_changes(models["convllava"], tmp_path / "adapter", tmp_path)
    whole = "|".join(rf"\b{re.escape(name)}\." for name in ["multi_modal_projector", *saved])
    trained = rf"{whole}|language_model.*\.(q|v|down)_proj\.weight"
    assert changes == {name: bool(re.search(trained, name)) for name in changes}
    listed = " ".join(re.findall("stay frozen: (.*)", caplog.text))
    left_out = {part: int(count) for count, part in re.findall(r"(\d+) of ([\w.]*\w)", listed)}
    inside = sum("language_model" in name and not value for name, value in changes.items())
    in_stage = sum("stages.3." in name for name in changes)
    assert (
        left_out
        == [
            {},
            {"lm_head": 1, "language_model": inside, "vision_tower.encoder.stages.3": in_stage},
            {"language_model": inside},
        ][stage - 1]
    )
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "library_name: peft" in card
    assert "| trained parameters | LORA adapters of " in card
    assert f", multi_modal_projector, {', '.join(saved)} |" in card


def test_adapters_of_a_finetuning_train_nothing_that_is_not_saved(models, data, tmp_path):
    settings = ["--model_name_or_path", str(models["llava"]), "--dataset_name", str(data), *TINY]
    settings += ["--output_dir", str(tmp_path), "--use_peft", "true"]
    settings += ["--lora_target_modules", ".*language_model.*q_proj"]
    trainer = run_recipe("llava_finetune", [*settings, "--lora_modules_to_save", "multi_modal_projector"])
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(re.search(r"multi_modal_projector.*modules_to_save|\.lora_[AB]\.", name) for name in trained)
    trainer.create_model_card()  # as `push_to_hub` does after saving
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def test_int8_weights_as_the_documentation_has_them(models, data, tmp_path):
    """Adapters on weights of the language model in int8; the tower and the output layer keep theirs."""
    pytest.importorskip("torchao", reason="int8 needs the extra `quantization`")
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```yaml\n(model_init_kwargs:.*?)```", text, re.DOTALL)
    recipe = tmp_path / "int8.yaml"
    recipe.write_text(find_file("recipe", "tiny_cpu_lora").read_text() + block)
    settings = ["--model_name_or_path", str(models["convllava"]), "--dataset_name", str(data), *TINY]
    trainer = run_recipe(str(recipe), [*settings, "--output_dir", str(tmp_path / "output")])
    int8 = {name for name, parameter in trainer.model.named_parameters() if type(parameter).__name__ == "Int8Tensor"}
    assert len(int8) == 2 * 7 and all("language_model" in name for name in int8)
    changes = get_changes(models["convllava"], tmp_path / "output", tmp_path)
    assert changes == {
        name: "multi_modal_projector" in name or ("language_model" in name and name.endswith("_proj.weight"))
        for name in changes
    }


def test_adapters_load_as_those_of_any_model(models, data, tmp_path):
    """PEFT's own loading, transformers' `load_adapter`, and the merged checkpoint answer the same."""
    settings = ["--model_name_or_path", str(models["convllava"]), "--dataset_name", str(data)]
    train_with_trl(find_file("recipe", "tiny_cpu_lora"), [*settings, "--output_dir", str(tmp_path / "adapter"), *TINY])
    merged = AutoModelForImageTextToText.from_pretrained(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    with_peft = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(models["convllava"]), str(tmp_path / "adapter")
    )
    inputs = {"input_ids": torch.tensor([[2, 1, 1, 1, 1, 40, 50]]), "pixel_values": torch.randn(1, 3, 128, 128)}
    with torch.no_grad():
        expected = merged.eval()(**inputs).logits
        torch.testing.assert_close(with_peft.eval()(**inputs).logits, expected, atol=1e-4, rtol=0)
        plain = AutoModelForImageTextToText.from_pretrained(models["convllava"]).eval()
        assert (plain(**inputs).logits - expected).abs().max() > 1e-3
        plain.load_adapter(str(tmp_path / "adapter"))
        torch.testing.assert_close(plain.eval()(**inputs).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_stock_command_runs_a_recipe_without_the_package(models, data, tmp_path):
    """`trl sft` in a process that cannot import this package: the checkpoint's own code does the freezing."""
    block = tmp_path / "blocked"
    block.mkdir()
    (block / "convllava_hf.py").write_text("raise ImportError('blocked')")
    recipe = shutil.copy(find_file("recipe", "tiny_cpu_stage1"), tmp_path / "recipe.yaml")
    output = tmp_path / "output"
    command = [str(Path(sys.executable).parent / "trl"), "sft", "--config", str(recipe)]
    command += ["--model_name_or_path", str(models["convllava"]), "--dataset_name", str(data)]
    command += ["--trust_remote_code", "true", "--max_steps", "2"]  # the user's own word, which no recipe gives
    command += ["--output_dir", str(output), "--learning_rate", "0.01", "--warmup_steps", "0", "--save_strategy", "no"]
    environment = {**os.environ, "PYTHONPATH": str(block), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    changed = get_changed_parts(models["convllava"], output, tmp_path)
    assert changed["stage 5"] == changed["multi_modal_projector"] == {True}
    assert changed["language_model"] == changed["lm_head"] == changed["stage 4"] == {False}
