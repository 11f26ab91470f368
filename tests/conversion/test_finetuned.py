"""What else LLaVA's own code can load: LoRA folders, projectors, trained towers, Mistral, tiles, TinyLLaVA Factory.

The checkpoints are made of the recorded ones, in the layout that the original code writes.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_sources import edit_json
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.conversion.convert import convert_checkpoint
from convllava_hf.conversion.parts import merge_adapter
from convllava_hf.hub.doctor import check_checkpoint


CLIP = "clip-vit-tiny-patch14-56"
PREFIX = "base_model.model."
LAYERS = [f"model.layers.{n}.{leaf}" for n in range(2) for leaf in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def original(reference) -> tuple[Path, Path, dict, dict]:
    """LLaVA v1.5: its folder, its tower's folder, its tensors and its configuration."""
    folder = reference / "llava_v1_5" / "model"
    tensors = {}
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return folder, reference / "llava_v1_5" / CLIP, tensors, json.loads((folder / "config.json").read_text())


def save_original(folder: Path, like: Path, tensors: dict, **config) -> Path:
    """A checkpoint in one file, with the small files of another."""
    folder.mkdir()
    for path in like.iterdir():
        if path.suffix != ".bin" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    edit_json(folder / "config.json", **config)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def save_lora(folder: Path, original, whole: dict, **settings) -> tuple[Path, dict]:
    """A LoRA folder as LLaVA's `train.py` writes it, and the tensors of the two merged."""
    _, _, tensors, config = original
    torch.manual_seed(0)
    merged, factors = {name: tensor.clone() for name, tensor in tensors.items()}, {}
    for layer in LAYERS:
        rows, columns = tensors[f"{layer}.weight"].shape
        first, second = torch.randn(4, columns) * 0.1, torch.randn(rows, 4) * 0.1
        factors[f"{PREFIX}{layer}.lora_A.weight"], factors[f"{PREFIX}{layer}.lora_B.weight"] = first, second
        merged[f"{layer}.weight"] = (merged[f"{layer}.weight"].float() + 2.0 * second @ first).half()
    folder.mkdir()
    torch.save(factors, folder / "adapter_model.bin")
    torch.save({f"{PREFIX}{name}": tensor for name, tensor in whole.items()}, folder / "non_lora_trainables.bin")
    lora = {"peft_type": "LORA", "base_model_name_or_path": "vicuna", "r": 4, "lora_alpha": 8, "bias": "none"}
    lora |= {"task_type": "CAUSAL_LM", "fan_in_fan_out": False, "modules_to_save": None, "lora_dropout": 0.05}
    (folder / "adapter_config.json").write_text(json.dumps({**lora, **settings}))
    # train.py saves the configuration, not the model, so it names the class of the base.
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    return folder, {**merged, **whole}


@pytest.fixture(scope="module")
def trained_projector(original) -> dict:
    torch.manual_seed(1)
    return {name: torch.randn_like(t.float()).half() * 0.1 for name, t in original[2].items() if "mm_projector" in name}


def compare(first: Path, second: Path):
    left, right = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_a_lora_on_its_base_is_what_the_merged_checkpoint_is(original, trained_projector, tmp_path):
    """The base is a Vicuna, without a projector; tokenizer and words are the base's."""
    folder, tower, tensors, _ = original
    lora, merged = save_lora(tmp_path / "lora", original, trained_projector)
    vicuna = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    base = save_original(tmp_path / "vicuna", folder, vicuna, architectures=["LlamaForCausalLM"])
    with pytest.raises(ConversionError, match="--base"):
        convert_checkpoint(lora, tmp_path / "done", vision_tower=tower)
    report = convert_checkpoint(lora, tmp_path / "done", vision_tower=tower, base=base)
    expected = save_original(tmp_path / "merged", folder, merged)
    convert_checkpoint(expected, tmp_path / "expected", vision_tower=tower)
    compare(tmp_path / "done", tmp_path / "expected")
    assert [(part["role"], part["name"]) for part in report.content["sources"][:2]] == [
        ("language model", "lora"),
        ("base", "vicuna"),
    ]
    assert {file["name"] for file in report.content["sources"][0]["files"]} == {
        "non_lora_trainables.bin",
        "adapter_model.bin",
    }
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "done" / name).read_text() == (tmp_path / "expected" / name).read_text()


