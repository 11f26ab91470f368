"""Time and memory from a JPEG file to `pixel_values`: ours against the original's pipeline, in one run.

The peer is the original's preprocessing, rebuilt from public calls of Pillow and transformers: open, convert to RGB,
paste in the middle of a square of the mean colour, then CLIP's image processor on Pillow and numpy. Source:
alibaba/conv-llava, `llava/mm_utils.py` (`expand2square`, `process_images`) and the released preprocessor_config.json.

Every variant lives in a process of its own, so none runs in memory that another has warmed. The processes take turns:
while one works the others wait, and each case is repeated in rounds (decode, original, ours, decode, original, ...), so
a change in the machine's speed meets all of them. Medians over the rounds are printed.

    python benchmarks/preprocess.py                      # about 3 minutes on a quiet machine
    python benchmarks/preprocess.py --cases 12 640x480   # the two that matter, no growth
"""

import argparse
import io
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from machine import describe_machine, print_machine, print_table, show_progress, write_json


# Smallest ratios, original to ours, that the project wants on one thread at 1536 pixels.
TARGETS = {"12": 5.0, "640x480": 7.0}
# A new interpreter for every variant; the test replaces it by a copy of its own process, which starts faster.
START_METHOD = "spawn"
MEBIBYTE = 2**20


def build_decode(side: int):
    """Reads and decodes, nothing else: no pipeline that starts from a file can take less."""
    from PIL import Image

    def decode(paths):
        for path in paths:
            Image.open(path).load()

    return decode


def build_original(side: int):
    """The original's pipeline: one image at a time, stacked at the end."""
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    colour = tuple(int(mean * 255) for mean in processor.image_mean)

    def preprocess(paths):
        results = []
        for path in paths:
            image = Image.open(path).convert("RGB")
            if image.width != image.height:
                square = Image.new("RGB", (max(image.size), max(image.size)), colour)
                square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
                image = square
            results.append(processor(image, return_tensors="pt")["pixel_values"][0])
        return torch.stack(results)

    return preprocess


def build_ours(side: int, class_name: str = "ConvLlavaImageProcessor", **settings):
    """One of our image processors, on images as `Image.open` gives them; `draft_photos` has the decoder shrink them."""
    from PIL import Image

    import convllava_hf

    processor = getattr(convllava_hf, class_name)(size={"height": side, "width": side}, **settings)
    return lambda paths: processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]


# What training and `answer` hand to the device, which normalises them.
BYTES = {"do_rescale": False, "do_normalize": False}
VARIANTS = {
    "decode": build_decode,
    "original": build_original,
    "ours": partial(build_ours, image_aspect_ratio="pad"),
    "ours, draft": partial(build_ours, image_aspect_ratio="pad", draft_photos=True),
    "ours, bytes": partial(build_ours, image_aspect_ratio="pad", **BYTES),
    "ours, draft, bytes": partial(build_ours, image_aspect_ratio="pad", draft_photos=True, **BYTES),
    "ours, native": partial(build_ours, image_aspect_ratio="native"),
    "ours, Pillow": partial(build_ours, class_name="ConvLlavaImageProcessorPil", image_aspect_ratio="pad"),
}


def make_photograph(width: int, height: int, quality: int) -> bytes:
    """Draws a JPEG that costs about what a photograph costs: smooth light, texture at every scale, edges, text.

    Args:
        width, height: in pixels.
        quality: of the JPEG, 1 to 95.

    Returns:
        The file's bytes.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    generator = np.random.default_rng(0)
    picture = np.full((height, width, 3), 128, np.float32)
    cell = max(width, height)
    while cell >= 1:  # each octave has half the period and less strength, down to the grain of a sensor
        grid = generator.uniform(-1, 1, (math.ceil(height / cell) + 1, math.ceil(width / cell) + 1)).astype(np.float32)
        layer = np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC))
        for channel, tint in enumerate(generator.uniform(0.7, 1.0, 3)):
            picture[:, :, channel] += np.float32(8 * tint * cell**0.33) * layer
        cell //= 2
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, radius = generator.uniform(0, width), generator.uniform(0, height), generator.uniform(0.01, 0.06) * width
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), tuple(generator.integers(0, 256, 3).tolist()))
    font = ImageFont.load_default(max(8, height // 30))
    for line in range(6):
        draw.text((width * 0.05, height * (0.1 + 0.14 * line)), "The quick brown fox 0123456789 " * 2, "white", font)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def get_size(case: str) -> tuple[int, int]:
    """Width and height in pixels of a case: `640x480`, or megapixels at 4:3 such as `12`."""
    if "x" in case:
        width, height = (int(side) for side in case.split("x"))
    else:
        height = round(math.sqrt(float(case) * 1e6 * 3 / 4))
        width = round(height * 4 / 3)
    if min(width, height) < 1:
        raise ValueError(f"{case!r} is no image size; expected for example 640x480, or 12 for 12 megapixels.")
    return width, height


def read_status(field: str) -> int:
    """A field of this process's memory in bytes: `VmRSS` what is resident now, `VmHWM` the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def count_fresh_bytes() -> int:
    """Memory that the system has handed to this process so far, in bytes: touching it first costs time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()


def measure_peak(connection, run, paths: list[Path]) -> None:
    """Sends by how many bytes one call raises this process's resident memory at its highest, its result included."""
    before = read_status("VmRSS")
    result = run(paths)
    connection.send(read_status("VmHWM") - before)
    del result


