"""Adapters merged, projectors taken out and put in, in both directions and without losing a bit."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_sources import edit_weights
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from convllava_hf.checkpoints.staging import MANIFEST
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.cli.app import app
from convllava_hf.conversion.parts import extract_projector, insert_projector, merge_adapter, read_projector


@pytest.fixture
def other_projector(checkpoint, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of random weights in the shapes of the checkpoint's projector."""
    torch.manual_seed(1)
    weights = {name: torch.randn_like(tensor) for name, tensor in read_projector(checkpoint).items()}
    path = tmp_path / "other.safetensors"
    save_file({f"multi_modal_projector.{name}": tensor for name, tensor in weights.items()}, path)
    return path, weights


@pytest.fixture
def adapter(checkpoint, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """LoRA on the language model with a projector that was trained whole, and the weights of the two merged."""
    torch.manual_seed(2)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"], r=4)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.merge_and_unload().state_dict()


def test_merged_adapter_is_the_sum(checkpoint, adapter, tmp_path):
    folder, expected = adapter
    output = merge_adapter(folder, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(output).state_dict()
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    original = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    assert all("q_proj" in name or "multi_modal_projector" in name for name in changed) and changed
    assert (output / "tokenizer.json").is_file() and (output / "modeling_convllava.py").is_file()


def test_merging_what_is_no_adapter(checkpoint, adapter, tmp_path):
    with pytest.raises(ConversionError, match="adapter_config.json"):
        merge_adapter(checkpoint, tmp_path / "merged")
    folder, _ = adapter
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ConversionError, match="--base"):
        merge_adapter(folder, tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").touch()
    with pytest.raises(ConversionError):
        merge_adapter(folder, tmp_path / "merged", base=str(checkpoint), force=True)
    assert (tmp_path / "merged" / "mine.txt").exists()


@pytest.mark.parametrize("name", ["projector.safetensors", "mm_projector.bin"])
def test_projector_goes_out_and_in(checkpoint, other_projector, tmp_path, name):
    changed = insert_projector(checkpoint, other_projector[0], tmp_path / "changed")
    file = extract_projector(changed, tmp_path / name)
    stored = load_file(file) if name.endswith("safetensors") else torch.load(file, weights_only=True)
    if name.endswith(".bin"):
        assert set(stored) == {f"model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    back = insert_projector(checkpoint, file, tmp_path / "back")
    weights = load_file(back / "model.safetensors")
    original = load_file(checkpoint / "model.safetensors")
    assert set(weights) == set(original)
    for key, tensor in weights.items():
        short = key.split("multi_modal_projector.")[-1]
        assert torch.equal(tensor, other_projector[1].get(short, original[key])), key
    assert {path.name for path in back.iterdir()} - {MANIFEST} == {path.name for path in checkpoint.iterdir()}
    AutoModelForImageTextToText.from_pretrained(back)


def test_projector_of_an_adapter(adapter, tmp_path):
    folder, merged = adapter
    projector = read_projector(folder)
    assert {f"model.multi_modal_projector.{name}" for name in projector} == {n for n in merged if "projector" in n}
    for name, tensor in projector.items():
        assert torch.equal(tensor, merged[f"model.multi_modal_projector.{name}"])


def test_projector_of_one_layer_as_the_original_writes_it(tmp_path):
    weights = {"model.mm_projector.weight": torch.randn(4, 3), "model.mm_projector.bias": torch.randn(4)}
    torch.save(weights, tmp_path / "mm_projector.bin")
    projector = read_projector(tmp_path / "mm_projector.bin")
    assert list(projector) == ["linear_1.weight", "linear_1.bias"]
    save_file(
        {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}, tmp_path / "p.safetensors"
    )
    again = torch.load(extract_projector(tmp_path / "p.safetensors", tmp_path / "out.bin"), weights_only=True)
    assert {name: tensor.tolist() for name, tensor in again.items()} == {n: t.tolist() for n, t in weights.items()}


def test_one_layer_stored_as_two_travels_as_one(convert_family, tmp_path):
    """LLaVA v0: the identity behind the linear layer stays at home."""
    checkpoint = convert_family("llava_v0_delta")
    file = extract_projector(checkpoint, tmp_path / "mm_projector.bin")
    stored = torch.load(file, weights_only=True)
    assert set(stored) == {"model.mm_projector.weight", "model.mm_projector.bias"}
    torch.save({name: tensor + 1 for name, tensor in stored.items()}, tmp_path / "other.bin")
    projector = read_projector(insert_projector(checkpoint, tmp_path / "other.bin", tmp_path / "new"))
    assert torch.equal(projector["linear_1.weight"], stored["model.mm_projector.weight"] + 1)
    assert torch.equal(projector["linear_2.weight"], read_projector(checkpoint)["linear_2.weight"])


def test_projectors_that_do_not_fit(checkpoint, other_projector, tmp_path):
    path, weights = other_projector
    save_file({"multi_modal_projector.linear_1.weight": weights["linear_1.weight"]}, tmp_path / "part.safetensors")
    with pytest.raises(ConversionError, match="linear_1.weight; .*linear_1.bias, linear_1.weight"):
        insert_projector(checkpoint, tmp_path / "part.safetensors", tmp_path / "out")
    wide = {f"multi_modal_projector.{name}": torch.zeros(7, *t.shape[1:]) for name, t in weights.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ConversionError, match=r"\(7,.*\("):
        insert_projector(checkpoint, tmp_path / "wide.safetensors", tmp_path / "out")
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ConversionError, match="multi_modal_projector.linear_1.weight"):
        read_projector(tmp_path / "none.safetensors")
    with pytest.raises(ConversionError, match="'.pt'"):
        extract_projector(checkpoint, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match="--output"):
        extract_projector(checkpoint, path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [0, 1000, 4000, 8000])
@pytest.mark.parametrize("name", ["mm_projector.bin", "projector.safetensors"])
def test_projector_on_a_full_disk_is_one_line_and_leaves_nothing(checkpoint, tmp_path, name, limit):
    """A real limit of the system (`ulimit -f`) ends the writing, in torch's and in safetensors' writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        done = CliRunner().invoke(app, ["extract-projector", str(checkpoint), "--output", str(tmp_path / name)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert done.exit_code == 3 and done.stdout == "", done.output
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: writing {tmp_path / name} failed: ")
    assert os.strerror(errno.EFBIG) in done.stderr or os.strerror(errno.EIO) in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_projectors_do_not_go_into_a_base_that_is_not_finite(checkpoint, other_projector, tmp_path, value):
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    edit_weights(base / "model.safetensors", lambda weights: weights["lm_head.weight"][3, 1].fill_(value))
    with pytest.raises(ConversionError, match="'lm_head.weight' of .*base"):
        insert_projector(base, other_projector[0], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_commands(checkpoint, adapter, tmp_path):
    run = CliRunner().invoke
    done = run(app, ["merge", str(adapter[0]), "--output", str(tmp_path / "merged"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"output": str(tmp_path / "merged")}, done.output
    file, output = str(tmp_path / "mm_projector.bin"), str(tmp_path / "new")
    done = run(app, ["extract-projector", str(tmp_path / "merged"), "--output", file, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"output": file}, done.output
    done = run(app, ["insert-projector", str(checkpoint), "--projector", file, "--output", output, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"output": output}, done.output
    merged, new = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "new"))
    name = "model.multi_modal_projector.linear_2.weight"
    assert torch.equal(merged[name], new[name])
    shutil.rmtree(tmp_path / "new")
    wrong = ["--projector", "nowhere.bin", "--output", output]
    assert run(app, ["insert-projector", str(checkpoint), *wrong]).exit_code == 3
