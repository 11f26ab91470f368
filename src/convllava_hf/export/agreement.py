"""Compares an export with its checkpoint: greedy tokens, scores, speed.

Notation: `T` new tokens, `V` vocabulary.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin


NEW_TOKENS = 16
QUESTION = "What is in the image?"


@dataclass
class Agreement:
    """How close an export is to its checkpoint, over the probes.

    Attributes:
        tokens: compared, of each.
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


def make_probes(model: PreTrainedModel, processor: ProcessorMixin) -> list[dict]:
    """Inputs of `generate`: a picture, a picture of another shape, words alone.

    Args:
        model: the checkpoint.
        processor: the checkpoint's. One without a chat template gets a bare prompt.

    Returns:
        One dictionary of tensors per probe.
    """
    generator, probes = np.random.default_rng(0), []
    for height, width in ((96, 96), (60, 100), (0, 0)):
        # Smooth colours: noise is nothing that a tower was trained on.
        corners = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        images = [corners.resize((width, height), Image.Resampling.BICUBIC)] if height else []
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": QUESTION}]
        if processor.chat_template:
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            text = f"{processor.image_token}\n{QUESTION}" if images else QUESTION
            inputs = processor(text=text, images=images or None, return_tensors="pt")
        probes.append(dict(inputs))
    return probes


def generate_greedily(model: PreTrainedModel, probe: dict) -> tuple[list[int], torch.Tensor, float]:
    """The most likely tokens, past any end of a turn.

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
    equal, difference, seconds = 0, 0.0, ([], [])
    for probe in probes:
        for model in (before, after):
            generate_greedily(model, probe)  # the first call of a shape also prepares it
        (tokens, logits, took), (others, scores, other_took) = (
            generate_greedily(model, probe) for model in (before, after)
        )
        same = next((i for i, pair in enumerate(zip(tokens, others, strict=True)) if pair[0] != pair[1]), NEW_TOKENS)
        equal += same
        # Scores after a different token belong to another text.
        kept = slice(0, min(same + 1, NEW_TOKENS))
        scale = logits[kept].abs().max().item()
        difference = max(difference, (logits[kept] - scores[kept]).abs().max().item() / scale)
        seconds[0].append(took)
        seconds[1].append(other_took)
    return Agreement(NEW_TOKENS * len(probes), equal, difference, *(sum(part) for part in seconds))


def measure_median(call, repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