def test_a_lora_kept_as_an_adapter_merges_to_the_same(original, convert_family, trained_projector, tmp_path):
    lora, _ = save_lora(tmp_path / "lora", original, trained_projector)
    base = convert_family("llava_v1_5")
    adapter = convert_checkpoint(lora, tmp_path / "adapter", base=base, keep_adapter=True)
    assert not any(check.problem for check in check_checkpoint(adapter))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["multi_modal_projector"] and settings["r"] == 4
    merged = AutoModelForImageTextToText.from_pretrained(merge_adapter(adapter, tmp_path / "merged", dtype="float32"))
    convert_checkpoint(lora, tmp_path / "done", vision_tower=original[1], base=original[0], dtype="float32")
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "done").state_dict()
    for name, tensor in merged.state_dict().items():
        # float16 of the base is rounded to once where factors are merged into it.
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=0, msg=name)
    with pytest.raises(ConversionError, match="--keep-adapter"):
        convert_checkpoint(lora, tmp_path / "no", base=original[0], keep_adapter=True)


def test_a_projector_on_its_base(original, trained_projector, tmp_path):
    folder, tower, tensors, config = original
    (tmp_path / "pretrain").mkdir()
    torch.save(trained_projector, tmp_path / "pretrain" / "mm_projector.bin")
    (tmp_path / "pretrain" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "pretrain", tmp_path / "done", vision_tower=tower, base=folder)
    save_original(tmp_path / "whole", folder, {**tensors, **trained_projector})
    convert_checkpoint(tmp_path / "whole", tmp_path / "expected", vision_tower=tower)
    compare(tmp_path / "done", tmp_path / "expected")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"r": 8}, "r = 8"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
    ],
)
def test_other_arithmetic_than_plain_lora_is_refused_by_name(original, tmp_path, settings, problem):
    lora, _ = save_lora(tmp_path / "lora", original, {}, **settings)
    with pytest.raises(ConversionError, match=problem):
        convert_checkpoint(lora, tmp_path / "done", vision_tower=original[1], base=original[0])
    assert not (tmp_path / "done").exists()


def test_a_base_that_does_not_fit_is_refused(original, tmp_path):
    lora, _ = save_lora(tmp_path / "lora", original, {"model.mm_projector.0.weight": torch.zeros(7, 7)})
    with pytest.raises(ConversionError, match=r"\(7, 7\); the base model has \(64, 32\)"):
        convert_checkpoint(lora, tmp_path / "done", vision_tower=original[1], base=original[0])
    with pytest.raises(ConversionError, match="--base"):
        convert_checkpoint(original[0], tmp_path / "done", vision_tower=original[1], base=original[0])


def test_a_trained_tower_is_the_checkpoints_own(original, tmp_path):
    folder, tower, tensors, _ = original
    stored = load_file(tower / "model.safetensors")
    own = {f"model.vision_tower.vision_tower.{name}": t + 1 for name, t in stored.items() if "vision_model" in name}
    save_original(tmp_path / "model", folder, {**tensors, **own}, unfreeze_mm_vision_tower=True)
    report = convert_checkpoint(tmp_path / "model", tmp_path / "done", vision_tower=tower)
    stored = load_file(tmp_path / "done" / "model.safetensors")
    for name, tensor in own.items():
        if "position_ids" not in name:
            assert torch.equal(stored[f"vision_tower.{name.split('vision_tower.')[-1]}"], tensor), name
    assert any("trained further" in reason for reason in report.content["dropped"])
    # A frozen copy is that of the tower's repository, as before.
    edit_json(tmp_path / "model" / "config.json", unfreeze_mm_vision_tower=False)
    convert_checkpoint(tmp_path / "model", tmp_path / "frozen", vision_tower=tower)
    frozen = load_file(tmp_path / "frozen" / "model.safetensors")
    name = "vision_tower.vision_model.post_layernorm.weight"
    assert torch.equal(frozen[name], load_file(tower / "model.safetensors")["vision_model.post_layernorm.weight"])


