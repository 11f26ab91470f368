"""Freeze plans: against the parameters that the original's training scripts leave trainable, and what they refuse."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, ConvNextConfig, LlamaConfig

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.checkpoints.weight_maps import CONVLLAVA, CONVNEXT
from convllava_hf.model.modeling_convllava import set_trainable
from convllava_hf.training.plans import describe_plan, get_trainable, get_vision_pattern


def rename(name: str) -> str:
    """An original parameter's name in our model."""
    if "vision_tower." in name:
        return "model.vision_tower." + CONVNEXT.rename(name.removeprefix("model.vision_tower.vision_tower."))
    return CONVLLAVA.rename(name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plan_is_the_original_one(stage, reference, converted):
    """Trainable and frozen parameters of each stage, less the output layer that the original's stage 1 forgets."""
    expected = json.loads((reference / "convllava" / "expected.json").read_text())["training_stages"]["stages"]
    names = {kind: {rename(name) for name in expected[f"stage{stage}"][kind]} for kind in ("trainable", "frozen")}
    model = AutoModelForImageTextToText.from_pretrained(converted)
    set_trainable(model, get_trainable(model.config, stage))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    forgotten = {"lm_head.weight"} if stage == 1 else set()
    assert forgotten <= names["trainable"]
    # The widths of the scripts' fifth stage differ from the checkpoint's, its names do not, but for the blocks' number.
    known = {name for name, _ in model.named_parameters()}
    assert trained & names["frozen"] == set()
    assert (names["trainable"] & known) - forgotten == trained & names["trainable"]
    assert {name.split(".layers.")[0] for name in trained} == {
        name.split(".layers.")[0] for name in names["trainable"] - forgotten
    }


def build_config(depths: list[int], **kwargs) -> ConvLlavaConfig:
    return ConvLlavaConfig(
        vision_config=ConvNextConfig(num_stages=len(depths), depths=depths, hidden_sizes=[8] * len(depths)),
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_id=63,
    )


def test_last_18_blocks():
    """The paper's stage 2: of the third stage only the last 18 of 27 blocks, and not its downsampling."""
    config = build_config([3, 3, 27, 3, 6])
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config)
    set_trainable(model, get_trainable(config, 2, "stage3.9"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    blocks = {name.split(".layers.")[1].split(".")[0] for name in trained if "stages.2.layers" in name}
    assert blocks == {str(block) for block in range(9, 27)}
    assert not any("stages.2.downsampling" in name for name in trained)
    assert any("stages.3.downsampling" in name for name in trained)
    assert not any("stages.1." in name or "embeddings.patch" in name for name in trained)


def test_four_stages_train_the_projector_alone_at_first():
    assert get_trainable(build_config([1] * 4), 1) == [r"multi_modal_projector\."]


@pytest.mark.parametrize("first", ["stage6", "stage0", "stage2.3", "3", "stage3.-1", ""])
def test_unknown_place_in_the_tower(first):
    with pytest.raises(ValueError, match=f"vision_from={first!r}.*from 1 to 5.*3, 3, 27, 3, 6"):
        get_vision_pattern([3, 3, 27, 3, 6], first)


def test_unknown_stage_and_tower(converted):
    with pytest.raises(ValueError, match=r"stage=4\b.*1.*2.*3"):
        get_trainable(build_config([1] * 5), 4)
    config = build_config([1] * 5)
    config.vision_config.depths = None
    with pytest.raises(ValueError, match="model_type='convnext'"):
        get_trainable(config, 2)


def test_pattern_without_a_match():
    model = ConvLlavaForConditionalGeneration(build_config([1] * 5))
    with pytest.raises(ValueError, match="'projektor'.*lm_head.weight, model.language_model"):
        set_trainable(model, ["multi_modal_projector", "projektor"])


def test_description_counts_every_parameter_once():
    model = ConvLlavaForConditionalGeneration(build_config([1, 1, 2, 1, 1]))
    set_trainable(model, get_trainable(model.config, 1))
    parts = describe_plan(model)
    assert [part.part for part in parts] == [
        "vision tower, stem",
        *(f"vision tower, stage {number}" for number in range(1, 6)),
        "projector",
        "language model",
    ]
    assert sum(part.trainable + part.frozen for part in parts) == model.num_parameters()
    assert {part.part for part in parts if part.trainable} == {"vision tower, stage 5", "projector"}
    projector = parts[-2]
    assert projector.frozen == 0 and projector.estimate_bytes(torch.bfloat16) == 2 * 4 * projector.trainable
    assert parts[-1].estimate_bytes(torch.float32) == 4 * parts[-1].frozen
