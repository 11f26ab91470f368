"""The arithmetic of a training step, from which follows the share of a device's peak that a run reaches (MFU).

Recomputed activations do not count, nor do the projector and adapters, which are small beside the rest.
"""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from trl.trainer.utils import compute_flops_per_token


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations, forward and backward, of what a step holds.

    Args:
        per_token: in the linear layers of the language model.
        per_pair: in its attention, for two tokens of one row; all pairs count, as in other reports of MFU.
        per_pixel: in the vision tower.
    """

    per_token: float
    per_pair: float
    per_pixel: float

    def count(self, tokens: float, pairs: float, pixels: float) -> float:
        return self.per_token * tokens + self.per_pair * pairs + self.per_pixel * pixels


def measure_flops(model: PreTrainedModel, side: int) -> StepFlops:
    """Counts for the parts of a model that are trained as they are marked now.

    Args:
        model: of images and text, without PEFT around it and not sharded.
        side: of its square images, in pixels.

    Source of the language model's: TRL, `compute_flops_per_token`, which takes all weights for trained.
    """
    text = model.config.get_text_config()
    forward = compute_flops_per_token(text, 0) / 3
    attention = (compute_flops_per_token(text, 1) - compute_flops_per_token(text, 0)) / 3
    layers = model.model.language_model.parameters()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in layers if parameter.ndim > 1]
    trained = sum(size for size, is_trained in sizes if is_trained) / sum(size for size, _ in sizes)
    # Gradients go through the language model to the projector, whether its own weights are trained or not.
    per_token, per_pair = forward * (2 + trained), attention * 3
    return StepFlops(per_token, per_pair, count_tower(model.model.vision_tower, side) / side**2)


def count_tower(tower: torch.nn.Module, side: int) -> int:
    """Floating-point operations of a tower on one image, with the backward pass that its trained parameters need."""
    was_training = tower.training
    tower.eval()  # recomputes nothing
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        parameters = {
            name: torch.empty(parameter.shape, requires_grad=parameter.requires_grad)
            for name, parameter in tower.named_parameters()
        }
        output = torch.func.functional_call(tower, parameters, (torch.empty(1, 3, side, side),))
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.sum().backward()
    tower.train(was_training)
    return counter.get_total_flops()
