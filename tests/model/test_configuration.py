"""Configurations: plain values, nothing imported or built, hostile files refused, code named where it lies."""

import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import ConvNextConfig, LlamaConfig

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.checkpoints.code_files import HUB_FILES, HUB_FOLDER
from convllava_hf.model.configuration_convllava import AUTO_MAP, TIMM_CONVNEXT_WIDTHS, TIMM_FASTVIT_WIDTHS


def test_a_configuration_imports_and_builds_nothing():
    """As remote code, alone."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("configuration", {str(HUB_FOLDER / "configuration_convllava.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
config = module.ConvLlavaConfig()
assert (config.downsampling_factor, config.vision_feature_size, config.num_image_tokens(1536, 1536)) == (64, 3072, 576)
# What transformers itself imports with every configuration is its tables of names.
loaded = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
print([name for name in loaded if not name.endswith(".modeling_auto")])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr[-2000:]


def test_a_version_of_transformers_that_is_too_old_is_named(tmp_path):
    """Before anything that such a version lacks is imported, from every file of a checkpoint."""
    package = tmp_path / "checkpoint"
    package.mkdir()
    for name in ("__init__.py", *HUB_FILES):
        (package / name).write_bytes((HUB_FOLDER / name).read_bytes())
    code = """
import importlib, sys, types
for version in ("4.57.3", "5.8.1", "5.12.0", "5.18.1.dev0"):
    sys.modules["transformers"] = types.ModuleType("transformers")
    sys.modules["transformers"].__version__ = version
    for kind in ("configuration", "image_processing", "modeling", "processing"):
        try:
            importlib.import_module(f"checkpoint.{kind}_convllava")
        except ImportError as error:
            assert "transformers 5.19 or newer" in str(error) and version in str(error), error
        else:
            raise AssertionError(kind)
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == "done", result.stderr


def test_width_and_stride_of_timms_towers_stand_in_a_table(monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("timm was asked"))
    for name, values in (
        ("fastvit_mci3.apple_mclip2_dfndr2b", (64, 3072)),
        ("convnext_large_mlp.clip_laion2b_ft_320", (32, 1536)),
        ("convnextv2_base", (32, 1024)),
    ):
        config = ConvLlavaConfig(vision_config={"model_type": "timm_wrapper", "architecture": name})
        assert (config.downsampling_factor, config.vision_feature_size) == values


@pytest.mark.parametrize(
    ("vision", "named"),
    [
        ({"architecture": "hf-hub:x/y"}, "architecture='hf-hub:x/y'"),
        ({"architecture": "local-dir:/x"}, "architecture='local-dir:/x'"),
        ({"architecture": "resnet18"}, "architecture='resnet18'"),
        ({"architecture": "convnext_none"}, "architecture='convnext_none'"),
        ({"architecture": "convnext_tiny", "model_args": {"checkpoint_path": "/x.bin"}}, "checkpoint_path='/x.bin'"),
        ({"architecture": "convnext_tiny", "model_args": {"pretrained": True}}, "pretrained=True"),
        ({"architecture": "convnext_tiny", "model_args": {"pretrained_cfg": {"file": "/x"}}}, "pretrained_cfg="),
        ({"architecture": "convnext_tiny", "model_args": {"depths": "/x"}}, "depths='/x'"),
        ({"architecture": "convnext_tiny", "model_args": {"depths": [200000, 1, 1, 1]}}, "200000"),
        ({"architecture": "convnext_tiny", "model_args": {"depths": [1] * 5}}, "5 depths"),
        ({"architecture": "fastvit_t8", "model_args": {"layers": [1, 1, 1, 1]}}, "layers="),
        ({"model_type": "convnext", "depths": [200000, 1, 1, 1]}, "200000"),
        ({"model_type": "convnext", "hidden_sizes": [8, 8, 8, 10**9]}, "1000000000"),
        ({"model_type": "convnext", "depths": [-1, 1, 1, 1]}, "-1"),
    ],
)
def test_towers_that_a_file_may_not_ask_for_are_refused_unbuilt(vision, named, monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("timm was asked"))
    started = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        ConvLlavaConfig(vision_config={"model_type": "timm_wrapper", **vision})
    assert named in str(caught.value)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"text_config": {"model_type": "llama", "num_hidden_layers": 10**6}}, "num_hidden_layers=1000000"),
        ({"text_config": {"model_type": "llama", "hidden_size": 10**9}}, "hidden_size=1000000000"),
        ({"projector_type": "mlp999999x_gelu"}, "mlp999999x_gelu"),
        ({"text_config": {"model_type": "vit"}}, "'vit'"),
    ],
)
def test_other_parts_have_bounds_too(settings, named):
    with pytest.raises(ValueError, match=named):
        ConvLlavaConfig(**settings)


def test_code_is_named_where_it_lies(tmp_path):
    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(num_stages=5, depths=[1] * 5, hidden_sizes=[8] * 5),
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_id=5,
    )

    def list_named(folder):
        named = json.loads((folder / "config.json").read_text()).get("auto_map", {})
        assert all((folder / f"{target.split('.')[0]}.py").is_file() for target in named.values())
        return named

    config.save_pretrained(tmp_path / "config")
    assert list_named(tmp_path / "config") == {"AutoConfig": AUTO_MAP["AutoConfig"]}
    ConvLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    assert list_named(tmp_path / "model") == AUTO_MAP
    ConvLlavaConfig.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert list_named(tmp_path / "again") == {"AutoConfig": AUTO_MAP["AutoConfig"]}
    assert "auto_map" not in ConvLlavaConfig().to_dict()


@pytest.mark.slow
def test_the_table_of_timm_is_what_timm_builds():
    import timm

    names = timm.list_models(["convnext*", "fastvit*"])
    assert len(names) >= 30
    for name in names:
        config = ConvLlavaConfig(vision_config={"model_type": "timm_wrapper", "architecture": name})
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
            shape = model.eval().forward_features(torch.empty(1, 3, 256, 256)).shape
        assert (config.vision_feature_size, 256 // config.downsampling_factor) == (shape[1], shape[2]), name
    known = {name.split("_")[1] for name in names}
    assert known == set(TIMM_CONVNEXT_WIDTHS) | set(TIMM_FASTVIT_WIDTHS)
