"""New models from two parts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_sources import edit_json
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from convllava_hf import ConvLlavaConfig
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.conversion.init import init_model
from convllava_hf.model.modeling_convllava import PADDED_ID_SCORE


def test_init_joins_two_parts(parts, tmp_path):
    report = init_model(parts / "timm", parts / "llama", tmp_path / "model", resolution=192, add_stage="2x40")
    config = AutoConfig.from_pretrained(report.output)
    assert config.vision_config.hidden_sizes == [8, 16, 24, 32, 40]
    assert config.vision_config.depths == [1, 1, 2, 1, 2]
    assert config.downsampling_factor == 64
    written = load_file(report.output / "model.safetensors")
    text = load_file(parts / "llama" / "model.safetensors")
    rows = len(text["lm_head.weight"])
    assert torch.equal(written["lm_head.weight"][:rows], text["lm_head.weight"])
    tower = torch.load(parts / "timm" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(written["model.vision_tower.embeddings.layernorm.bias"], tower["stem.1.bias"])
    fresh = [record["target"] for record in report.content["tensors"] if record["action"] == "initialised"]
    assert len(fresh) == 4 + 4 + 2 * 9
    assert all(
        name.startswith(("model.multi_modal_projector.", "model.vision_tower.encoder.stages.4.")) for name in fresh
    )

    # torch's defaults, as the original's new modules: uniform up to 1 / sqrt(inputs).
    stage = "model.vision_tower.encoder.stages.4."
    weight, bias = (written[f"{stage}layers.1.pwconv1.{leaf}"] for leaf in ("weight", "bias"))
    assert 0.9 / 40**0.5 < weight.abs().max() <= 1 / 40**0.5
    assert 0.9 / 40**0.5 < bias.abs().max() <= 1 / 40**0.5
    assert torch.equal(written[f"{stage}layers.1.layernorm.weight"], torch.ones(40))
    assert torch.equal(written[f"{stage}layers.1.layer_scale_parameter"], torch.full((40,), 1e-6))
    assert not torch.equal(written[f"{stage}layers.0.pwconv1.weight"], weight)

    model, processor = (
        AutoModelForImageTextToText.from_pretrained(report.output),
        AutoProcessor.from_pretrained(report.output),
    )
    pixels = torch.randint(0, 255, (3, 100, 80), dtype=torch.uint8)
    inputs = processor(images=pixels, text="<image>\na red square", return_tensors="pt")
    assert (inputs["input_ids"] == config.image_token_id).sum() == 9
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_init_is_reproducible(parts, tmp_path):
    hashes = []
    for number, seed in enumerate((0, 0, 1)):
        report = init_model(parts / "timm", parts / "llama", tmp_path / str(number), resolution=128, seed=seed)
        hashes.append(report.content["files"][0]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_init_without_a_new_stage(parts, tmp_path):
    report = init_model(
        parts / "timm",
        parts / "llama",
        tmp_path / "model",
        resolution=128,
        projector_type="mlp3x_gelu",
        dtype="bfloat16",
    )
    config = AutoConfig.from_pretrained(report.output)
    assert (config.downsampling_factor, config.projector_type) == (32, "mlp3x_gelu")
    assert config.num_image_tokens(128, 128) == 16
    model = AutoModelForImageTextToText.from_pretrained(report.output, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.content["counts"]["initialised"] == 6


def test_init_with_tied_embeddings_and_spare_rows(parts, tmp_path):
    report = init_model(parts / "timm", parts / "qwen2", tmp_path / "model", resolution=128)
    vocabulary = report.content["vocabulary"]
    assert (vocabulary["rows_before"], vocabulary["rows_after"]) == (320, 320)
    written = load_file(report.output / "model.safetensors")
    assert "lm_head.weight" not in written
    original = load_file(parts / "qwen2" / "model.safetensors")["model.embed_tokens.weight"]
    table = written["model.language_model.embed_tokens.weight"]
    changed = [row for row in range(320) if not torch.equal(original[row], table[row])]
    assert changed == sorted(vocabulary["added"].values())
    assert ConvLlavaConfig.from_pretrained(report.output).tie_word_embeddings
    processor = AutoProcessor.from_pretrained(report.output)
    assert not processor.chunk_prefix_space
    assert "<|im_start|>" in processor.chat_template
    assert processor.tokenizer.chat_template == processor.chat_template
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(report.output).eos_token_id == [0, end]


def test_init_with_ids_that_the_tokenizer_leaves_out(parts, tmp_path):
    shutil.copytree(parts / "qwen2", tmp_path / "gap")
    file = tmp_path / "gap" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    highest = max(vocabulary.values()) + 12
    (end,) = [token for token in content["added_tokens"] if token["content"] == "<|im_end|>"]
    tokens = {"<image>": highest - 2, "<pad>": highest - 1, "<|im_end|>": highest}
    vocabulary.update(tokens)
    others = [token for token in content["added_tokens"] if token["content"] not in tokens]
    content["added_tokens"] = others + [{**end, "content": token, "id": number} for token, number in tokens.items()]
    file.write_text(json.dumps(content))
    edit_json(tmp_path / "gap" / "tokenizer_config.json", added_tokens_decoder={}, pad_token="<pad>")

    report = init_model(parts / "timm", tmp_path / "gap", tmp_path / "model", resolution=128)
    ids = AutoProcessor.from_pretrained(report.output).tokenizer.get_vocab()
    config = ConvLlavaConfig.from_pretrained(report.output)
    assert ids["<|im_end|>"] == highest and len(ids) <= highest
    assert config.vocab_padding == config.text_config.vocab_size - highest - 1
    model = AutoModelForImageTextToText.from_pretrained(report.output)
    assert model(input_ids=torch.tensor([[5]])).logits[..., highest] > PADDED_ID_SCORE


def test_init_with_a_biased_head(parts, tmp_path):
    report = init_model(parts / "timm", parts / "phi", tmp_path / "model", resolution=128)
    bias = load_file(report.output / "model.safetensors")["lm_head.bias"]
    original = load_file(parts / "phi" / "model.safetensors")["lm_head.bias"]
    assert torch.equal(bias[: len(original)], original)
    assert len(bias) == 320
    torch.manual_seed(0)
    ids = torch.randint(0, 200, (1, 7))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(parts / "phi").eval()(ids).logits
        found = AutoModelForImageTextToText.from_pretrained(report.output).eval()(input_ids=ids).logits
    assert torch.equal(found[..., : len(original)], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 100}, "100x100"),
        ({"add_stage": "6*40"}, r"add_stage='6\*40'; expected BLOCKSxWIDTH"),
        ({"add_stage": "0x40"}, "add_stage='0x40'"),
        ({"projector_type": "resampler"}, "projector_type='resampler'"),
        ({"chat_template": "alpaca"}, "chat_template='alpaca'; expected one of .*vicuna_v1"),
        ({"text": "timm"}, "timm .*--text"),
        ({"vision": "llama"}, "llama "),
        ({"vision": "nowhere/at all"}, "nowhere/at all"),
        ({"text_revision": "main"}, "revision 'main'"),
    ],
)
def test_init_refuses_what_does_not_fit(parts, tmp_path, options, message):
    options = {"vision": "timm", "text": "llama", "resolution": 128, **options}
    paths = [parts / options.pop(name) for name in ("vision", "text")]
    with pytest.raises(ValueError, match=message):
        init_model(*paths, tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []


def test_init_wants_a_template_that_fits(parts, tmp_path):
    shutil.copytree(parts / "qwen2", tmp_path / "text")
    content = (tmp_path / "text" / "tokenizer.json").read_text().replace("<|im_end|>", "<|im_stop|>")
    (tmp_path / "text" / "tokenizer.json").write_text(content)
    edit_json(tmp_path / "text" / "tokenizer_config.json", extra_special_tokens=[])
    with pytest.raises(ConversionError, match=r"'vicuna_v1' does not fit.*'</s>'.*with one of phi, chatml"):
        init_model(parts / "timm", tmp_path / "text", tmp_path / "model", resolution=128, chat_template="vicuna_v1")
    init_model(parts / "timm", tmp_path / "text", tmp_path / "model", resolution=128, chat_template="plain")
