"""Conversion of the LLaVA family: what is recognised, what is refused, and what the result holds. Numbers are compared
in test_parity_llava_family.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_sources import edit_json, edit_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    SiglipVisionConfig,
    pipeline,
)

from convllava_hf.checkpoints.reading import StoredTensor
from convllava_hf.checkpoints.shapes import list_shapes
from convllava_hf.checkpoints.weight_maps import LLAVA, LLAVA_PUBLISHED, VIT, ConversionError
from convllava_hf.conversion.convert import convert_checkpoint
from convllava_hf.conversion.deltas import apply_delta
from convllava_hf.conversion.llava_family import JoinedLlava
from convllava_hf.conversion.sources import Source
from convllava_hf.conversion.vocabulary import Vocabulary
from convllava_hf.conversion.writer import plan_weights
from convllava_hf.images import fit_to_corner


REFERENCE = Path(__file__).parents[1] / "reference"
CLIP, SIGLIP = "clip-vit-tiny-patch14-56", "tiny-siglip-so400m-patch14-384"


@pytest.fixture
def parts(tmp_path):
    """A copy of LLaVA v1.5, to damage: `model` and `tower`."""
    shutil.copytree(REFERENCE / "llava_v1_5" / "model", tmp_path / "model")
    shutil.copytree(REFERENCE / "llava_v1_5" / CLIP, tmp_path / "tower")
    return tmp_path


def convert(parts, **kwargs):
    return convert_checkpoint(parts / "model", parts / "output", vision_tower=parts / "tower", **kwargs)


# ---- what comes out


def test_nothing_of_ours_is_in_the_result(parts):
    report = convert(parts)
    files = sorted(path.name for path in (parts / "output").iterdir())
    assert not [name for name in files if name.endswith(".py")]
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        text = (parts / "output" / name).read_text().lower()
        assert "auto_map" not in text and "convllava" not in text
    card = (parts / "output" / "README.md").read_text()
    assert "import convllava_hf" not in card and "trust_remote_code" not in card and "convnext" not in card
    assert report.content["counts"]["written"] == 96 and report.content["dropped"] == {}
    assert set(load_file(parts / "output" / "model.safetensors")) >= {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
    }


def test_a_pipeline_of_transformers_runs_it(parts):
    convert(parts)
    pipe = pipeline("image-text-to-text", model=str(parts / "output"), dtype=torch.float32)
    content = [{"type": "image", "image": Image.new("RGB", (90, 60), "red")}, {"type": "text", "text": "What is it?"}]
    answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_rows_of_the_vocabulary(parts):
    """New tokens get means, and rows behind the tokenizer's words, which the original's loader cuts, are not kept."""
    folder = REFERENCE / "tinyllava"
    report = convert_checkpoint(folder / "model", parts / "output", vision_tower=folder / SIGLIP)
    assert report.content["vocabulary"] == {
        "rows_before": 640,
        "rows_after": 640,
        "added": {"<image>": 600, "<pad>": 601},
    }
    weights = load_file(parts / "output" / "model.safetensors")
    head = torch.load(folder / "model" / "pytorch_model-00003-of-00003.bin", weights_only=True)["lm_head.weight"]
    assert torch.equal(weights["language_model.lm_head.weight"][:600], head[:600])
    mean = head[:600].double().mean(0).half()
    assert torch.equal(weights["language_model.lm_head.weight"][600:], mean.expand(40, -1))


@pytest.mark.parametrize("family", ["llava_v0_delta", "llavar"])
def test_one_layer_becomes_two_exactly(family, parts):
    folder = REFERENCE / family
    tower = next(folder.glob("clip-*"))
    apply_delta(folder / "base", folder / "delta", parts / "merged")
    report = convert_checkpoint(parts / "merged", parts / "output", vision_tower=tower)
    weights, merged = (load_file(parts / name / "model.safetensors") for name in ("output", "merged"))
    assert torch.equal(weights["multi_modal_projector.linear_1.weight"], merged["model.mm_projector.weight"])
    assert torch.equal(weights["multi_modal_projector.linear_2.weight"], torch.eye(64, dtype=torch.float16))
    assert not weights["multi_modal_projector.linear_2.bias"].any()
    config = LlavaConfig.from_pretrained(parts / "output")
    assert config.projector_hidden_act == "linear"
    assert set(report.content["dropped"]) >= {"text tower of CLIP", "not in the vision tower's features"}
    processor = AutoProcessor.from_pretrained(parts / "output")
    assert processor.image_token == "<im_patch>" and config.image_token_id == len(merged["lm_head.weight"]) - 3
    generation = GenerationConfig.from_pretrained(parts / "output")
    assert generation.suppress_tokens == [config.image_token_id]
    stops = ["###"] if family == "llava_v0_delta" else None
    assert getattr(generation, "answer_stop_strings", None) == stops and generation.stop_strings is None
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Read it.\n"}, {"type": "image"}]}]
    )
    assert text.endswith("Read it.\n<im_start><im_patch><im_end>" + ("###" if family == "llava_v0_delta" else " "))
    assert ("###" in text) == (family == "llava_v0_delta")


def test_siglip_from_the_whole_repository_is_the_same(parts):
    folder = REFERENCE / "tinyllava"
    for name in (SIGLIP, f"full-{SIGLIP}"):
        convert_checkpoint(folder / "model", parts / name, vision_tower=folder / name)
    assert "is_local" not in (parts / SIGLIP / "tokenizer_config.json").read_text()
    weights = [load_file(parts / name / "model.safetensors") for name in (SIGLIP, f"full-{SIGLIP}")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    report = json.loads((parts / f"full-{SIGLIP}" / "conversion_report.json").read_text())
    assert report["dropped"]["last layer; the features are those before it"] == 16
    assert (parts / SIGLIP / "config.json").read_bytes() == (parts / f"full-{SIGLIP}" / "config.json").read_bytes()


def test_the_class_token_can_be_a_feature(parts):
    edit_json(parts / "model/config.json", mm_vision_select_feature="cls_patch")
    convert(parts)
    processor = AutoProcessor.from_pretrained(parts / "output")
    model = AutoModelForImageTextToText.from_pretrained(parts / "output", dtype=torch.float32)
    inputs = processor(text="USER: <image> ASSISTANT:", images=Image.new("RGB", (60, 60)), return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 17 == model.config.image_seq_length
    assert model(**inputs).logits.isfinite().all()


def test_options(parts):
    convert(parts, chat_template="llava_v1", dtype="float32")
    processor = AutoProcessor.from_pretrained(parts / "output")
    assert "curious human" in processor.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert {tensor.dtype for tensor in load_file(parts / "output" / "model.safetensors").values()} == {torch.float32}


def test_batches_of_text_after_images_keep_the_leading_space(parts):
    convert(parts)
    tokenizer = AutoProcessor.from_pretrained(parts / "output").tokenizer
    single = tokenizer("a<image>b")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(single) == ["<s>", "\u2581a", "<image>", "\u2581b"]
    batch = tokenizer(["a<image>b", "<image><image>\nc</s>d"])["input_ids"]
    assert batch[0] == single
    pieces = ["<s>", "<image>", "<image>", "\u2581", "<0x0A>", "c", "</s>", "d"]
    assert tokenizer.convert_ids_to_tokens(batch[1]) == pieces


def test_fit_to_corner():
    image = Image.new("L", (40, 20), 255)
    fitted = fit_to_corner(image, 10)
    assert fitted.size == (10, 10) and fitted.mode == "RGB"
    assert fitted.getpixel((9, 4)) == (255, 255, 255) and fitted.getpixel((0, 5)) == (0, 0, 0)
    assert fit_to_corner(Image.new("RGB", (1000, 1)), 10).size == (10, 10)
    for length in range(1, 400):  # the longer side fills the square to the last pixel
        assert fit_to_corner(Image.new("L", (length, 1), 255), 336).getpixel((335, 0)) == (255, 255, 255), length


def test_deltas_are_not_taken_for_models(tmp_path):
    delta = REFERENCE / "llava_v0_delta" / "delta"
    tower = next(path.parent for path in (REFERENCE / "llava_v0_delta").glob("*/preprocessor_config.json"))
    with pytest.raises(ConversionError, match="'model.norm.weight'.*apply-delta"):
        convert_checkpoint(delta, tmp_path / "out", vision_tower=tower)
    assert not (tmp_path / "out").exists()


def test_a_tower_of_its_own_is_not_dropped(parts):
    edit_json(parts / "model" / "config.json", unfreeze_mm_vision_tower=True)
    path = sorted((parts / "model").glob("*.bin"))[0]
    weights = torch.load(path, weights_only=True)
    torch.save({**weights, "model.vision_tower.vision_tower.x": torch.ones(2)}, path)
    with pytest.raises(ConversionError, match=r"model\.vision_tower\.vision_tower\.x"):
        convert_checkpoint(parts / "model", parts / "out", vision_tower=parts / "tower")


def test_settings_that_are_null_are_as_if_they_were_not_there(parts):
    edit_json(parts / "model" / "config.json", image_aspect_ratio=None)
    report = convert_checkpoint(parts / "model", parts / "out", vision_tower=parts / "tower")
    assert not AutoProcessor.from_pretrained(report.output).image_processor.do_pad


def test_special_tokens_that_are_empty_in_one_file_are_read_from_the_other(parts):
    """As in the files of early 2023, whose texts begin with `</s>`."""
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    (parts / "model" / "special_tokens_map.json").write_text(json.dumps(special))
    edit_json(parts / "model" / "tokenizer_config.json", **dict.fromkeys(special, ""))
    report = convert_checkpoint(parts / "model", parts / "out", vision_tower=parts / "tower")
    tokenizer = AutoProcessor.from_pretrained(report.output).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("</s>", "</s>")
    assert tokenizer("Hi")["input_ids"][0] == 2


def test_names_choose_the_template_of_llama_2_and_tokenizers_the_end(parts):
    edit_json(parts / "model" / "config.json", _name_or_path="liuhaotian/llava-llama-2-13b-chat", eos_token_id=1)
    report = convert_checkpoint(parts / "model", parts / "out", vision_tower=parts / "tower")
    assert "[INST]" in AutoProcessor.from_pretrained(report.output).chat_template
    assert json.loads((report.output / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    report = convert_checkpoint(parts / "model", parts / "v1", vision_tower=parts / "tower", chat_template="v1")
    assert "USER" in AutoProcessor.from_pretrained(report.output).chat_template


LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
CLIP_L = CLIPVisionConfig(
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"image_size": 336, "patch_size": 14},
)
SO400M = SiglipVisionConfig(
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16},
    **{"image_size": 384, "patch_size": 14, "vision_use_head": False},
)
PHI_2 = PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, vocab_size=51200)


@pytest.mark.parametrize(
    ("text", "vision", "words", "layers"),
    [
        (LlamaConfig(**LLAMA), CLIP_L, 32000, 2),
        (LlamaConfig(**LLAMA, vocab_size=32003), CLIP_L, 32003, 1),
        (PHI_2, SO400M, 50295, 2),
    ],
    ids=["LLaVA v1.5 7B", "LLaVAR 7B", "TinyLLaVA 3.1B"],
)
def test_full_size_plan_covers_the_model(text, vision, words, layers):
    """The whole plan of a released checkpoint, on shapes alone."""
    rows = text.vocab_size
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(text).state_dict()
        language.pop("lm_head.bias", None)  # Phi has one, TinyLLaVA's Phi has none
        text.vocab_size = -(-(words + 2) // 64) * 64
        act = "gelu" if layers == 2 else "linear"
        config = LlavaConfig(vision_config=vision, text_config=text, projector_hidden_act=act)
        model = LlavaForConditionalGeneration(config)
    width, features = text.hidden_size, vision.hidden_size
    projector = {"0.weight": (width, features), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    if layers == 1:
        projector = {"weight": (width, features), "bias": (width,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in language.items()}
    shapes |= {f"model.mm_projector.{name}": shape for name, shape in projector.items()}
    prefix = "model.vision_tower."
    tower = {
        f"vision_model.{name.removeprefix(prefix)}": tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    }
    sources = []
    for part, table in ((shapes, LLAVA), (tower, VIT)):
        stored = {name: StoredTensor(shape, torch.float16, "file") for name, shape in part.items()}
        sources.append(Source("part", "name", Path(), None, stored, {name: name for name in stored}))
        sources[-1].rename(table)
    tables = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    vocabulary = Vocabulary(tables, words, {"<image>": words}, rows, text.vocab_size, words)
    expected, _ = list_shapes(model, config)
    joined = JoinedLlava(None, None, {})
    joined.model = model
    tensors, records = plan_weights(expected, sources, vocabulary=vocabulary, fresh=joined.fresh)
    assert {tensor.name: tensor.shape for tensor in tensors} == expected
    assert len(expected) == len(model.state_dict()) == len(records)
    assert {LLAVA_PUBLISHED.rename(name) for name in model.state_dict()} == set(expected)


# ---- what is refused


def set_config(**changes):
    def damage(parts):
        edit_json(parts / "model/config.json", **changes)

    return damage


def add_weight(parts):
    path = parts / "model" / "pytorch_model-00003-of-00003.bin"
    edit_weights(path, lambda weights: weights.update({"model.extra": torch.zeros(64)}))


def edit_tower(edit):
    def damage(parts):
        edit_weights(parts / "tower" / "model.safetensors", edit)

    return damage


def other_tower(parts):
    shutil.rmtree(parts / "tower")
    shutil.copytree(REFERENCE / "tinyllava" / SIGLIP, parts / "tower")
    edit_json(parts / "model/config.json", mm_vision_select_feature="cls_patch")


def convnext_tower(parts):
    shutil.rmtree(parts / "tower")
    shutil.copytree(REFERENCE / "convllava" / "vision", parts / "tower")


def other_image_size(parts):
    edit_json(parts / "tower/preprocessor_config.json", size=42, crop_size=42)


def fewer_rows(parts):
    name = "model.embed_tokens.weight"
    path = parts / "model" / "pytorch_model-00001-of-00003.bin"
    edit_weights(path, lambda weights: weights.update({name: weights[name][:900].clone()}))


def remove_projector(parts):
    path = parts / "model" / "pytorch_model-00002-of-00003.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({name: tensor for name, tensor in weights.items() if "mm_projector" not in name}, path)
    path = path.with_name("pytorch_model.bin.index.json")
    index = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map={name: file for name, file in index.items() if "mm_projector" not in name})


def no_tokenizer(parts):
    (parts / "model/tokenizer.model").unlink()


BAD_INPUT = {
    "mpt": (set_config(architectures=["LlavaMptForCausalLM"]), r"architectures = \['LlavaMptForCausalLM'\]; expected"),
    "no architecture": (
        set_config(architectures=None),
        r"architectures = None; expected \['LlavaLlamaForCausalLM'\] or",
    ),
    "mlp3x": (set_config(mm_projector_type="mlp3x_gelu"), "mm_projector_type = 'mlp3x_gelu'; expected 'linear' or"),
    "anyres": (set_config(image_aspect_ratio="anyres"), "mm_patch_merge_type|image_grid_pinpoints"),
    "merging": (set_config(mm_patch_merge_type="spatial_unpad"), "mm_patch_merge_type = 'spatial_unpad'; expected"),
    "layer": (set_config(mm_vision_select_layer=-1), "mm_vision_select_layer = -1; expected -2"),
    "width": (set_config(mm_hidden_size=1024), "mm_hidden_size = 1024; expected 32.*tower"),
    "tied": (set_config(tie_word_embeddings=True), "tie_word_embeddings = True; expected False"),
    "layers": (set_config(num_hidden_layers=1), r"'model\.layers\.1\.\S+', for which the model of its config\.json"),
    "linear projector": (set_config(mm_projector_type="linear"), "a projector of 2 linear layers; expected 1, as its"),
    "no projector": (remove_projector, "a projector of 0 linear layers; expected 2"),
    "unknown weight": (
        add_weight,
        r"unknown weight 'model\.extra'; expected names of a checkpoint of the LLaVA",
    ),
    "missing weight": (
        edit_tower(lambda weights: weights.pop("vision_model.pre_layrnorm.bias")),
        r"1 tensors are in no source, the first of them 'vision_tower\.vision_model\.pre_layrnorm\.bias'",
    ),
    "unknown tower weight": (
        edit_tower(lambda weights: weights.update({"vision_model.extra": torch.zeros(1)})),
        r"unknown weight 'vision_model\.extra'; expected names of a CLIP or SigLIP model",
    ),
    "class token of SigLIP": (other_tower, "mm_vision_select_feature = 'cls_patch'; expected 'patch'"),
    "ConvNeXt": (convnext_tower, r"mm_vision_select_layer = -2; expected -1.*With a ConvNeXt tower only"),
    "image size": (other_image_size, "has size 42; expected 56 pixels, the image_size of config.json"),
    "fewer rows": (fewer_rows, "tokenizer of model has 1000 ids and its embeddings .* have 900 rows"),
    "no tokenizer": (no_tokenizer, r"the tokenizer of model is missing; expected tokenizer\.model\. Get"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input_is_one_clear_error_and_leaves_nothing(parts, damage, message):
    damage(parts)
    before = sorted(path.name for path in parts.iterdir())
    with pytest.raises(ConversionError, match=message) as raised:
        convert(parts)
    assert sorted(path.name for path in parts.iterdir()) == before
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_converted_checkpoints_are_not_converted_again(parts):
    convert(parts)
    with pytest.raises(ConversionError, match="'llava'"):
        convert_checkpoint(parts / "output", parts / "again")


def test_an_unknown_template_is_refused_first(parts):
    with pytest.raises(ValueError, match="chat_template='vicuna'; expected one of chatml, chatml_direct, .*phi"):
        convert(parts, chat_template="vicuna")
