"""Files for llama.cpp: the same weights and ids under its names, and what it cannot hold is said or refused."""

import pytest
import torch

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.export.gguf import check_gguf
from convllava_hf.export.run import export_checkpoint
from convllava_hf.inference.load import load
from convllava_hf.registration import register


@pytest.fixture(scope="module")
def read():
    gguf = pytest.importorskip("gguf")
    register()
    return lambda path: gguf.GGUFReader(path)


def get_tensors(reader) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def test_llava_becomes_a_model_and_a_projector(convert_family, read, tmp_path):
    checkpoint = convert_family("llava_v1_5")
    report = export_checkpoint(checkpoint, "gguf", tmp_path / "out")
    assert set(report.sizes) == {"model.gguf", "mmproj.gguf"}
    assert "llama.cpp#25814" in report.summary()
    model, processor = load(checkpoint, device="cpu", dtype="float32")
    text, image = read(tmp_path / "out" / "model.gguf"), read(tmp_path / "out" / "mmproj.gguf")
    tensors = get_tensors(text)
    assert torch.equal(tensors["output.weight"], model.lm_head.weight.data)
    assert torch.equal(tensors["token_embd.weight"], model.get_input_embeddings().weight.data)
    tokens = [bytes(text.fields["tokenizer.ggml.tokens"].parts[i]) for i in text.fields["tokenizer.ggml.tokens"].data]
    assert tokens[: len(processor.tokenizer)] == [
        piece.encode() for piece in processor.tokenizer.convert_ids_to_tokens(range(len(processor.tokenizer)))
    ]
    layers = model.config.vision_config.num_hidden_layers + 1 + model.config.vision_feature_layer
    assert image.fields["clip.vision.block_count"].contents() == layers
    assert image.fields["clip.vision.feature_layer"].contents() == [layers]  # else llama.cpp stops one block early
    assert "v.post_ln.weight" not in get_tensors(image)


def test_rotary_pairs_are_neighbours(convert_family, read, tmp_path):
    """llama.cpp rotates neighbouring rows of a head, transformers the two halves."""
    checkpoint = convert_family("llava_v1_5")
    export_checkpoint(checkpoint, "gguf", tmp_path / "out")
    model, _ = load(checkpoint, device="cpu", dtype="float32")
    config = model.config.get_text_config()
    before = model.model.language_model.layers[0].self_attn.q_proj.weight.data
    after = get_tensors(read(tmp_path / "out" / "model.gguf"))["blk.0.attn_q.weight"]
    width = config.hidden_size // config.num_attention_heads
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[width // 2])
    assert not torch.equal(after, before)


def test_the_single_layer_of_llava_v0_survives_the_gelu_of_llama_cpp(convert_family, read, tmp_path):
    checkpoint = convert_family("llava_v0_delta")
    export_checkpoint(checkpoint, "gguf", tmp_path / "out")
    model, _ = load(checkpoint, device="cpu", dtype="float32")
    tensors = get_tensors(read(tmp_path / "out" / "mmproj.gguf"))
    features = torch.randn(5, model.config.vision_config.hidden_size)
    inner = torch.nn.functional.linear(features, tensors["mm.0.weight"], tensors["mm.0.bias"])
    outer = torch.nn.functional.linear(
        torch.nn.functional.gelu(inner, approximate="tanh"), tensors["mm.2.weight"], tensors["mm.2.bias"]
    )
    with torch.no_grad():
        torch.testing.assert_close(outer, model.model.multi_modal_projector(features), rtol=1e-4, atol=1e-4)


def test_of_a_convllava_the_language_model_goes_and_the_rest_is_named(converted, read, tmp_path):
    report = export_checkpoint(converted, "gguf", tmp_path / "out")
    assert set(report.sizes) == {"model.gguf"}
    assert "llama.cpp has no ConvNeXt" in report.summary()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"text_config": {"model_type": "phi"}}, "'phi' cannot go to gguf"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "yarn"),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        (
            {
                "model_type": "llava",
                "vision_config": {"model_type": "clip_vision_model"},
                "vision_feature_layer": [-2, -5],
            },
            "vision_feature_layer",
        ),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused_by_its_config(stored, message):
    with pytest.raises(ConversionError, match=message):
        check_gguf(stored)
