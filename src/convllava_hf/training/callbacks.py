"""What happens beside the steps of a run: the bar and the curves."""

from pathlib import Path

from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


CURVES = "training_curves.png"


class LossBarCallback(ProgressCallback):
    """transformers' progress bar with the loss beside it, instead of a dictionary on a line of its own for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
        else:
            super().on_log(args, state, control, logs, **kwargs)


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
    """Writes a picture of the loss and the learning rate over the steps; nothing where no loss was logged."""
    points = [entry for entry in log_history if "loss" in entry]
    if not points:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, rate = figure.subplots(1, 2)
    steps = [entry["step"] for entry in points]
    loss.plot(steps, [entry["loss"] for entry in points], label="training")
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