def serve_variant(connection, variant: str, side: int, threads: int, tiny: Path) -> None:
    """Runs in a process of its own: builds a variant and does what it is told until the other end closes."""
    import torch

    torch.set_num_threads(threads)
    build = VARIANTS[variant]
    build(64)([tiny])  # imports and first calls, in little memory
    run = build(side)
    try:
        while (request := connection.recv()) is not None:
            command, paths, *arguments = request
            if command == "peak":
                # A forked process starts with this one's few pages and an empty heap, and its peak at what it has.
                receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
                process = multiprocessing.get_context("fork").Process(target=measure_peak, args=(sender, run, paths))
                process.start()
                sender.close()
                connection.send(receiver.recv())
                process.join()
            elif command == "save":
                torch.save(run(paths), arguments[0])
                connection.send(None)
            else:
                before, cpu_start, start = count_fresh_bytes(), time.process_time(), time.perf_counter()
                result = run(paths)
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
                fresh_bytes = count_fresh_bytes() - before
                del result  # not timed, as in a loop that hands its batches on
                connection.send((seconds, cpu_seconds, fresh_bytes))
    except EOFError:  # the other end is gone
        pass


class Variants:
    """The processes, one per variant; a context manager that ends them."""

    def __init__(self, names: list[str], side: int, threads: int, tiny: Path):
        context = multiprocessing.get_context(START_METHOD)
        self.connections, self.processes = {}, []
        for name in names:
            self.connections[name], theirs = context.Pipe()
            process = context.Process(target=serve_variant, args=(theirs, name, side, threads, tiny))
            process.start()
            theirs.close()
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for connection in self.connections.values():
            connection.send(None)
        for process in self.processes:
            process.join()

    def ask(self, name: str, command: str, paths: list[Path], *arguments):
        """Has one variant do a command and waits for its answer."""
        self.connections[name].send((command, paths, *arguments))
        return self.connections[name].recv()

    def measure(self, paths: list[Path], repeats: int, label: str) -> dict[str, dict[str, float]]:
        """Medians over the rounds, for every variant: wall and processor seconds, and bytes of fresh memory."""
        times = {name: [] for name in self.connections}
        for turn in range(repeats + 1):
            show_progress(f"{label}: round {turn} of {repeats}")
            for name in self.connections:
                measured = self.ask(name, "time", paths)
                if turn:  # the first round warms up
                    times[name].append(measured)
        results = {}
        for name in self.connections:
            medians = [statistics.median(values) for values in zip(*times[name], strict=True)]
            results[name] = dict(zip(("seconds", "cpu_seconds", "fresh_bytes"), medians, strict=True))
        return results

    def measure_peaks(self, paths: list[Path]) -> dict[str, int | None]:
        """Every variant's peak memory in bytes; `None` where the system does not tell."""
        known = Path("/proc/self/status").exists()
        return {name: self.ask(name, "peak", paths) if known else None for name in self.connections}


def compare_levels(expected_file: Path, result_file: Path) -> dict[str, float]:
    """How far two saved outputs of one image lie apart, in levels of the 0..255 scale."""
    import torch
    from transformers.image_utils import OPENAI_CLIP_STD

    difference = (torch.load(expected_file) - torch.load(result_file)).abs()
    difference = difference * torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1) * 255
    return {
        "largest": difference.max().item(),
        "over_half": (difference > 0.5).float().mean().item(),
        "over_one_and_a_half": (difference > 1.5).float().mean().item(),
    }


