"""Smaller weights: what `--quantize` leaves alone, and skip lists that leave nothing alone."""

import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import convllava_hf
from convllava_hf.model.modeling_convllava import check_skipped_modules


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("quantize") / "model")


@pytest.mark.parametrize("key", ["llm_int8_skip_modules", "modules_to_not_convert"])
def test_a_skip_list_that_matches_nothing_is_refused_by_name(checkpoint, key):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for skipped in ("vision_tower", "multi_modal_projector", "model.vision"):
        model.config.quantization_config = {key: ["lm_head", skipped]}
        if skipped == "model.vision":  # the beginning of a name is enough for a quantiser
            check_skipped_modules(model)
            continue
        with pytest.raises(ValueError, match=rf"{key} names '{skipped}'.*model.vision_tower"):
            check_skipped_modules(model)
    model.config.quantization_config = {key: ["lm_head", "model.vision_tower", "q_proj"]}
    check_skipped_modules(model)


def test_bitsandbytes_does_not_get_away_with_it(checkpoint):
    pytest.importorskip("bitsandbytes", reason="8 bits need the extra `quantization`")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "vision_tower"])
    with pytest.raises(ValueError, match="llm_int8_skip_modules .*'vision_tower'"):
        AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=config)


def test_int8_of_torchao(checkpoint, tmp_path, photo):
    pytest.importorskip("torchao", reason="int8 needs the extra `quantization`")
    whole, processor = convllava_hf.load(checkpoint, device="cpu")
    small, _ = convllava_hf.load(checkpoint, device="cpu", quantize="int8")
    kinds = {
        name: type(module.weight) is nn.Parameter
        for name, module in small.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert all(kept == ("language_model" not in name) for name, kept in kinds.items()) and any(kinds.values())
    inputs = processor(text="<image>What?", images=photo, return_tensors="pt")
    with torch.no_grad():
        expected, found = (model(**inputs).logits.flatten() for model in (whole, small))
    assert torch.cosine_similarity(expected, found, dim=0) > 0.999
    small.save_pretrained(tmp_path / "int8")
    processor.save_pretrained(tmp_path / "int8")
    again, _ = convllava_hf.load(tmp_path / "int8", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits.flatten(), found)
