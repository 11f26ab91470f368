"""Files for llama.cpp: the same weights and ids under its names, and what it cannot hold is said or refused."""

import importlib.util

import pytest
import torch

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.export import gguf as writing
from convllava_hf.export.agreement import make_picture
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
    assert "mmproj.gguf" in report.missing


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"text_config": {"model_type": "bloom"}}, "bloom"),
        ({"text_config": {"model_type": "phi", "qk_layernorm": True}}, "qk_layernorm"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "yarn"),
        ({"model_type": "llava", "vision_config": {"model_type": "dinov2"}}, "dinov2"),
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


@pytest.fixture(scope="module")
def llama_cpp():
    """The module that runs llama.cpp."""
    pytest.importorskip("xllamacpp", reason="needs `pip install xllamacpp`, which brings llama.cpp")
    from convllava_hf.export import llama_cpp

    return llama_cpp


# Of scores, over the largest. llama.cpp computes GELU by a table in 16 bits.
TOLERANCE = 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "convllava",
        "llava_v1_5",
        "llava_v0_delta",
        "llavar",
        "tinyllava_llama",
        "tinyllava",
        "tinyllava_stablelm",
    ],
)
def test_llama_cpp_continues_text_as_the_checkpoint_does(convert_family, converted, family, llama_cpp, tmp_path):
    register()
    checkpoint = converted if family == "convllava" else convert_family(family)
    report = export_checkpoint(checkpoint, "gguf", tmp_path / "out")
    # Through SigLIP after a picture, too.
    assert report.agreement.tokens == report.agreement.equal_tokens == (32 if family.startswith("tinyllava") else 16)
    assert report.agreement.logit_difference < TOLERANCE
    assert family.startswith("tinyllava") == (not report.missing)


def test_files_that_say_something_else_are_thrown_away(convert_family, llama_cpp, tmp_path, monkeypatch):
    """What stands between a wrong file and its name: here the rows of queries and keys stay in transformers' order."""
    monkeypatch.setattr(writing, "_interleave_rotary", lambda weight, heads: weight)
    with pytest.raises(ConversionError, match="of 16"):
        export_checkpoint(convert_family("llava_v1_5"), "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_llama_cpp_the_report_says_that_nothing_was_compared(convert_family, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name))
    report = export_checkpoint(convert_family("llava_v1_5"), "gguf", tmp_path / "out")
    assert report.agreement is None and "convllava-hf[gguf]" in report.summary()


@pytest.mark.slow
def test_after_an_image_only_the_place_of_the_class_token_differs(convert_family, llama_cpp, tmp_path, monkeypatch):
    """With CLIP's class token behind the patches instead of before them, torch says what llama.cpp says.

    Where the first assertion fails, llama.cpp is mended: then `CLASS_TOKEN` and docs/deployment.md can go.
    """
    checkpoint = convert_family("llava_v1_5")
    export_checkpoint(checkpoint, "gguf", tmp_path / "out")
    model, processor = load(checkpoint, device="cpu", dtype="float32")
    side = model.config.vision_config.image_size
    probe = (llama_cpp.LlamaCpp(tmp_path / "out"), llama_cpp.PICTURE_PROMPT, make_picture(side, side))
    assert llama_cpp.compare_prompt(model, processor, *probe).logit_difference > 5 * TOLERANCE

    def append_class_token(self, pixel_values, **kwargs):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (I, N, C)
        joined = torch.cat([patches, self.class_embedding.expand(len(patches), 1, -1)], dim=1)  # (I, N + 1, C)
        return joined + self.position_embedding(self.position_ids)

    embeddings = next(part for part in model.modules() if type(part).__name__ == "CLIPVisionEmbeddings")
    monkeypatch.setattr(type(embeddings), "forward", append_class_token)
    found = llama_cpp.compare_prompt(model, processor, *probe)
    assert found.equal_tokens == found.tokens and found.logit_difference < TOLERANCE
