"""Vision towers of transformers, timm and open_clip."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_sources import edit_json
from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextModel

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.conversion.convert import convert_checkpoint


def test_tower_alone(released, tmp_path):
    report = convert_checkpoint(released / "vision", tmp_path / "tower")
    assert report.content["kind"] == "vision tower"
    assert report.content["counts"]["renamed"] == 83
    original = torch.load(released / "vision" / "pytorch_model.bin", weights_only=True)
    model, info = ConvNextModel.from_pretrained(report.output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.items())
    assert torch.equal(model.layernorm.weight, torch.ones(40, dtype=torch.bfloat16))
    assert model.config.image_size == 128
    settings = json.loads((report.output / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 128}
    assert settings["crop_size"] == {"height": 128, "width": 128}

    # As a tower it is what the original was.
    first = convert_checkpoint(released / "llm", tmp_path / "first", vision_tower=released / "vision")
    second = convert_checkpoint(released / "llm", tmp_path / "second", vision_tower=report.output)
    assert first.content["files"][0]["sha256"] == second.content["files"][0]["sha256"]
    assert second.content["counts"]["dropped"] == 2


def test_tower_inside_a_classifier(released, tmp_path):
    config = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_labels=3)
    model = ConvNextForImageClassification(config)
    model.save_pretrained(tmp_path / "classifier")
    shutil.copy(released / "vision" / "preprocessor_config.json", tmp_path / "classifier")
    report = convert_checkpoint(tmp_path / "classifier", tmp_path / "tower")
    tower = ConvNextModel.from_pretrained(report.output)
    assert all(torch.equal(tensor, tower.state_dict()[name]) for name, tensor in model.convnext.state_dict().items())
    assert report.content["counts"]["dropped"] == 2


def test_timm_tower(parts, tmp_path):
    report = convert_checkpoint(parts / "timm", tmp_path / "tower")
    original = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=3).eval()
    original.load_state_dict(torch.load(parts / "timm" / "pytorch_model.bin", weights_only=True))
    tower = ConvNextModel.from_pretrained(report.output).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            tower(pixels).last_hidden_state, original.forward_features(pixels), rtol=0, atol=1e-5
        )
    settings = json.loads((report.output / "preprocessor_config.json").read_text())
    assert (settings["image_mean"], settings["crop_size"]) == ([0.5, 0.5, 0.5], {"height": 256, "width": 256})


def test_open_clip_tower(parts, tmp_path):
    state = torch.load(parts / "timm" / "pytorch_model.bin", weights_only=True)
    state = {f"visual.trunk.{name}": tensor for name, tensor in state.items() if not name.startswith("head.fc")}
    (tmp_path / "clip").mkdir()
    extra = {
        "logit_scale": torch.ones(()),
        "text_projection": torch.ones(2, 2),
        "visual.head.proj.weight": torch.ones(2),
    }
    save_file({**state, **extra}, tmp_path / "clip" / "open_clip_model.safetensors")
    vision = {"timm_model_name": "convnext_atto", "image_size": 320}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    report = convert_checkpoint(tmp_path / "clip", tmp_path / "tower")
    plain = convert_checkpoint(parts / "timm", tmp_path / "plain")
    assert report.content["files"][0]["sha256"] == plain.content["files"][0]["sha256"]
    assert report.content["dropped"] == {
        "text tower of CLIP": 1,
        "projection of CLIP's image embedding": 1,
        "scale of CLIP's contrastive loss": 1,
    }
    assert "1: text tower of CLIP" in report.summary()
    settings = json.loads((report.output / "preprocessor_config.json").read_text())
    assert settings["crop_size"] == {"height": 320, "width": 320}
    assert settings["image_mean"] == [0.48145466, 0.4578275, 0.40821073]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "convnext_xxlarge"}, "epsilon of 1e-5"),
        ({"model_args": {"norm_eps": 1e-5}}, "norm_eps"),
        ({"model_args": {"act_layer": "gelu_tanh"}}, "act_layer"),
    ],
)
def test_timm_models_with_other_arithmetic_are_refused(parts, tmp_path, config, message):
    shutil.copytree(parts / "timm", tmp_path / "timm")
    edit_json(tmp_path / "timm" / "config.json", **config)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "timm", tmp_path / "tower")
