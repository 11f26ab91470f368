"""Training steps on two processes (gloo, CPU) whose batches need the tower differently often."""

import json
import subprocess
import sys

import pytest
import torch


WORKER = """
import json
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import ConvNextConfig, LlamaConfig
from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
IMAGES = {"input_ids": torch.tensor([[1, 63, 5, 6, 7]]), "pixel_values": torch.ones(1, 3, 64, 64)}
TEXT = {"input_ids": torch.tensor([[1, 8, 9, 10, 11]])}
SIZES = {
    "input_ids": torch.tensor([[1, 63, 5, 63, 63]]),
    "pixel_values": torch.ones(2, 3, 64, 128),
    "image_sizes": torch.tensor([[64, 64], [64, 128]]),
}
FEATURES = {"input_ids": torch.tensor([[1, 63, 5, 6, 7]]), "vision_features": torch.ones(1, 16)}
# Name -> batches of the ranks, and the passes of the tower that both are told to make.
CASES = {
    "images and text": ((IMAGES, TEXT), {}),
    "features and text": ((FEATURES, TEXT), {}),
    "two sizes and one": ((SIZES, IMAGES), {"vision_passes": 2}),
    "two sizes and text": ((SIZES, TEXT), {"vision_passes": 2}),
}

def build(frozen):
    torch.manual_seed(0)
    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(num_stages=5, depths=[1] * 5, hidden_sizes=[8, 8, 8, 8, 16]),
        text_config=LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                num_attention_heads=2, pad_token_id=0),
        image_token_id=63,
    )
    model = ConvLlavaForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(not frozen)
    return model

def compute_loss(model, batch, **kwargs):
    return model(**batch, **kwargs, labels=batch["input_ids"].masked_fill(batch["input_ids"] == 63, -100)).loss

def compare(kind, frozen, batches, passes):
    # The mean of the losses in one process, which is what averaging gradients over two ranks gives.
    single = build(frozen)
    (sum(compute_loss(single, batch) for batch in batches) / 2).backward()
    expected = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in single.named_parameters()
        if p.requires_grad
    }
    model = build(frozen)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)  # without find_unused_parameters: it must not be needed
    else:
        tower = model.model.vision_tower
        blocks = (*tower.encoder.stages, tower, *model.model.language_model.layers)
        for module in (*blocks, model.model.multi_modal_projector):
            fully_shard(module)
        wrapped = fully_shard(model)
    for step in range(2):  # DDP reports an unused parameter of one step in the next
        wrapped.zero_grad()
        compute_loss(wrapped, batches[rank], **passes).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return max((gradients[name] - expected[name]).abs().max().item() for name in expected)

def check_generation():
    # Of a sharded model that has run nothing yet, and again after a backward pass.
    single, tokens = build(False).eval(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = single.generate(**SIZES, **tokens).tolist()
    model = build(False).eval()
    for module in (*model.model.vision_tower.encoder.stages, *model.model.language_model.layers):
        fully_shard(module)
    register_fsdp_forward_method(fully_shard(model), "generate")
    found = [model.generate(**SIZES, **tokens).tolist()]
    compute_loss(model, SIZES).backward()
    return all(tokens == expected for tokens in [*found, model.generate(**SIZES, **tokens).tolist()])

if sys.argv[1] == "generation":
    assert check_generation()
    CASES = {}
results = {
    f"{case}, {state}": compare(sys.argv[1], state == "frozen", *CASES[case])
    for case in CASES
    for state in ("trained", "frozen")
}
if rank == 0:
    print(json.dumps(results), flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # the threads of FSDP's streams on a CPU may still run, and abort an orderly exit
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_that_need_the_tower_differently_often(kind, tmp_path):
    """Tower trained and frozen: gradients are the mean of those of the two batches in one process."""
    if kind == "fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on CPUs")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(results) == 8 and max(results.values()) < 1e-5, results


@pytest.mark.slow
def test_a_sharded_model_generates_before_it_has_run(tmp_path):
    """FSDP2 gathers weights in `forward`; torch's `register_fsdp_forward_method` makes it do so in `generate`."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on CPUs")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    result = subprocess.run([*command, "generation"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
