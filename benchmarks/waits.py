"""Where training and answering would make a GPU wait, and what they launch and copy: counted without one.

    python benchmarks/waits.py

- waits: reads of a tensor that would be on the device (`item`, `tolist`, `bool` and the like, `nonzero`, `unique`).
  Each holds Python until the device has done all that it was asked for. They are ours where the innermost line that
  belongs to a package, torch aside, is this package's.
- bytes: of the tensors that go to the device with a batch, or a prompt.
- operations: calls of torch's operators, each at least one launch. What grows with the images of a batch is a loop.
- Python: the share of the time that is not spent inside operators, at a size where they do next to nothing. It is small
  models and busy processes that this slows down.

A step is the difference between a run of a few steps and a run of one, so what happens once does not count. The models
are tiny, since none of the counts depends on the width.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine, print_machine, print_table, show_progress, write_json
from PIL import Image as PILImage
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile


READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "unique"}
READS |= {"equal", "masked_select", "unique_consecutive", "bincount"}
# On the CPU, before anything is on the device.
PREPARATION = ("torch_call", "apply_chat_template", "_fetch_batch", "_move_inputs")
COUNTING = "int in answer.answer"  # of placeholders, there as well
STEPS, TOKENS = 5, 9


class Waits(TorchFunctionMode):
    """Counts reads by the innermost line of a package, without those of preparing a batch."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS:
            self._count(function.__name__.strip("_"))
        return function(*args, **(kwargs or {}))

    def _count(self, name: str) -> None:
        frame, line = sys._getframe(2), None
        while frame is not None:
            if frame.f_code.co_name in PREPARATION:
                return
            package = Path(frame.f_code.co_filename)
            if line is None and "torch" not in package.parts and package != Path(__file__):
                line = (package, frame.f_code.co_name)
            frame = frame.f_back
        if line is not None and COUNTING != f"{name} in {line[0].stem}.{line[1]}":
            self.lines[f"{name} in {line[0].stem}.{line[1]}", "convllava_hf" in line[0].parts] += 1


def count_bytes(values) -> int:
    """Bytes of the tensors among the values of a dictionary."""
    return sum(value.nbytes for value in values.values() if isinstance(value, torch.Tensor))


def measure(run, count: int) -> dict:
    """What one more unit of work costs.

    Args:
        run: does so many units of work and returns the bytes that go to the device for one.
        count: of units, at least two.

    Returns:
        `waits` by line and whether it is ours, `operations`, `bytes`, `python` as a share of the time.
    """
    lines, operations = [], []
    for units in (1, count):
        with Waits() as waits:
            moved = run(units)
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run(units)
        seconds = time.perf_counter() - started
        events = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
        lines.append(waits.lines)
        operations.append(sum(event.count for event in events))
    inside = sum(event.self_cpu_time_total for event in events) / 1e6
    steps = count - 1
    return {
        "waits": {key: (lines[1][key] - lines[0][key]) / steps for key in lines[1] if lines[1][key] > lines[0][key]},
        "operations": (operations[1] - operations[0]) / steps,
        "bytes": moved,
        "python": 1 - inside / seconds,
    }


def build_step(options, aspect: str, images: int, folder: str):
    """A run of training steps on rows of one image each."""
    from training import build_trainer, make_rows

    rows = make_rows(200, options.side)
    rows = rows.filter(lambda row: len(row["images"]) == 1, keep_in_memory=True).select(range(images * STEPS))

    def run(steps: int) -> int:
        settings = copy.copy(options)
        settings.batch, settings.steps = images, steps
        trainer = build_trainer(settings, "ours", rows, folder, stage=3, aspect=aspect, dataloader_drop_last=True)
        found = []
        prepare = trainer._prepare_inputs
        trainer._prepare_inputs = lambda inputs: found.append(count_bytes(inputs)) or prepare(inputs)
        trainer.train()
        return found[-1]

    return run


def build_answer(options, aspect: str):
    """A run of one answer about a photo; units are tokens."""
    from training import build_parts

    from convllava_hf.inference.answer import answer

    model, processor = build_parts(options, aspect)
    model.eval().generation_config.eos_token_id = None
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture, found = PILImage.fromarray(pixels).resize((640, 480)), []
    prepare = processor.apply_chat_template

    def record(*arguments, **settings):
        inputs = prepare(*arguments, **settings)
        found.append(count_bytes(inputs))
        return inputs

    def run(tokens: int) -> int:
        processor.apply_chat_template = record
        answer(model, processor, "What is it?", picture, max_new_tokens=tokens)
        return found[-1]

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="side of the processed square in pixels (256)")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4], help="rows of a training step (2 4)")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args(arguments)
    options.device, options.text = "cpu", "tiny"
    machine, results = describe_machine(torch.get_num_threads()), {}
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            f"training step, {aspect}, {images} images": (build_step(options, aspect, images, folder), STEPS)
            for aspect in ("pad", "native")
            for images in options.images
        }
        cases["answer, another token"] = (build_answer(options, "pad"), TOKENS)
        for aspect in ("pad", "native"):
            run = build_answer(options, aspect)
            # An answer of one token, beside none: what comes before the second token happens once.
            cases[f"answer, first token, {aspect}"] = (partial(lambda run, units: run(1) if units > 1 else 0, run), 2)
        for name, (run, count) in cases.items():
            show_progress(name)
            run(count)  # warms up
            results[name] = measure(run, count)
    table, lines = [], []
    for name, found in results.items():
        ours = sum(times for (_, is_ours), times in found["waits"].items() if is_ours)
        table.append(
            {
                "work": name,
                "waits, ours": f"{ours:.1f}",
                "waits, libraries": f"{sum(found['waits'].values()) - ours:.1f}",
                "KiB to the device": f"{found['bytes'] / 1024:.1f}",
                "operations": f"{found['operations']:.0f}",
                "Python": f"{found['python']:.0%}",
            }
        )
        lines += [
            {"work": name, "wait": line, "times": f"{times:.1f}", "whose": "ours" if is_ours else "a library's"}
            for (line, is_ours), times in sorted(found["waits"].items(), key=lambda item: (not item[0][1], item[0][0]))
        ]
    print_table("Waits, copies and launches", table)
    print_table("Waits by line", lines or [{"work": "none", "wait": "", "times": "", "whose": ""}])
    print_machine(machine)
    found = {
        name: {**values, "waits": {line: times for (line, _), times in values["waits"].items()}}
        for name, values in results.items()
    }
    write_json(options.json, {"machine": machine, "results": found})


if __name__ == "__main__":
    main()
