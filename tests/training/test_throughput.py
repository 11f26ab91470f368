"""The share of a device's peak in the log: counted operations against those of a step that runs."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode
from transformers import ConvNextConfig, LlamaConfig

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.model.modeling_convllava import set_trainable
from convllava_hf.training.flops import StepFlops, measure_flops
from convllava_hf.training.throughput import Throughput


TOKENS, SIDE = 256, 128


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(num_stages=5, depths=[1] * 5, hidden_sizes=[8, 16, 32, 32, 32]),
        text_config=LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        ),
        image_token_id=300,
    )
    config._attn_implementation = "eager"
    return ConvLlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    "trained",
    [
        ["multi_modal_projector"],
        ["multi_modal_projector", r"vision_tower.*stages\.[34]"],
        ["multi_modal_projector", "language_model", "lm_head"],
        ["."],
    ],
    ids=["projector", "end of the tower", "language model", "all"],
)
def test_operations_are_those_of_a_step(trained, model):
    set_trainable(model, trained)
    ids = torch.randint(3, 299, (1, TOKENS))
    ids[0, :4] = 300
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, pixel_values=pixels, use_cache=False).logits.sum().backward()
    counted = measure_flops(model, SIDE).count(TOKENS, TOKENS**2, SIDE**2)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_frozen_parts_take_less(model):
    set_trainable(model, ["multi_modal_projector"])
    frozen = measure_flops(model, SIDE)
    set_trainable(model, ["."])
    whole = measure_flops(model, SIDE)
    assert frozen.per_token == pytest.approx(whole.per_token * 2 / 3)
    assert frozen.per_pixel < 0.4 * whole.per_pixel


def test_log_names_the_share_of_a_known_peak(monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 2.0, 4.0, 4.0])
    monkeypatch.setattr("convllava_hf.training.throughput.time.perf_counter", lambda: next(clock))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"attention_mask": mask, "pixel_values": torch.zeros(2, 3, 10, 10)}
    known = Throughput(StepFlops(per_token=10, per_pair=2, per_pixel=3), peak=1000.0)
    known.count(batch)
    # 6 tokens, 16 + 4 pairs, 200 pixels, in 2 seconds
    assert known.summarise(Accelerator(cpu=True))["mfu"] == pytest.approx((60 + 40 + 600) / 2 / 1000)
    unknown = Throughput()
    unknown.count(batch)
    assert "mfu" not in unknown.summarise(Accelerator(cpu=True))
