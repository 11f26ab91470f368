"""What happens beside the steps of a run: the bar and the curves."""

import math
import statistics
import sys
import time
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)
CURVES = "training_curves.png"
SECONDS_PER_LINE = 10


SHOWN = ("loss", "eval_loss", "eval_exact_match", "learning_rate", "grad_norm")


class LossBarCallback(ProgressCallback):
    """transformers' progress bar with the loss beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
        else:
            super().on_log(args, state, control, logs, **kwargs)


class LossLinesCallback(TrainerCallback):
    """A line per log in the place of a bar, for files: at most one in `SECONDS_PER_LINE`.

    The first, the last and those of evaluations are always written.
    """

    def __init__(self):
        self.last_line = -math.inf

    def on_log(self, args, state, control, logs=None, **kwargs):
        text = "  ".join(f"{key} {float(logs[key]):.4g}" for key in SHOWN if key in logs)
        is_due = time.monotonic() - self.last_line >= SECONDS_PER_LINE or state.global_step >= state.max_steps
        if state.is_world_process_zero and text and (is_due or "eval_loss" in logs):
            self.last_line = time.monotonic()
            sys.stderr.write(f"step {state.global_step}/{state.max_steps}  {text}\n")


class CurvesCallback(TrainerCallback):
    """Draws loss and learning rate beside the checkpoints, at each save and at the end."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            try:
                draw_curves(state.log_history, Path(args.output_dir) / CURVES)
            except OSError as error:  # a full disk, which is no reason to stop
                logger.warning(f"cannot draw {CURVES}: {error}")

    on_train_end = on_save


def draw_curves(log_history: list[dict], file: Path) -> None:
    """Writes a picture of the loss, the learning rate and, where there are any, exact answers over the steps.

    Writes nothing where no loss was logged.
    """
    points = [entry for entry in log_history if "loss" in entry]
    if not points:
        return
    from matplotlib.figure import Figure

    matches = [entry for entry in log_history if "eval_exact_match" in entry]
    plots = 3 if matches else 2
    figure = Figure(figsize=(4.5 * plots, 3.2), layout="constrained")
    loss, rate, *exact = figure.subplots(1, plots)
    for plot in exact:
        plot.plot([entry["step"] for entry in matches], [entry["eval_exact_match"] for entry in matches], "o-")
        plot.set(xlabel="step", ylabel="share of exact answers", ylim=(0, 1))
    steps = [entry["step"] for entry in points]
    losses = [entry["loss"] for entry in points]
    # Steps hold rows of one kind and of similar length, the longest first: their losses differ for that reason alone.
    window = max(1, len(losses) // 20)
    means = [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]
    loss.plot(steps, losses, color="C0", alpha=0.25, linewidth=1)
    loss.plot(steps, means, color="C0", label=f"training, mean of {window} steps")
    loss.set_title("steps hold rows of similar length, the longest first", fontsize=8, color="gray")
    evaluated = [entry for entry in log_history if "eval_loss" in entry]
    if evaluated:
        loss.plot([e["step"] for e in evaluated], [e["eval_loss"] for e in evaluated], "o-", label="evaluation")
    loss.legend()
    loss.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    for name in sorted({key for entry in points for key in entry if key.startswith("learning_rate")}):
        rate.plot(steps, [entry.get(name) for entry in points], label=name.removeprefix("learning_rate_"))
    rate.set(xlabel="step", ylabel="learning rate")
    if len(rate.lines) > 1:
        rate.legend()
    figure.savefig(file, dpi=110)
