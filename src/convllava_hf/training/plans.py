"""Freeze plans: which parameters a training stage changes, and what that costs in memory.

A plan is a list of regular expressions, searched in the names of parameters (`modeling_convllava.set_trainable`); what
none of them matches is frozen.

Source: alibaba/conv-llava, `scripts/*.sh` and `llava/train/train.py`; paper, section 4.1 and table 8. The original's
stage 1 leaves the output layer trainable by accident (`model.requires_grad_(False)` runs on the inner model); not here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig


PROJECTOR = r"multi_modal_projector\."
LANGUAGE_MODEL = r"(language_model|lm_head)\."
STAGES = (1, 2, 3)
VISION_FROM = re.compile(r"stage([1-9])(?:\.(\d+))?")
TIMM_BLOCK = re.compile(r"(?:^|\.)stages\.(\d+)\.blocks\.(\d+)\.")
BUFFER = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")  # stored, and no parameters
# Parts in the order of the computation, by what occurs in the names of their parameters.
PARTS = {"vision tower": r"(^|\.)vision_tower\.", "projector": PROJECTOR, "language model": LANGUAGE_MODEL}


def get_stage_depths(config: PreTrainedConfig) -> list[int]:
    """Number of blocks in each stage of a hierarchical tower.

    Args:
        config: of the whole model.

    Raises:
        ValueError: the tower has no stages whose depths are known (a ViT, or a timm model without parts named
            `stages.N.blocks.M`).
    """
    depths = getattr(config.vision_config, "depths", None)
    if config.vision_config.model_type == "timm_wrapper":  # its configuration says no more than its name
        from transformers import AutoModel

        with torch.device("meta"):
            names = AutoModel.from_config(config.vision_config).state_dict()
        found = {(int(match[1]), int(match[2])) for name in names if (match := TIMM_BLOCK.search(name))}
        depths = [sum(stage == number for stage, _ in found) for number in sorted({stage for stage, _ in found})]
    if not depths:
        raise ValueError(
            f"vision_config.model_type={config.vision_config.model_type!r} does not tell the depths of its stages; "
            "name the parameters to train yourself, for example --trainable multi_modal_projector "
            "'vision_tower.*stages\\.3\\.'"
        )
    return list(depths)


def get_vision_pattern(depths: list[int], first: str) -> str:
    """Pattern of the tower's parameters from a place on, to the end.

    Args:
        depths: blocks per stage.
        first: `"stage3"`: from the third stage on, its downsampling included; `"stage3.9"`: from its block 9 on,
            counted from 0, without its downsampling: with 27 blocks the paper's last 18.

    Raises:
        ValueError: no such stage or block.
    """
    match = VISION_FROM.fullmatch(first)
    stage = int(match[1]) if match else 0
    block = int(match[2]) if match and match[2] else None
    if not 1 <= stage <= len(depths) or (block or 0) >= depths[stage - 1]:
        raise ValueError(
            f"vision_from={first!r}; expected 'stageN' or 'stageN.B', N from 1 to {len(depths)} and blocks B counted "
            f"from 0, of which the stages have {', '.join(map(str, depths))}."
        )
    later = "".join(str(index) for index in range(stage - (block is None), len(depths)))
    whole = rf"stages\.[{later}]\." if later else None
    if block is None:
        return rf"vision_tower\..*{whole}"
    blocks = "|".join(str(index) for index in range(block, depths[stage - 1]))
    part = rf"stages\.{stage - 1}\.(layers|blocks)\.({blocks})\."
    return rf"vision_tower\..*({part}|{whole})" if whole else rf"vision_tower\..*{part}"


def get_trainable(config: PreTrainedConfig, stage: int, vision_from: str = "stage3") -> list[str]:
    """The plan of one of the three stages.

    Args:
        config: of the model.
        stage: 1: projector and, in towers of five stages, the fifth one; 2: projector, language model and the tower
            from `vision_from` on, which a ViT lacks; 3: projector and language model.
        vision_from: see [`get_vision_pattern`]; stage 2 only.

    Returns:
        Regular expressions for `from_pretrained(..., trainable=...)`.

    Raises:
        ValueError: an unknown stage, or a tower without the stages that the plan names.
    """
    if stage not in STAGES:
        raise ValueError(
            f"stage={stage!r}; expected 1 (projector initialisation), 2 (pretraining) or 3 (instructions)."
        )
    if stage == 3:
        return [PROJECTOR, LANGUAGE_MODEL]
    if stage == 1 and config.model_type != "convllava":
        return [PROJECTOR]
    depths = get_stage_depths(config)
    if stage == 2:
        return [PROJECTOR, LANGUAGE_MODEL, get_vision_pattern(depths, vision_from)]
    return [PROJECTOR, get_vision_pattern(depths, "stage5")] if len(depths) == 5 else [PROJECTOR]


@dataclass(frozen=True)
class PartPlan:
    """What a plan does to one part of a model; numbers of parameters."""

    part: str
    trainable: int
    frozen: int

    def estimate_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of weights, and of gradients and both moments of AdamW where trainable, all in `dtype`."""
        return dtype.itemsize * (self.frozen + 4 * self.trainable)


def describe_plan(model: nn.Module) -> list[PartPlan]:
    """Counts trainable and frozen parameters per part; the tower's stages are parts of their own.

    Args:
        model: with `requires_grad` as it will be trained; the meta device will do.

    Returns:
        One entry per part that has parameters, in the order of the computation.
    """
    return _count_parts((name, value.numel(), value.requires_grad) for name, value in model.named_parameters())


def plan_stored(counts: dict[str, int], patterns: list[str]) -> list[PartPlan]:
    """What a plan does to a checkpoint: as [`describe_plan`], from the names of its tensors and their numbers.

    Raises:
        ValueError: a pattern that matches no name.
    """
    names = [name for name in counts if not BUFFER.search(name)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"the stage trains {pattern!r}, which occurs in no name of the {len(names)} tensors.")
    return _count_parts((name, counts[name], any(re.search(p, name) for p in patterns)) for name in names)


def _count_parts(parameters: Iterable[tuple[str, int, bool]]) -> list[PartPlan]:
    counts: dict[str, list[int]] = {}
    for name, count, is_trained in parameters:
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")
        if part == "vision tower":
            stage = re.search(r"\.stages\.(\d+)\.", name)
            part = f"vision tower, stage {int(stage[1]) + 1}" if stage else f"{part}, stem"
        counts.setdefault(part, [0, 0])[not is_trained] += count
    order = sorted(counts, key=lambda part: ([*PARTS, "other"].index(part.split(",")[0]), "stem" not in part, part))
    return [PartPlan(part, *counts[part]) for part in order]


def estimate_states(model: nn.Module, shards: int = 1) -> int:
    """Bytes of a model's weights, of the gradients of what is trained, and of both moments of AdamW, per process.

    Args:
        model: with `requires_grad` and dtypes as it will be trained; the meta device will do.
        shards: processes that share all of it (FSDP2, ZeRO-3).
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return (weights + 3 * trained) // shards


def keep_trained_precise(model: torch.nn.Module) -> None:
    """Keeps what is trained beside frozen weights in float32: bfloat16 has no updates under 0.4% of a weight.

    Source: DeepSpeed's master weights, with which the originals train.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
