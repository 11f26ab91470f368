"""Training on an accelerator: sharded by FSDP2, with 8-bit optimizers, on 4-bit weights, from pictures as bytes."""

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
from packaging.version import Version


pytestmark = pytest.mark.gpu

FSDP = """
import json
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from convllava_hf import ConvLlavaForConditionalGeneration

folder, device = sys.argv[1:]
dist.init_process_group("nccl" if device == "cuda" else "gloo")
torch.backends.cudnn.allow_tf32 = False
batch = {key: value.to(device) for key, value in torch.load(f"{folder}/batch.pt").items()}
losses = {}
for kind in ("whole", "sharded"):
    model = ConvLlavaForConditionalGeneration.from_pretrained(f"{folder}/tiny").to(device).train()
    if kind == "sharded":
        mesh = init_device_mesh(device, (1,))
        for module in (*model.model.vision_tower.encoder.stages, model.model.vision_tower,
                       model.model.multi_modal_projector, *model.model.language_model.layers, model):
            fully_shard(module, mesh=mesh)
    optimizer, losses[kind] = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[kind].append(loss.item())
losses["kinds"] = sorted({type(parameter).__name__ for parameter in model.parameters()})
print(json.dumps(losses), flush=True)
dist.destroy_process_group()
os._exit(0)  # the threads of FSDP's streams on a CPU may still run, and abort an orderly exit
"""


def train(model, optimizer, batch: dict, steps: int, autocast=nullcontext) -> list[float]:
    """Losses of steps on one batch, each in an `autocast()` of its own: it keeps its copies of weights to its end."""
    losses = []
    for _ in range(steps):
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fsdp2_on_one_device_trains_as_the_whole_model(device, checkpoint, batch):
    import torch

    folder = checkpoint.parent
    torch.save(batch, folder / "batch.pt")
    script = folder / "worker.py"
    script.write_text(FSDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", script, folder]
    result = subprocess.run([*command, device.type], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = json.loads(result.stdout.strip().splitlines()[-1])
    assert losses["kinds"] == ["DTensor"]
    assert losses["sharded"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["whole"][-1] < losses["whole"][0]


def test_8_bit_optimizer_trains_and_keeps_its_moments_in_8_bits(load_model, batch, put, device):
    import torch

    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    if device.type == "cpu" and Version(bitsandbytes.__version__) < Version("0.50"):
        pytest.skip("old bitsandbytes (0.46.1) has optimizers for GPUs alone")
    model = load_model().train()
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    losses = train(model, optimizer, put(batch), 5)
    assert losses[-1] < losses[0]
    states = {
        value.dtype
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() >= 4096
    }
    assert torch.uint8 in states


def test_lora_on_4_bit_weights_trains_the_adapter_alone(device, checkpoint, batch, put):
    """QLoRA as the recipes do it: tower, projector and output layer stay as they are."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    from convllava_hf import ConvLlavaForConditionalGeneration

    pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    model = ConvLlavaForConditionalGeneration.from_pretrained(
        checkpoint, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device}
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert any(parameter.dtype == torch.uint8 for parameter in before.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The tower was cast to float32 for training; the 4-bit layers compute in bfloat16.
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    losses = train(model.train(), torch.optim.AdamW(trained, lr=1e-2), put(batch), 5, autocast)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter.detach(), before[name])
        assert moved == ("lora_" in name), name


def test_pictures_travel_as_bytes_and_are_normalised_on_the_device(device, checkpoint, tmp_path):
    import torch

    pytest.importorskip("trl", reason="needs the extra `train`")
    pytest.importorskip("datasets", reason="needs the extra `train`")
    from tiny_data import make_rows
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from convllava_hf.registration import register
    from convllava_hf.training.arguments import ConvLlavaTrainingArguments
    from convllava_hf.training.trainer import ConvLlavaTrainer

    register()
    batches = []
    for as_bytes in (True, False):
        trainer = ConvLlavaTrainer(
            model=AutoModelForImageTextToText.from_pretrained(checkpoint),
            processing_class=AutoProcessor.from_pretrained(checkpoint),
            train_dataset=make_rows(8),
            args=ConvLlavaTrainingArguments(
                output_dir=str(tmp_path / "output"),
                per_device_train_batch_size=4,
                max_length=None,
                assistant_only_loss=True,
                use_cpu=device.type == "cpu",
                bf16=False,
                max_steps=1,
                save_strategy="no",
                report_to="none",
                normalize_on_device=as_bytes,
            ),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["pixel_values"].dtype == torch.uint8) == as_bytes
        pixels = trainer._prepare_inputs(batch)["pixel_values"]
        assert pixels.device.type == device.type
        batches.append(pixels.float().cpu())
        assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    torch.testing.assert_close(*batches)
