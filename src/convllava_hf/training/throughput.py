"""How fast a run is: rows, tokens and pixels per second, the share of padding, and the time that it waits for data."""

import time

import torch
from accelerate import Accelerator


class Throughput:
    """Counts what a process trains on between two logs."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.rows = self.tokens = self.places = self.pixels = self.waited = 0

    def count(self, batch: dict) -> None:
        """Counts a batch as the model gets it, before blank images are added."""
        mask, pixels = batch.get("attention_mask"), batch.get("pixel_values")
        if mask is not None:
            self.rows += len(mask)
            self.places += mask.numel()
            self.tokens = self.tokens + mask.sum()  # stays on the device until it is logged
        if pixels is not None:
            self.pixels += len(pixels) * pixels.shape[-1] * pixels.shape[-2]

    def summarise(self, accelerator: Accelerator) -> dict[str, float]:
        """Rates over all processes since the last call, for the log; nothing where nothing was counted."""
        seconds = time.perf_counter() - self.start
        counts = [self.rows, float(self.tokens), self.places, self.pixels, self.waited]
        counts = accelerator.reduce(torch.tensor(counts, device=accelerator.device, dtype=torch.float32))
        rows, tokens, places, pixels, waited = counts.tolist()
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
        return {name: round(value, 4) for name, value in rates.items()}
