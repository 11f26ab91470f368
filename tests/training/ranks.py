"""Runs the trainer on several processes of this machine: gloo, and DDP or torch's FSDP2 through accelerate.

accelerate takes FSDP for accelerators alone and falls back to DDP on a CPU. What it would do on a GPU is made to happen
here by telling its state so; sharding, gathering, clipping, saving and loading are then accelerate's own.
"""

import multiprocessing
import os
import socket
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset, load_from_disk
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from convllava_hf.registration import register
from convllava_hf.training.arguments import ConvLlavaTrainingArguments
from convllava_hf.training.trainer import ConvLlavaTrainer


# One clean process imports everything once; the ranks are forks of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks"])


class CountPasses(TrainerCallback):
    """How often the tower ran, and whether the weights are sharded."""

    def __init__(self):
        self.passes, self.is_sharded = 0, False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
        tower.register_forward_pre_hook(lambda *_: setattr(self, "passes", self.passes + 1))


def train(checkpoint: Path, rows: Path | Dataset, output: Path, **settings) -> tuple[ConvLlavaTrainer, CountPasses]:
    """Trains in this process, which may be a rank; the model is saved in `output`."""
    register()
    is_native = settings.pop("native", False)
    evaluate = settings.pop("evaluate", False)
    resume = settings.pop("resume", None)
    dataset = rows if isinstance(rows, Dataset) else load_from_disk(rows)
    processor = AutoProcessor.from_pretrained(checkpoint)
    if is_native:
        processor.image_processor.image_aspect_ratio = "native"
    trainer = ConvLlavaTrainer(
        model=AutoModelForImageTextToText.from_pretrained(checkpoint),
        processing_class=processor,
        train_dataset=dataset,
        eval_dataset=dataset if evaluate else None,
        args=ConvLlavaTrainingArguments(
            **{
                "output_dir": str(output),
                "learning_rate": 3e-3,
                "lr_scheduler_type": "constant",
                "optim": "adamw_torch",
                "adam_epsilon": 1e-4,  # Adam divides by tiny second moments, and differences of rounding with them
                "max_grad_norm": 0.5,
                "max_length": None,
                "assistant_only_loss": True,
                "num_train_epochs": 1,
                "train_sampling_strategy": "sequential",
                "gradient_checkpointing": False,
                "use_cpu": True,
                "bf16": False,
                "save_strategy": "no",
                "eval_strategy": "steps" if evaluate else "no",
                "eval_steps": 1,
                "logging_steps": 1,
                "disable_tqdm": True,
                "report_to": "none",
                **settings,
            }
        ),
    )
    counter = CountPasses()
    trainer.add_callback(counter)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output))
    return trainer, counter


def _run_rank(rank: int, world: int, port: int, kind: str, results, *args, **settings) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )
    torch.set_num_threads(1)
    try:
        if kind == "fsdp2":
            settings.update(
                fsdp=True,
                fsdp_config={
                    "version": 2,
                    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                    "state_dict_type": "FULL_STATE_DICT",
                    "cpu_ram_efficient_loading": False,
                },
            )
            prepare_state = AcceleratorState.__init__

            def choose_fsdp(self, *arguments, fsdp_plugin=None, **kwargs):
                prepare_state(self, *arguments, fsdp_plugin=fsdp_plugin, **kwargs)
                plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
                if plugin is not None:  # also when the shared state is asked for again
                    self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

            AcceleratorState.__init__ = choose_fsdp
        trainer, counter = train(*args, **settings)
        results.put((rank, counter.passes, counter.is_sharded, trainer.state.log_history))
    except BaseException:
        results.put((rank, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)  # the threads of FSDP's streams on a CPU may still run, and abort an orderly exit


def train_on_ranks(world: int, kind: str, *args, timeout: float = 120, **settings) -> list[tuple]:
    """Trains on `world` processes; `kind` is "ddp" or "fsdp2".

    Returns:
        For each rank, how often the tower ran, whether weights were sharded, and the log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_run_rank, args=(rank, world, port, kind, results, *args), kwargs=settings)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        done = [results.get(timeout=timeout) for _ in processes]
    finally:
        for process in processes:
            process.kill()
    for result in done:
        assert len(result) == 4, f"rank {result[0]}: {result[1][-6000:]}"
    return [result[1:] for result in sorted(done)]
