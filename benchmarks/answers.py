"""From an image file to the first token, and on: ConvLLaVA beside transformers' LLaVA and FastVLM.

    python benchmarks/answers.py                              # a CPU: 512 to 1024 pixels, 0.1B, a few minutes
    python benchmarks/answers.py --sides 768 1024 1536 --size 1B --device cuda --dtype bfloat16

All have the released towers' shapes and one shape of language model, with random weights: LLaVA-1.5 sees 336 pixels
(576 tokens), FastVLM 1024 (256 tokens). Photos are JPEG files of three aspect ratios. ConvLLaVA pads them to a square,
or keeps their shape (`native`) in the detail of the square.

- first token: from the file: decoding, preparing, the tower, the prompt. Of it the tower with its projector, and the
  language model on the prompt, are timed alone as well.
- memory: the most above what the weights take, from the file to the last token.
- exponents: how a time grows with what it is for, a straight line through the logarithms. 1 is linear.
"""

import argparse
import math
import statistics
import tempfile
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
    time_calls,
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


def measure(model, processor, path: Path, options) -> dict:
    """Times and memory of one model on one file."""

    def prepare():
        inputs = processor(images=[Image.open(path)], text=[f"<image>\n{QUESTION}"], return_tensors="pt")
        return inputs.to(options.device, model.dtype)

    def answer(tokens: int):
        return model.generate(**prepare(), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    clock = partial(time_calls, device=options.device, repeats=options.repeats)
    with torch.inference_mode():
        inputs = prepare()
        images = {key: value for key, value in inputs.items() if key in ("pixel_values", "image_sizes")}
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        language_model = model.get_decoder()
        preparing, tower = clock(prepare), clock(lambda: model.get_image_features(**images))
        prompt, first = clock(lambda: language_model(inputs_embeds=embeds)), clock(lambda: answer(1))
        with PeakMemory(torch.device(options.device)) as memory:
            whole = clock(lambda: answer(options.tokens + 1))
    return {
        "image_tokens": int((inputs["input_ids"] == 4).sum()),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "pixels": inputs["pixel_values"].shape[-2] * inputs["pixel_values"].shape[-1],
        "prepare": preparing,
        "tower": tower,
        "prompt": prompt,
        "first": first,
        "tokens_per_second": options.tokens / max(whole - first, 1e-9),
        "peak_bytes": memory.peak,
    }


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
    parser.add_argument("--repeats", type=int, default=1, help="timed calls, after one that is not")
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
            "tokens/s": f"{found['tokens_per_second']:.1f}",
            "memory, MiB": "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / MEBIBYTE:.0f}",
        }
        for found in results
    ]
    print_table(f"From a file to the first token, {options.size}, {options.dtype}", table)
    ours = [found for found in results if found["model"].startswith("ConvLLaVA")]
    for found in results:
        found["token"] = 1 / found["tokens_per_second"]
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