def test_mistral_computes_what_llama_does_inside_its_window(original, convert_family, tmp_path):
    folder, tower, tensors, _ = original
    settings = {"architectures": ["LlavaMistralForCausalLM"], "sliding_window": None, "rope_theta": 1e4}
    save_original(tmp_path / "model", folder, tensors, **settings)
    convert_checkpoint(tmp_path / "model", tmp_path / "done", vision_tower=tower)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "done", dtype=torch.float32)
    llama = AutoModelForImageTextToText.from_pretrained(convert_family("llava_v1_5"), dtype=torch.float32)
    assert model.config.text_config.model_type == "mistral"
    processor = AutoProcessor.from_pretrained(tmp_path / "done")
    assert "[INST]" in processor.chat_template
    inputs = processor(text="<image>\nA cat.", images=Image.new("RGB", (60, 40), "red"), return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, llama(**inputs).logits, atol=1e-4, rtol=0)


# ---- tiles

PINPOINTS = [[56, 112], [112, 56], [112, 112]]  # width, height


@pytest.fixture(scope="module")
def tiled(original, tmp_path_factory) -> Path:
    folder, tower, tensors, _ = original
    place = tmp_path_factory.mktemp("tiled")
    torch.manual_seed(0)
    newline = {"model.image_newline": torch.randn(64).half()}
    settings = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    save_original(place / "model", folder, {**tensors, **newline}, **settings, image_grid_pinpoints=PINPOINTS)
    convert_checkpoint(place / "model", place / "done", vision_tower=tower)
    return place / "done"


def merge_tiles(features: torch.Tensor, newline: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]):
    """The arrangement of LLaVA v1.6 (`prepare_inputs_labels_for_multimodal`, "spatial_unpad"), in words of this test.

    Args:
        features: `(1 + tiles, N, D)`, the whole picture first.
        newline: `(D,)`.
        size: width and height of the picture in pixels.
        grid: tiles across and down.
    """
    side = math.isqrt(features.shape[1])
    across, down = grid
    board = features[1:].view(down, across, side, side, -1)
    board = torch.cat([torch.cat(list(row), dim=1) for row in board], dim=0)  # (down * side, across * side, D)
    height, width = board.shape[:2]
    if size[0] / size[1] > width / height:
        border = (height - int(size[1] * (width / size[0]))) // 2
        board = board[border : height - border]
    else:
        border = (width - int(size[0] * (height / size[1]))) // 2
        board = board[:, border : width - border]
    lines = torch.cat([board, newline.expand(board.shape[0], 1, -1)], dim=1)
    return torch.cat([features[0], lines.flatten(0, 1)])


@pytest.mark.parametrize(("size", "grid"), [((100, 40), (2, 1)), ((30, 90), (1, 2)), ((90, 80), (2, 2))])
def test_tiles_are_arranged_as_the_original_does(tiled, size, grid):
    model = AutoModelForImageTextToText.from_pretrained(tiled, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tiled)
    assert model.config.model_type == "llava_next" and not any(check.problem for check in check_checkpoint(tiled))
    image = Image.effect_noise(size, 80).convert("RGB")
    inputs = processor(text="<image>\nA cat.", images=image, return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 1 + grid[0] * grid[1]
    with torch.no_grad():
        vision = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True)
        features = model.model.multi_modal_projector(vision.hidden_states[-2][:, 1:])
        expected = merge_tiles(features, model.model.image_newline, size, grid)
        found = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        torch.testing.assert_close(found.pooler_output[0], expected, atol=1e-5, rtol=0)
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == len(expected)
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type = 'flat'"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[56, 100]]}, "multiples of 56"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio = 'anyres_max_9'"),
    ],
)
def test_other_tiles_are_refused_by_name(original, tmp_path, settings, problem):
    folder, tower, tensors, _ = original
    tiles = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    tensors = {**tensors, "model.image_newline": torch.zeros(64).half()}
    save_original(tmp_path / "model", folder, tensors, **{**tiles, **settings})
    with pytest.raises(ConversionError, match=problem):
        convert_checkpoint(tmp_path / "model", tmp_path / "done", vision_tower=tower)


