"""Tables of words grow, and a full-size model is planned."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ConvNextConfig, ConvNextModel, LlamaConfig

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.checkpoints.reading import StoredTensor
from convllava_hf.checkpoints.weight_maps import CONVLLAVA, CONVNEXT, VISION_TOWER
from convllava_hf.conversion.sources import Source
from convllava_hf.conversion.vocabulary import Vocabulary, extend_rows
from convllava_hf.conversion.writer import plan_weights


def test_new_rows_are_means(done):
    written = load_file(done.output / "model.safetensors")
    head, table = written["lm_head.weight"], written["model.language_model.embed_tokens.weight"]
    mean = head[:1000].double().mean(0).bfloat16()
    assert all(torch.equal(row, mean) for row in head[1000:])
    # 24 new rows, each the mean of every 24th word.
    for number in (0, 1, 23):
        torch.testing.assert_close(table[1000 + number], table[number:1000:24].double().mean(0).bfloat16())
    assert len(torch.unique(table[1000:], dim=0)) == 24


@pytest.mark.parametrize("num_words", [1, 3, 5000])
@pytest.mark.parametrize("distinct", [True, False])
def test_extend_rows(num_words, distinct):
    rows = torch.randn(num_words + 2, 3)
    new_rows = [num_words, *range(num_words + 2, num_words + 8)]
    table = extend_rows(rows, num_words + 8, new_rows, num_words, distinct)
    assert torch.equal(table[:num_words], rows[:num_words])
    assert torch.equal(table[num_words + 1], rows[num_words + 1])  # neither a word nor new
    step = min(7, num_words) if distinct else 1
    for number, row in enumerate(new_rows):
        expected = rows[number % step : num_words : step].double().mean(0).float()
        torch.testing.assert_close(table[row], expected)
    assert extend_rows(rows[:, 0], num_words + 8, new_rows, num_words, distinct).shape == (num_words + 8,)
    assert torch.equal(extend_rows(rows, len(rows), [], num_words, distinct), rows)


def test_full_size_plan_covers_the_model():
    """The whole plan for a released 7B checkpoint, on shapes alone."""
    text = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    vision = ConvNextConfig(num_stages=5, depths=[3, 3, 27, 3, 6], hidden_sizes=[192, 384, 768, 1536, 3072])
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(text).state_dict()
        tower = ConvNextModel(vision).state_dict()
        text.vocab_size = 32064
        config = ConvLlavaConfig(vision_config=vision, text_config=text, image_token_id=32000, vocab_padding=62)
        whole = ConvLlavaForConditionalGeneration(config).state_dict()
    projector = {"0.weight": (4096, 3072), "0.bias": (4096,), "2.weight": (4096, 4096), "2.bias": (4096,)}
    language |= {f"model.mm_projector.{name}": torch.empty(shape, device="meta") for name, shape in projector.items()}
    tower = {name: tensor for name, tensor in tower.items() if not name.startswith("layernorm.")}

    sources = []
    for state, tables in ((language, [CONVLLAVA]), (tower, [CONVNEXT, VISION_TOWER])):
        stored = {name: StoredTensor(tuple(tensor.shape), torch.bfloat16, "file") for name, tensor in state.items()}
        sources.append(Source("part", "name", Path(), None, stored, {name: name for name in stored}))
        for table in tables:
            sources[-1].rename(table)
    tables = ("model.language_model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    vocabulary = Vocabulary(tables, 32000, {"<image>": 32000, "<pad>": 32001}, 32000, 32064, 32000)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    tensors, records = plan_weights(shapes, sources, vocabulary=vocabulary)
    assert {tensor.name: tensor.shape for tensor in tensors} == shapes
    assert len(records) == 295 + 398
    assert sum(tensor.num_bytes for tensor in tensors) == 2 * (7_436_945_600 - 2 * 3072 + 2 * 64 * 4096 + 2 * 3072)
