"""Images per second of the input pipeline of training: from image files in a dataset to batches, over workers.

    python benchmarks/input.py                                  # 1536 pixels, 1 and 2 workers; minutes
    python benchmarks/input.py --images 8 --side 256 --workers 1

Photos of two sizes are written as JPEG files; each way reads all of them through torch's `DataLoader` in batches, as
the trainer does, and is timed from the first batch to the last (starting workers and importing is not input).

- ours: `decode_image` and our image processor, pixels handed over as bytes, as `normalize_on_device` does.
- ours, draft: the same with `draft_photos`, the JPEG decoder's own shrinking.
- original: open, convert to RGB, pad to a square, CLIP's image processor on Pillow; floats. Source: alibaba/conv-llava,
  `llava/train/train.py` (`LazySupervisedDataset`).

`of a step` is the share of a GPU's training step in which so many workers would have its images ready: 100% and more
is hidden behind it. The step is computed, not measured: `--image-tflop` of work per image at `--device-tflops`. The
defaults are stage 3 of a 7B on an H100: the tower forward (3.8), 1,024 tokens forward, recomputed and backward (4 x
13.6), at 40% of 989 TFLOP/s.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine, print_machine, print_table, write_json


SIZES = ((4000, 3000), (640, 480))  # width and height, in turn


def write_photos(folder: Path, count: int) -> list[Path]:
    import numpy as np
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        paths.append(folder / f"{number:04}.jpg")
        Image.fromarray(pixels).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


class Ours:
    """Prepares the photos of a batch as our collator does."""

    def __init__(self, side: int, draft: bool = False):
        from convllava_hf import ConvLlavaImageProcessor

        self.processor = ConvLlavaImageProcessor(
            size={"height": side, "width": side}, do_rescale=False, do_normalize=False
        )
        self.draft = self.processor.get_processed_size if draft else None

    def __call__(self, paths: list[Path]):
        from convllava_hf.images import decode_image

        files = [{"bytes": path.read_bytes(), "path": None} for path in paths]
        images = [decode_image(file, draft=self.draft) for file in files]
        return self.processor(images, return_tensors="pt")["pixel_values"]


class Original:
    def __init__(self, side: int):
        from transformers import CLIPImageProcessorPil

        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.colour = tuple(int(mean * 255) for mean in self.processor.image_mean)

    def __call__(self, paths: list[Path]):
        import torch
        from PIL import Image

        prepared = []
        for path in paths:
            image = Image.open(path).convert("RGB")
            square = Image.new("RGB", (max(image.size), max(image.size)), self.colour)
            square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
            prepared.append(self.processor(square, return_tensors="pt")["pixel_values"][0])
        return torch.stack(prepared)


WAYS = {"ours": Ours, "ours, draft": lambda side: Ours(side, draft=True), "original": Original}


def limit_threads(worker: int) -> None:
    import torch

    torch.set_num_threads(1)


def measure(collate, paths: list[Path], batch: int, workers: int) -> float:
    """Images per second, without the first batch of every worker."""
    from torch.utils.data import DataLoader

    loader = DataLoader(paths, batch, collate_fn=collate, num_workers=workers, worker_init_fn=limit_threads)
    iterator = iter(loader)
    for _ in range(workers):
        next(iterator)
    started, images = time.monotonic(), 0
    for pixels in iterator:
        images += len(pixels)
    return images / (time.monotonic() - started)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--side", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--image-tflop", type=float, default=58.2, help="work of a training step per image")
    parser.add_argument("--device-tflops", type=float, default=400.0, help="rate at which a GPU does it, TFLOP/s")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args(arguments)
    if options.images <= 2 * options.batch * max(options.workers):
        sys.exit(f"--images {options.images}: too few for {max(options.workers)} workers; expected a few batches each.")
    machine, table, results = describe_machine(1), [], []
    needed = options.device_tflops / options.image_tflop  # images per second and GPU
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), options.images)
        for workers in options.workers:
            for way, make in WAYS.items():
                rate = measure(make(options.side), paths, options.batch, workers)
                results.append({"way": way, "workers": workers, "images_per_second": rate})
                row = {"way": way, "workers": workers, "images/s": f"{rate:.1f}", "of a step": f"{rate / needed:.0%}"}
                table.append({**row, "workers to keep up": math.ceil(needed / rate * workers)})
    print_table(f"Input at {options.side} pixels, {needed:.1f} images/s wanted", table)
    print_machine(machine)
    write_json(options.json, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