def make_rows(results: dict[str, dict[str, dict]], column: str) -> list[dict]:
    """Rows of a table: one per case and variant, with ratios to the original and to the variant's first case."""
    rows = []
    first = next(iter(results.values()))
    for case, variants in results.items():
        original, decode = variants["original"]["seconds"], variants["decode"]["seconds"]
        for name, values in variants.items():
            own = values["seconds"] - decode
            peak = values["peak_bytes"]
            rows.append(
                {
                    column: case,
                    "variant": name,
                    "ms": f"{values['seconds'] * 1e3:.1f}",
                    "CPU ms": f"{values['cpu_seconds'] * 1e3:.1f}",
                    "times faster": f"{original / values['seconds']:.2f}",
                    "without decoding": f"{(original - decode) / own:.2f}" if name != "decode" and own > 0 else "",
                    "growth": f"{values['seconds'] / first[name]['seconds']:.2f}",
                    "fresh MiB": f"{values['fresh_bytes'] / MEBIBYTE:.0f}",
                    "peak MiB": "" if peak is None else f"{peak / MEBIBYTE:.0f}",
                }
            )
    return rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Columns: `ms` median wall time of a call; `CPU ms` median processor time, which other programs disturb "
        "less;\n`times faster` than the original; `without decoding` the same after subtracting `decode`; `growth` "
        "against the\nvariant's first row; `fresh MiB` memory that the system handed out during a call, each page of "
        "which costs time\n(none where the allocator could reuse what earlier calls freed); `peak MiB` by how much one "
        "call raises the\nresident memory of a fresh process, result included.",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["640x480", "1", "4", "12", "24"],
        metavar="SIZE",
        help="images: WIDTHxHEIGHT in pixels, or a number of megapixels at 4:3 (default: 640x480 1 4 12 24)",
    )
    parser.add_argument(
        "--batches", nargs="*", type=int, default=[1, 2, 4, 8], metavar="N", help="batch sizes (default: 1 2 4 8)"
    )
    parser.add_argument("--batch-case", default="640x480", metavar="SIZE", help="image of the batches (640x480)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[name for name in VARIANTS if name not in ("decode", "original")],
        choices=[name for name in VARIANTS if name not in ("decode", "original")],
        help="what to compare with the original (default: all)",
    )
    parser.add_argument("--side", type=int, default=1536, help="side of the processed square in pixels (1536)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds per case, after one to warm up (9)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (1)")
    parser.add_argument("--quality", type=int, default=90, help="quality of the JPEG files (90)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    # Threads that wait must not spin, and no library may start threads beyond those asked for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    machine = describe_machine(options.threads)
    files, results, batches, differences = [], {}, {}, []
    with tempfile.TemporaryDirectory() as folder:

        def write_photograph(case: str) -> Path:
            path = Path(folder) / f"{case}.jpg"
            if not path.exists():
                show_progress(f"drawing {case}")
                width, height = get_size(case)
                path.write_bytes(make_photograph(width, height, options.quality))
                bits = path.stat().st_size * 8 / (width * height)
                files.append({"image": case, "pixels": f"{width}x{height}", "JPEG bits per pixel": f"{bits:.2f}"})
            return path

        paths = {case: write_photograph(case) for case in dict.fromkeys([*options.cases, options.batch_case])}
        tiny = Path(folder) / "tiny.jpg"
        tiny.write_bytes(make_photograph(48, 32, options.quality))
        with Variants(["decode", "original", *options.variants], options.side, options.threads, tiny) as variants:
            cases = {case: [paths[case]] for case in options.cases}
            groups = {count: [paths[options.batch_case]] * count for count in options.batches}
            # Memory first: the processes' heaps grow with the calls that are timed.
            peaks = {}
            for key, images in [*cases.items(), *groups.items()]:
                show_progress(f"memory: {key}")
                peaks[key] = variants.measure_peaks(images)
            for target, work, label in ((results, cases, "image"), (batches, groups, "batch of")):
                for key, images in work.items():
                    target[key] = variants.measure(images, options.repeats, f"{label} {key}")
                    for name, peak in peaks[key].items():
                        target[key][name]["peak_bytes"] = peak
            for case, images in cases.items():
                show_progress(f"difference: {case}")
                expected = Path(folder) / "original.pt"
                variants.ask("original", "save", images, expected)
                for name in options.variants:
                    if "native" not in name and "bytes" not in name:  # those have another shape or scale
                        variants.ask(name, "save", images, Path(folder) / "ours.pt")
                        difference = compare_levels(expected, Path(folder) / "ours.pt")
                        differences.append({"image": case, "variant": name, **difference})
    show_progress("")

    print("# Preprocessing: from a JPEG file to `pixel_values`")
    targets = [
        {
            "image": case,
            "wanted": f"{TARGETS[case]:.0f} times faster",
            "from a decoded image": f"{(original - decode) / (ours - decode):.2f}",
            "decoding included": f"{original / ours:.2f}",
            "decoding included, at most": f"{original / decode:.2f}",
        }
        for case, variants in results.items()
        if case in TARGETS and "ours" in variants and (options.side, options.threads) == (1536, 1)
        for original, decode, ours in [[variants[name]["seconds"] for name in ("original", "decode", "ours")]]
    ]
    if targets:
        print_table("Targets", targets)
    print_table(f"One image, to {options.side} pixels", make_rows(results, "image"))
    if batches:
        print_table(f"Batches of {options.batch_case}", make_rows(batches, "images"))
    if differences:
        rows = [
            {
                "image": row["image"],
                "variant": row["variant"],
                "largest, in levels of 255": f"{row['largest']:.4f}",
                "values over half a level": f"{row['over_half']:.4%}",
                "over 1.5 levels": f"{row['over_one_and_a_half']:.5%}",
            }
            for row in differences
        ]
        print_table("Difference from the original", rows)
    print_table("Images", files)
    print_machine(machine)
    content = {"machine": machine, "side": options.side, "images": results, "batches": batches}
    write_json(options.json, {**content, "differences": differences, "files": files})


if __name__ == "__main__":
    main()
