"""Compares an export with its checkpoint: greedy tokens, scores, speed.

Notation: `T` new tokens, `V` vocabulary.
"""

import time
from dataclasses import astuple, dataclass

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from ..inference.answer import make_message, prepare_inputs


NEW_TOKENS = 16
QUESTION = "What is in the image?"


@dataclass
class Agreement:
    """How close an export is to its checkpoint, over the probes.

    Attributes:
        tokens: compared.
        equal_tokens: of the export, up to each probe's first difference.
        logit_difference: largest, while the tokens before are equal, over the largest score.
        seconds_before, seconds_after: of the checkpoint and of the export for all probes, after one to warm up.
    """

    tokens: int
    equal_tokens: int
    logit_difference: float
    seconds_before: float
    seconds_after: float

    @property
    def speedup(self) -> float:
        return self.seconds_before / self.seconds_after

    @classmethod
    def over(cls, probes: "list[Agreement]") -> "Agreement":
        """The agreement over all probes, from that of each."""
        tokens, equal, differences, before, after = zip(*map(astuple, probes), strict=True)
        return cls(sum(tokens), sum(equal), max(differences), sum(before), sum(after))


def make_picture(height: int, width: int) -> Image.Image:
    """Smooth colours: noise is nothing that a tower was trained on."""
    corners = np.random.default_rng(height).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def make_probes(model: PreTrainedModel, processor: ProcessorMixin) -> list[dict]:
    """Inputs of `generate`: a picture, a picture of another shape, words alone.

    Args:
        model: the checkpoint.
        processor: the checkpoint's. One without a chat template gets a bare prompt.

    Returns:
        One dictionary of tensors per probe.
    """
    probes = []
    for images in ([make_picture(96, 96)], [make_picture(60, 100)], []):
        if processor.chat_template:
            inputs = prepare_inputs(processor, [make_message("user", QUESTION, images)])
        else:
            text = f"{processor.image_token}\n{QUESTION}" if images else QUESTION
            inputs = processor(text=text, images=images or None, return_tensors="pt")
        probes.append(dict(inputs))
    return probes


def generate_greedily(model: PreTrainedModel, probe: dict) -> tuple[list[int], torch.Tensor, float]:
    """The most likely tokens but for those that end a turn.

    Returns:
        The new tokens, their scores `(T, V)` and the seconds they took.
    """
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    started = time.perf_counter()
    with torch.no_grad():
        output = model.generate(**probe, generation_config=config)
    seconds = time.perf_counter() - started
    return output.sequences[0, -NEW_TOKENS:].tolist(), torch.cat(output.logits), seconds


def compare(before: PreTrainedModel, after: PreTrainedModel, probes: list[dict]) -> Agreement:
    """Runs both models on the same probes.

    Args:
        before, after: the checkpoint and its export.
        probes: from `make_probes`.
    """
    found = []
    for probe in probes:
        for model in (before, after):
            generate_greedily(model, probe)  # the first call of a shape also prepares it
        (tokens, scores, took), (others, other_scores, other_took) = (
            generate_greedily(model, probe) for model in (before, after)
        )
        equal = count_equal(tokens, others)
        kept = slice(equal + 1)  # scores after a different token belong to another text
        difference = ((scores[kept] - other_scores[kept]).abs().max() / scores[kept].abs().max()).item()
        found.append(Agreement(len(tokens), equal, difference, took, other_took))
    return Agreement.over(found)


def count_equal(tokens: list[int], others: list[int]) -> int:
    """How many tokens are equal up to the first that differs."""
    pairs = zip(tokens, others, strict=True)
    return next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), len(tokens))
