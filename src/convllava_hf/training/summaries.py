"""What a run says before its first step, when it is stopped, and at its end."""

import math
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .plans import estimate_states
from .runs import find_last_checkpoint


logger = logging.get_logger(__name__)


class StartSummaryCallback(TrainerCallback):
    """Says at the start what will happen."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            logger.warning(describe_start(self.trainer))


def describe_start(trainer: Trainer) -> str:
    """Rows, steps, what is trained, sizes, memory and the place of the results, a line each."""
    args, state = trainer.args, trainer.state
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    step = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    per_step = math.prod(step)
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in parameters)
    size = getattr(getattr(trainer.processing_class, "image_processor", None), "size", None) or {}
    height = size.get("height") or size.get("shortest_edge")
    states = estimate_states(trainer.model, trainer.args.world_size if trainer.is_fsdp_enabled else 1)
    lines = {
        "data": f"{trainer.data or 'rows'}: {'a stream' if rows is None else f'{rows:,} rows'}",
        "steps": f"{state.max_steps:,} of {per_step} rows ({step[0]} x {step[1]} accumulated x {step[2]} processes)",
        "trained": f"{trained:,} of {every:,} parameters ({trained / every:.1%})",
        "images": f"{height} pixels a side" if height else "as the checkpoint prepares them",
        "longest row": f"about {trainer.longest_row:,} tokens" if trainer.longest_row else "not measured",
        "cut at": f"{args.max_length:,} tokens" if args.max_length else "nothing is cut",
        "memory": f"{states / 1e9:.3g} GB per process without activations, which `convllava plan --memory` adds",
        "output": args.output_dir,
    }
    if rows:
        lines["steps"] += f": each row is seen {state.max_steps * per_step / rows:.3g} times"
    width = max(map(len, lines))
    return "\n".join(["training:", *(f"  {name:{width}}  {text}" for name, text in lines.items())])


def describe_end(trainer: Trainer) -> str:
    """Where the model is, what it reached, and what to do next."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reached = f"loss {losses[0]:.3f} at first, {sum(losses[-10:]) / len(losses[-10:]):.3f} at last" if losses else ""
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if evaluated:
        reached += f"; evaluation {evaluated[-1]:.3f}, at best {min(evaluated):.3f}"
    output = shlex.quote(trainer.args.output_dir)
    if hasattr(trainer.model, "peft_config"):
        follow = f"convllava merge {output} --output {output.rstrip('/')}-merged"
    else:
        follow = f"convllava ask IMAGE QUESTION --model {output}"
    return (
        f"done: {trainer.state.global_step:,} steps; {reached or 'no loss was logged'}.\n"
        f"  model   {trainer.args.output_dir}\n  curves  {trainer.args.output_dir}/training_curves.png\n"
        f"  next    {follow}"
    )


def describe_stop(trainer: Trainer, recipe: str) -> str:
    """How to go on with a run that was stopped."""
    return (
        f"stopped after step {trainer.state.global_step:,} of {trainer.state.max_steps:,}; saved "
        f"{find_last_checkpoint(trainer.args.output_dir)}. Go on by the same command with one flag more: convllava "
        f"train {shlex.quote(recipe)} ... --output_dir {shlex.quote(trainer.args.output_dir)} "
        "--resume_from_checkpoint last"
    )


class StopCallback(TrainerCallback):
    """Ends a run after the step at which it is asked to (Ctrl-C, SIGTERM), with a checkpoint to resume from."""

    def __init__(self):
        self.is_asked = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Takes the first signal as a wish; the second one ends the program as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame) -> None:
            self.is_asked = True
            signal.signal(number, handlers[number])
            logger.warning("stopping after this step, with a checkpoint; once more: at once, without.")

        for number in handlers:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # ranks hear of it at different steps
            asked = torch.tensor(int(self.is_asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.is_asked = bool(asked.item())
        if self.is_asked:
            control.should_save = control.should_training_stop = True
