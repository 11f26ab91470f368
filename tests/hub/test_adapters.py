"""PEFT adapters: `info`, `doctor`, `push` and `pull` know them, their cards have a snippet that runs, and `merge` keeps
where everything came from."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_sources import edit_json, edit_weights
from transformers import AutoModelForImageTextToText

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.conversion.parts import extract_projector, insert_projector, merge_adapter
from convllava_hf.hub.client import HubError
from convllava_hf.hub.doctor import check_checkpoint
from convllava_hf.hub.info import describe_checkpoint
from convllava_hf.hub.pull import pull_checkpoint
from convllava_hf.hub.push import push_checkpoint
from convllava_hf.registration import register


WEIGHTS = "adapter_model.safetensors"
TRAINED = """---
base_model: {base}
datasets:
- {data}
library_name: peft
tags:
- generated_from_trainer
---
# adapter

## How it was trained

| | |
|---|---|
| recipe | tiny |
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    register()
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """LoRA on the language model, with a projector that was trained whole, as a training run leaves it."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"], r=4)
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text(TRAINED.format(base=base, data="/tmp/samples"))
    return tmp_path / "adapter"


def find_problems(folder: Path) -> dict[str, str]:
    return {check.name: check.problem for check in check_checkpoint(folder) if check.problem}


def test_info_and_doctor_know_an_adapter(adapter, base):
    info = describe_checkpoint(adapter)
    assert info.kind == "PEFT adapter (LORA, r 4, lora_alpha 8)" and info.base == str(base)
    assert set(info.parts) == {"projector", "language model"} and info.recipe == "tiny" and not info.memory
    assert str(base) in info.summary() and info.kind.startswith("PEFT adapter")
    assert not find_problems(adapter)
    edit_weights(adapter / WEIGHTS, lambda w: w[min(w)].fill_(float("inf")))
    assert "values are finite" in find_problems(adapter)
    edit_weights(adapter / WEIGHTS, lambda w: w.update({min(w): torch.zeros(7, 64)}))
    assert "rank 7" in find_problems(adapter)["factors of a layer fit each other"]
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    assert "weight file is whole" in find_problems(adapter)


def test_doctor_compares_an_adapter_with_its_base(adapter):
    edit_weights(
        adapter / WEIGHTS, lambda w: [w.update({n.replace("layers.0", "layers.9"): w.pop(n)}) for n in list(w)]
    )
    assert "layers.9" in find_problems(adapter)["the base has the layers that it changes"]


def test_a_pushed_adapter_names_its_base_its_data_and_runs(hub, adapter, base, tmp_path, monkeypatch):
    with pytest.raises(HubError, match="adapter_config.json.*--base"):
        push_checkpoint(adapter, "someone/adapter")
    assert not hub.uploaded()
    push_checkpoint(base, "someone/base")
    report = push_checkpoint(adapter, "someone/adapter", base="someone/base")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(report.changes)
    settings = json.loads(hub.read_file("someone/adapter", "adapter_config.json"))
    assert settings["base_model_name_or_path"] == "someone/base" and settings["r"] == 4
    card = huggingface_hub.ModelCard(hub.read_file("someone/adapter", "README.md").decode())
    assert card.data.base_model == "someone/base" and card.data.library_name == "peft"
    assert "the data `samples`" in card.text and "| recipe | tiny |" in card.text and str(base) not in str(card)
    assert describe_checkpoint("someone/adapter").base == "someone/base"
    assert not find_problems(pull_checkpoint("someone/adapter", tmp_path / "pulled"))
    # The base holds what a snippet needs; it runs as it stands, in a folder with a photo.
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet.replace("max_new_tokens=128", "max_new_tokens=3"), "card", "exec"), {})


def test_merging_keeps_where_everything_came_from(adapter, converted, tmp_path, base):
    merged = merge_adapter(adapter, tmp_path / "merged")
    report = json.loads((merged / "conversion_report.json").read_text())
    assert [(part["role"], part["name"]) for part in report["sources"]] == [("base", "base"), ("adapter", "adapter")]
    assert all(part["files"] for part in report["sources"])
    assert not find_problems(merged), "the hashes are of the merged files"
    info = describe_checkpoint(merged)
    assert info.provenance == ["base base", "adapter adapter"] and info.recipe == "tiny"
    card = (merged / "README.md").read_text()
    assert "| adapter | adapter | local folder | adapter_model.safetensors |" in card and "Results" not in card


# ---- what does not fit is refused


def refuse(adapter: Path, output: Path, problem: str, **options):
    with pytest.raises(ConversionError, match=problem) as raised:
        merge_adapter(adapter, output, **options)
    assert "\n" not in str(raised.value) and not output.exists()


def test_merge_refuses_what_would_be_silently_wrong(adapter, base, tmp_path):
    output = tmp_path / "merged"

    def damage(edit) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"))
        edit(folder)
        return folder

    def rename(folder):  # matches nothing
        edit_weights(folder / WEIGHTS, lambda w: [w.update({n.replace("q_proj", "x_proj"): w.pop(n)}) for n in list(w)])

    def drop(folder):  # PEFT only warns, and goes on with random factors
        edit_weights(folder / WEIGHTS, lambda w: w.pop(max(name for name in w if "lora_B" in name)))

    def spoil(folder):
        edit_weights(folder / WEIGHTS, lambda w: w[max(w)].fill_(float("nan")))

    def other_layers(folder):
        edit_json(folder / "adapter_config.json", target_modules=["no_such_layer"])

    refuse(damage(rename), output, "has no place for .*x_proj")
    refuse(damage(drop), output, "lacks .*lora_B")
    refuse(damage(spoil), output, "not finite")
    refuse(damage(other_layers), output, "does not fit the base")

    def shape_config(folder):
        (folder / "adapter_config.json").write_text("[1]")

    def odd_config(folder):
        edit_json(folder / "adapter_config.json", base_model_name_or_path=["x"])

    refuse(damage(shape_config), output, "holds a list; expected a JSON object")
    refuse(damage(odd_config), output, r"base_model_name_or_path = \['x'\]")


def test_merge_refuses_a_base_that_lacks_a_layer_or_overflows(adapter, base, tmp_path):
    for number, edit in enumerate(
        [
            lambda w: w.pop("model.language_model.layers.1.mlp.up_proj.weight"),
            lambda w: w["lm_head.weight"].fill_(1e6),
        ]
    ):
        broken = Path(shutil.copytree(base, tmp_path / f"base{number}"))
        edit_weights(broken / "model.safetensors", edit)
        problem = "missing keys, the first is .*up_proj" if number == 0 else r"lm_head\.weight.* not finite"
        refuse(adapter, tmp_path / "merged", problem, base=str(broken), dtype="float16")


def test_adapters_and_whole_models_do_not_share_a_repository(hub, adapter, base):
    push_checkpoint(adapter, "someone/adapter", base="someone/base")
    push_checkpoint(base, "someone/base")
    for folder, name, found in (
        (base, "someone/adapter", "adapter_config.json"),
        (adapter, "someone/base", "config.json"),
    ):
        before = hub.list_files(name)
        with pytest.raises(HubError, match=rf"\({found}\)"):
            push_checkpoint(folder, name, base="someone/base" if folder == adapter else None)
        assert hub.list_files(name) == before


def test_inserting_a_projector_is_strict(base, tmp_path):
    projector = extract_projector(base, tmp_path / "p.safetensors")
    weights = load_file(projector)
    for value, dtype in ((float("nan"), torch.float32), (1e30, torch.float16)):
        save_file({name: tensor * 0 + value for name, tensor in weights.items()}, tmp_path / "bad.safetensors")
        into = base if dtype == torch.float32 else save_tiny_checkpoint(tmp_path / "half", dtype)
        with pytest.raises(ConversionError, match="linear_1.* of .*bad.safetensors"):
            insert_projector(into, tmp_path / "bad.safetensors", tmp_path / "out")
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    edit_weights(broken / "model.safetensors", lambda w: w.pop("model.language_model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConversionError, match="layers.1.mlp.up_proj.weight"):
        insert_projector(broken, projector, tmp_path / "out")
    (tmp_path / "bad.bin").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ConversionError, match="bad.bin"):
        insert_projector(base, tmp_path / "bad.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_force_replaces_projectors_only(base, tmp_path):
    (tmp_path / "notes.bin").write_text("years of work")
    with pytest.raises(ConversionError, match="notes.bin"):
        extract_projector(base, tmp_path / "notes.bin", force=True)
    assert (tmp_path / "notes.bin").read_text() == "years of work"
    extract_projector(base, tmp_path / "p.bin")
    extract_projector(base, tmp_path / "p.bin", force=True)
