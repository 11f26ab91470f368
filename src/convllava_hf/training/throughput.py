"""How fast a run is: rows, tokens and pixels per second, padding, the time that it waits for data, and MFU."""

import time

import torch
from accelerate import Accelerator

from .flops import StepFlops


class Throughput:
    """Counts what a process trains on between two logs.

    Args:
        flops: of a step, for the MFU.
        peak: operations per second that each device is capable of; `None` where nobody knows, and MFU is left out.
    """

    def __init__(self, flops: StepFlops | None = None, peak: float | None = None):
        self.flops, self.peak = flops, peak
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.rows = self.tokens = self.pairs = self.places = self.pixels = self.waited = 0

    def count(self, batch: dict) -> None:
        """Counts a batch as the model gets it, before blank images are added."""
        mask, bounds, pixels = (batch.get(key) for key in ("attention_mask", "cu_seq_lens_q", "pixel_values"))
        if mask is not None:
            self.rows += len(mask)
            self.places += mask.numel()
            lengths = mask.sum(1)
        elif bounds is not None:  # rows without padding
            self.rows += len(bounds) - 1
            self.places += batch["input_ids"].numel()
            lengths = bounds.diff()
        if mask is not None or bounds is not None:
            self.tokens = self.tokens + lengths.sum()  # stay on the device until they are logged
            self.pairs = self.pairs + lengths.float().square().sum()
        if pixels is not None:
            self.pixels += len(pixels) * pixels.shape[-1] * pixels.shape[-2]

    def summarise(self, accelerator: Accelerator) -> dict[str, float]:
        """Rates over all processes since the last call, for the log; nothing where nothing was counted."""
        seconds = time.perf_counter() - self.start
        counts = [self.rows, float(self.tokens), float(self.pairs), self.places, self.pixels, self.waited]
        counts = accelerator.reduce(torch.tensor(counts, device=accelerator.device, dtype=torch.float32))
        rows, tokens, pairs, places, pixels, waited = counts.tolist()
        self.reset()
        if not rows:
            return {}
        rates = {
            "rows_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "megapixels_per_second": pixels / seconds / 1e6,
            "padding": 1 - tokens / places,
            "data_wait": waited / seconds / accelerator.num_processes,
        }
        if self.flops is not None and self.peak is not None:
            rates["mfu"] = self.flops.count(tokens, pairs, pixels) / seconds / self.peak / accelerator.num_processes
        return {name: round(value, 4) for name, value in rates.items()}