# ---- TinyLLaVA Factory

FACTORY_NAMES = {
    "model.vision_tower.vision_tower.": "vision_tower._vision_tower.",
    "model.mm_projector.": "connector._connector.",
    "": "language_model.",
}


@pytest.fixture
def factory(reference, tmp_path) -> Path:
    """The recorded TinyLLaVA under the names of TinyLLaVA Factory, with its tower whole."""
    folder, tensors = reference / "tinyllava" / "model", {}
    tower = reference / "tinyllava" / "full-tiny-siglip-so400m-patch14-384"
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    tensors = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    vision = {name: t for name, t in load_file(tower / "model.safetensors").items() if name.startswith("vision_model.")}
    tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in vision.items()}
    renamed = {}
    for name, tensor in tensors.items():
        start, new = next((start, new) for start, new in FACTORY_NAMES.items() if name.startswith(start))
        renamed[new + name.removeprefix(start)] = tensor
    text = json.loads((folder / "config.json").read_text())
    vision = json.loads((tower / "config.json").read_text())
    vision = vision.get("vision_config", vision)
    save_original(tmp_path / "factory", folder, renamed)
    config = {"model_type": "tinyllava", "architectures": ["TinyLlavaForConditionalGeneration"]}
    config |= {"text_config": {**text, "model_type": "phi"}, "connector_type": "mlp2x_gelu"}
    config |= {"vision_config": {**vision, "model_type": "siglip_vision_model"}, "image_aspect_ratio": "square"}
    config |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "cls_patch"}
    config |= {"tokenizer_model_max_length": 3072}
    (tmp_path / "factory" / "config.json").write_text(json.dumps(config))
    return tmp_path / "factory"


def test_tinyllava_factory_is_tinyllava_in_other_words(factory, convert_family, tmp_path):
    convert_checkpoint(factory, tmp_path / "done")
    compare(tmp_path / "done", convert_family("tinyllava"))
    left, right = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "done", convert_family("tinyllava")))
    assert left.image_seq_length == right.image_seq_length and left.vision_feature_select_strategy == "full"


def test_tinyllava_factory_can_drop_the_first_patch(factory, tmp_path):
    """`patch` takes the class token off CLIP; SigLIP has none, and loses its first patch."""
    edit_json(factory / "config.json", vision_feature_select_strategy="patch")
    convert_checkpoint(factory, tmp_path / "done")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "done", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "done")
    image = Image.effect_noise((50, 50), 80).convert("RGB")
    inputs = processor(text="<image>\nA cat.", images=image, return_tensors="pt")
    number = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert number == model.config.image_seq_length
    with torch.no_grad():
        whole = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
        assert number == whole.shape[1] - 1
        found = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        torch.testing.assert_close(found, model.model.multi_modal_projector(whole[:, 1:])[0], atol=1e-5, rtol=0)
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"connector_type": "resampler"}, "connector_type = 'resampler'"),
        ({"vision_feature_layer": -1}, "vision_feature_layer = -1"),
        ({"text_config": {"model_type": "gemma"}}, "text_config.model_type = 'gemma'"),
        ({"vision_config": {"model_type": "dinov2"}}, "vision_config.model_type = 'dinov2'"),
    ],
)
def test_other_parts_of_the_factory_are_refused_by_name(factory, tmp_path, settings, problem):
    edit_json(factory / "config.json", **settings)
    with pytest.raises(ConversionError, match=problem):
        convert_checkpoint(factory, tmp_path / "done")
