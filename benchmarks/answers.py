"""From an image file to the first token, and on: ConvLLaVA beside transformers' LLaVA and FastVLM.

    python benchmarks/answers.py                              # a CPU: 512 to 1024 pixels, 0.1B, a few minutes
    python benchmarks/answers.py --sides 768 1024 1536 --size 1B --device cuda --dtype bfloat16

All have the released towers' shapes and one shape of language model, with random weights: LLaVA-1.5 sees 336 pixels
(576 tokens), FastVLM 1024 (256 tokens). Photos are JPEG files of three aspect ratios. ConvLLaVA pads them to a square,
or keeps their shape (`native`) in the detail of the square.

- first token: from the file: decoding, preparing, the tower, the prompt. The tower, and the language model on the
  prompt, are parts of it.
- memory: the most above what the weights take, from the file to the last token.
- exponents: how a time grows with what it is for, a straight line through the logarithms. 1 is linear.
"""

import argparse
import math
import statistics
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from gpu import (
    CLIP,
    QUESTION,
    SIZES,
    TOY_CLIP,
    build_convllava_processor,
    build_llava_processor,
    build_model,
    make_convllava,
    make_fast_vlm,
    make_llava,
    make_picture,
    synchronize,
)
from machine import describe_machine, print_machine, print_table, show_progress, write_json
from PIL import Image
from vision import MEBIBYTE, PICTURES, PeakMemory


SHRINK = 2  # of `PICTURES`: photos of about 3 megapixels


def list_cases(options) -> list[tuple]:
    """`(name, picture, what makes the model, the processor)`; cases of one model follow each other."""
    clip_side, fast_side = (TOY_CLIP if options.toy else CLIP)["image_size"], 128 if options.toy else 1024
    first, *others = PICTURES
    ours = partial(make_convllava, options.size, options)
    cases = [(f"ConvLLaVA {side} pad", first, ours, build_convllava_processor(side)) for side in options.sides]
    for picture in PICTURES:
        height, width = PICTURES[picture]
        side = options.sides[-1]
        cells = [max(1, round(edge * side / max(height, width) / 64)) for edge in (height, width)]
        native = build_convllava_processor(side, native=True)
        native.image_processor.max_image_tokens = cells[0] * cells[1]
        cases.append((f"ConvLLaVA {side} native", picture, ours, native))
    name, _, _, padded = cases[len(options.sides) - 1]
    cases += [(name, picture, ours, padded) for picture in others]
    for name, make, processor in (
        ("LLaVA-1.5", make_llava, build_llava_processor("llava", clip_side)),
        ("FastVLM", make_fast_vlm, build_llava_processor("fast_vlm", fast_side)),
    ):
        cases.append((name, first, partial(make, options.size, options), processor))
    return cases


class Clock:
    """When the parts of a model begin and end, while it answers."""

    def __init__(self, model, options):
        self.read = time.process_time if options.cpu_seconds else time.perf_counter
        self.device, self.moments = options.device, {}
        parts = {"tower": model.model.vision_tower, "language model": model.model.language_model}
        self.hooks = [
            hook
            for name, module in parts.items()
            for hook in (
                module.register_forward_pre_hook(lambda *_, name=name: self.note(f"{name} begins")),
                module.register_forward_hook(lambda *_, name=name: self.note(f"{name} ends")),
            )
        ]

    def note(self, name: str) -> None:
        synchronize(self.device)
        self.moments.setdefault(name, []).append(self.read())

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def answer(model, processor, path: Path, options) -> dict:
    """Times of one answer, from the file on, in seconds."""
    clock = Clock(model, options)
    with torch.inference_mode():
        clock.note("start")
        inputs = processor(images=[Image.open(path)], text=[f"<image>\n{QUESTION}"], return_tensors="pt")
        inputs = inputs.to(options.device, model.dtype)
        clock.note("prepared")
        tokens = options.tokens + 1
        model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        clock.note("end")
    clock.close()
    moments = clock.moments
    second = moments["language model begins"][1]  # by then the first token is chosen
    return {
        "image_tokens": int((inputs["input_ids"] == 4).sum()),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "pixels": inputs["pixel_values"].shape[-2] * inputs["pixel_values"].shape[-1],
        "prepare": moments["prepared"][0] - moments["start"][0],
        "tower": moments["tower ends"][0] - moments["tower begins"][0],
        "prompt": moments["language model ends"][0] - moments["language model begins"][0],
        "first": second - moments["start"][0],
        "token": (moments["end"][0] - second) / options.tokens,
    }


def measure(model, processor, path: Path, options) -> dict:
    """The median of several answers, and the memory of the last."""
    runs = []
    for _ in range(options.repeats):
        with PeakMemory(torch.device(options.device)) as memory:
            runs.append(answer(model, processor, path, options))
    return {**{key: statistics.median(run[key] for run in runs) for key in runs[0]}, "peak_bytes": memory.peak}


def fit_exponent(results: list[dict], size: str, cost: str) -> float | None:
    """How a cost grows with a size: the slope of a straight line through the logarithms; `None` for one size."""
    points = [(math.log(found[size]), math.log(found[cost])) for found in results if found[cost]]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 768, 1024], help="of ConvLLaVA's squares, pixels")
    parser.add_argument("--size", choices=SIZES, default="0.1B", help="of the language model")
    parser.add_argument("--tokens", type=int, default=16, help="generated after the first")
    parser.add_argument("--repeats", type=int, default=1, help="answers that are timed")
    parser.add_argument("--cpu-seconds", action="store_true", help="of the processor: for machines that are busy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--toy", action="store_true", help="tiny models")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args(arguments, Namespace())
    machine, results, loaded, made = describe_machine(torch.get_num_threads()), [], None, None
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for picture, (height, width) in PICTURES.items():
            paths[picture] = Path(folder) / f"{len(paths)}.jpg"
            make_picture((width // SHRINK, height // SHRINK)).save(paths[picture], quality=90)
        for name, picture, make, processor in list_cases(options):
            show_progress(f"{name}, {picture}")
            if make is not made:
                loaded, made = None, make
                loaded = build_model(make, options)
                answer(loaded, processor, paths[picture], options)  # warms up
            results.append({"model": name, "picture": picture, **measure(loaded, processor, paths[picture], options)})
    table = [
        {
            "model": found["model"],
            "picture": found["picture"],
            "image tokens": found["image_tokens"],
            "prepare, s": f"{found['prepare']:.3f}",
            "tower, s": f"{found['tower']:.3f}",
            "prompt, s": f"{found['prompt']:.3f}",
            "first token, s": f"{found['first']:.3f}",
            "tokens/s": f"{1 / found['token']:.1f}",
            "memory, MiB": "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / MEBIBYTE:.0f}",
        }
        for found in results
    ]
    print_table(f"From a file to the first token, {options.size}, {options.dtype}", table)
    ours = [found for found in results if found["model"].startswith("ConvLLaVA")]
    exponents = {
        "tower, in pixels (ConvLLaVA)": fit_exponent(ours, "pixels", "tower"),
        "memory, in pixels (ConvLLaVA)": fit_exponent(ours, "pixels", "peak_bytes"),
        "prompt, in tokens (all)": fit_exponent(results, "prompt_tokens", "prompt"),
        "a token, in tokens before it (all)": fit_exponent(results, "prompt_tokens", "token"),
    }
    rows = [{"grows": name, "exponent": "" if value is None else f"{value:.2f}"} for name, value in exponents.items()]
    print_table("Exponents of growth", rows)
    print_machine(machine)
    write_json(options.json, {"machine": machine, "results": results, "exponents": exponents})


if __name__ == "__main__":
    main()
