"""What `convllava plan --memory` says, against what a training step takes from the allocator of a CPU."""

import gc
import json

import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, ConvNextConfig, LlamaConfig
from typer.testing import CliRunner

from convllava_hf import ConvLlavaConfig
from convllava_hf.cli.app import app
from convllava_hf.model.modeling_convllava import set_trainable
from convllava_hf.training.memory import play_step, run_step
from convllava_hf.training.plans import get_trainable


@pytest.fixture(scope="module")
def config() -> ConvLlavaConfig:
    return ConvLlavaConfig(
        vision_config=ConvNextConfig(num_stages=5, depths=[1] * 5, hidden_sizes=[8, 8, 16, 16, 24]),
        text_config=LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        ),
        image_token_id=300,
    )


class SavedBytes:
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters aside."""

    def __init__(self, model):
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages = {}

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def measure_step(config, patterns, rows, tokens, image_size, recompute):
    """Bytes of weights, gradients, moments and everything else of a real step, and what autograd kept of the latter."""
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).train()
    set_trainable(model, patterns)
    if recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    run_step(model, torch.rand(rows, 3, image_size, image_size), tokens)
    optimizer.step()
    saved = SavedBytes(model)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        pixels = torch.rand(rows, 3, image_size, image_size)
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            run_step(model, pixels, tokens)
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    return weights, gradients, moments, peak, sum(saved.storages.values())


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("rows", "tokens", "image_size"), [(2, 96, 256), (4, 512, 64)])
def test_played_step_takes_what_a_real_one_does(config, stage, rows, tokens, image_size, recompute):
    """Weights, gradients and moments to the byte, activations within 10%: with large images, and with long rows."""
    patterns = get_trainable(config, stage)
    settings = {"rows": rows, "tokens": tokens, "image_size": image_size, "recompute": recompute}
    played = play_step(config, patterns, **settings, bf16=False)
    weights, gradients, moments, activations, saved = measure_step(config, patterns, **settings)
    assert (played.weights, played.gradients) == (weights, gradients)
    assert played.moments == moments
    assert played.activations == pytest.approx(activations, rel=0.1)
    assert played.activations >= 0.9 * saved


def test_recipes_and_gpus(tmp_path):
    """A row for each recipe of the stage and number of GPUs; what is divided, and what is not."""
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny")
    arguments = ["plan", str(checkpoint), "--stage", "3", "--memory", "--gpus", "4", "--tokens", "64"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    table = {
        (row["recipe"].removeprefix("convllava_stage3"), row["gpus"]): row for row in json.loads(done.output)["recipes"]
    }
    assert list(table) == [(kind, gpus) for kind in ("", "_lora", "_qlora") for gpus in (1, 2, 4)]
    parameters = AutoModelForImageTextToText.from_pretrained(checkpoint).num_parameters()
    assert table["", 1]["weights"] == 4 * parameters
    for part in ("weights", "gradients", "moments"):
        assert table["", 4][part] == table["", 1][part] // 4
        assert table["_lora", 4][part] == table["_lora", 1][part]
    assert all(table[kind, 1]["moments"] == 2 * table[kind, 1]["gradients"] > 0 for kind in ("", "_lora", "_qlora"))
    assert table["_qlora", 1]["weights"] < table["_lora", 1]["weights"]
    for row in table.values():
        assert row["total"] == sum(row[part] for part in ("weights", "gradients", "moments", "activations"))
    text = CliRunner().invoke(app, arguments).output
    assert f"{table['', 4]['total'] / 1e9:.2f}" in text and "8 x 64" in text


def test_rows_shorter_than_their_image(tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny")
    done = CliRunner().invoke(app, ["plan", str(checkpoint), "--stage", "1", "--memory", "--tokens", "4"])
    assert done.exit_code == 3 and "an image takes 4 tokens, rows have 4" in done.output
