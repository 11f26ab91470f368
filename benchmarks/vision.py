"""Work, time and memory of the vision tower over resolution and aspect ratio, against what the machine can do.

The tower is the released five-stage ConvNeXt-L (random weights). Two peers run in the same run: transformers' stock
ConvNextModel on the same weights, and for tokens and work only, CLIP ViT-L/14 at 336 pixels as in LLaVA-1.5.

- Work is counted by torch's flop counter on meta tensors, so every size costs nothing. Two operations per
  multiplication with addition; norms, activations and additions are not counted.
- Time is the median of `--repeats` calls after one to warm up. The variants of a size take turns, and a large square
  matrix multiplication in the same dtype is timed in between: `of matmul` is the tower's rate over that rate. Near 1,
  only less work makes it faster; far below, memory traffic and launches hold it back.
- Memory is the highest above what was held before the calls (weights included there): allocated memory on a GPU, the
  process's resident memory on a CPU under Linux.

    python benchmarks/vision.py                                            # a CPU: 512 and 768, a few minutes
    python benchmarks/vision.py --resolutions 512 768 1024 1536            # default on a GPU, in bfloat16
    python benchmarks/vision.py --channels-last --compile                  # two more variants of the same tower
"""

import argparse
import gc
import os
import statistics
import time
from functools import partial
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin: busy machines slow down by that

import torch
from machine import describe_machine, print_machine, print_table, show_progress, write_json
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextModel

from convllava_hf import ConvLlavaConfig
from convllava_hf.model.configuration_convllava import RELEASED_VISION_TOWER
from convllava_hf.model.image_processing_convllava import get_native_size
from convllava_hf.model.modeling_convllava import build_vision_tower


# Pictures whose shape is not square: height and width in pixels.
PICTURES = {"4:3 photo": (3000, 4000), "16:9 screen": (2160, 3840), "A4 page": (3508, 2480)}
# The vision tower of LLaVA-1.5; its pictures are padded to a square.
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}
MEBIBYTE = 2**20
TERA = 1e12


def count_flops(model: torch.nn.Module, height: int, width: int, batch: int = 1) -> int:
    """Floating-point operations of one forward pass, of a model on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model(torch.empty(batch, 3, height, width, device="meta"))
    return counter.get_total_flops()


def get_native_sizes(side: int, factor: int) -> list[tuple[str, str, int, int]]:
    """Sizes that pictures are processed to in a square of `side` pixels and without it.

    Args:
        side: of the padded square, in pixels.
        factor: pixels per token along a side.

    Returns:
        `(picture, way, height, width)`: padded; native in the detail of the padded picture, so with fewer tokens; and
        native with as many tokens as the square, so in finer detail.
    """
    budget = (side // factor) ** 2
    sizes = []
    for picture, (height, width) in PICTURES.items():
        cells = [max(1, round(edge * side / max(height, width) / factor)) for edge in (height, width)]
        sizes.append((picture, "pad", side, side))
        for way, tokens in (("native, same detail", cells[0] * cells[1]), ("native, same tokens", budget)):
            sizes.append((picture, way, *get_native_size(height, width, factor, 1, tokens, 2.0)))
    return sizes


class PeakMemory:
    """Highest memory in bytes above that at the start of a `with` block; `None` where the system does not tell."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, None

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory starts again from now
            self.before = self._read("VmRSS")
        return self

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before
        elif Path("/proc/self/clear_refs").exists():
            self.peak = self._read("VmHWM") - self.before

    def _read(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def time_call(call, device: torch.device) -> tuple:
    """Seconds of one call until the device has finished it, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


class Bench:
    """The towers to time, with weights in common, and the matrix multiplication that they are measured against."""

    def __init__(self, config: ConvLlavaConfig, options: argparse.Namespace):
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.repeats, self.batch = options.repeats, options.batch
        show_progress("building the tower")
        with torch.device(self.device):
            tower = build_vision_tower(config)
        self.towers = {"ours": tower.to(self.dtype).eval()}
        if not options.no_stock:
            self.towers["stock"] = share_weights(tower, config)
        if options.channels_last:  # weights of its own: the memory layout is a property of them
            other = build_vision_tower(config).to(self.device, self.dtype).eval()
            other.load_state_dict(tower.state_dict())
            self.towers["ours, channels_last"] = other.to(memory_format=torch.channels_last)
        if options.compile:
            for name in [name for name in self.towers if name.startswith("ours")]:
                self.towers[f"{name}, compiled"] = torch.compile(self.towers[name], dynamic=False)
        side = options.matmul
        self.factors = [torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2)]
        self.matmul_flops = 2 * side**3

    def time_matmul(self) -> float:
        """Rate of the matrix multiplication now, in operations per second."""
        first, second = self.factors
        return self.matmul_flops / time_call(lambda: first @ second, self.device)[0]

    def measure(self, height: int, width: int, flops: int, names: list[str]) -> list[dict]:
        """Times towers on random images of one size, by turns.

        Args:
            height, width: in pixels.
            flops: work of one call.
            names: of the towers.

        Returns:
            For every tower: seconds of the median and of the first call, rates, peak memory in bytes, and the largest
            difference of its output from ours, in units of our output's standard deviation.
        """
        images = torch.randn(self.batch, 3, height, width, device=self.device).to(self.dtype)
        calls, results, expected = {}, {}, None
        for name in names:
            layout = torch.channels_last if "channels_last" in name else torch.contiguous_format
            calls[name] = partial(self.towers[name], images.contiguous(memory_format=layout))
        times, rates = {name: [] for name in names}, []
        with torch.inference_mode():
            for name, call in calls.items():
                show_progress(f"{width}x{height}, {name}: warming up")
                first, outputs = time_call(call, self.device)
                features = outputs.last_hidden_state.float()
                expected = features if expected is None else expected
                difference = ((features - expected).abs().max() / expected.std()).item()
                results[name] = {"first_call": first, "difference": difference}
            del outputs, features, expected
            self.time_matmul()
            for turn in range(self.repeats):
                for name, call in calls.items():
                    show_progress(f"{width}x{height}, {name}: {turn + 1} of {self.repeats}")
                    rates.append(self.time_matmul())
                    with PeakMemory(self.device) as memory:
                        times[name].append(time_call(call, self.device)[0])
                    results[name]["peak_bytes"] = memory.peak
        for name in names:
            seconds = statistics.median(times[name])
            rate, matmul_rate = flops / seconds, statistics.median(rates)
            results[name] |= {"seconds": seconds, "rate": rate, "matmul_rate": matmul_rate, "flops": flops}
        return [{"height": height, "width": width, "tower": name, **results[name]} for name in names]


def share_weights(tower: torch.nn.Module, config: ConvLlavaConfig) -> ConvNextModel:
    """The stock model of transformers on our tower's weights; only its norm over the pooled output is its own."""
    with torch.device("meta"):
        stock = ConvNextModel(config.vision_config)
    norm = torch.nn.LayerNorm(stock.layernorm.normalized_shape, stock.layernorm.eps)
    norm = norm.to(tower.device, tower.dtype)
    weights = {**tower.state_dict(), **{f"layernorm.{name}": tensor for name, tensor in norm.state_dict().items()}}
    stock.load_state_dict(weights, strict=True, assign=True)
    return stock.eval()


def make_work_rows(entries: list[dict]) -> list[dict]:
    """Rows of the table of work; every size relative to the first, and to CLIP, which is the last."""
    first, clip = entries[0], entries[-1]
    return [
        {
            "tower": entry["tower"],
            "pixels": f"{entry['width']}x{entry['height']}",
            "tokens": entry["tokens"],
            "TFLOP": f"{entry['flops'] / TERA:.3f}",
            "GFLOP per token": f"{entry['flops'] / entry['tokens'] / 1e9:.2f}",
            "pixels, growth": f"{entry['height'] * entry['width'] / first['height'] / first['width']:.2f}",
            "TFLOP, growth": f"{entry['flops'] / first['flops']:.2f}",
            "TFLOP, of CLIP": f"{entry['flops'] / clip['flops']:.2f}",
        }
        for entry in entries
    ]


def make_time_rows(entries: list[dict]) -> list[dict]:
    """Rows of the table of times; growth is against the same tower at the first size."""
    rows = []
    for entry in entries:
        first = next(other for other in entries if other["tower"] == entry["tower"])
        peers = [other for other in entries if (other["height"], other["width"]) == (entry["height"], entry["width"])]
        stock = next((other for other in peers if other["tower"] == "stock"), None)
        peak, first_peak = entry["peak_bytes"], first["peak_bytes"]
        rows.append(
            {
                "pixels": f"{entry['width']}x{entry['height']}",
                "tower": entry["tower"],
                "seconds": f"{entry['seconds']:.4f}",
                "first call": f"{entry['first_call']:.3f}",
                "TFLOP/s": f"{entry['rate'] / TERA:.3f}",
                "matmul TFLOP/s": f"{entry['matmul_rate'] / TERA:.3f}",
                "of matmul": f"{entry['rate'] / entry['matmul_rate']:.2f}",
                "times stock": f"{stock['seconds'] / entry['seconds']:.2f}" if stock else "",
                "growth": f"{entry['seconds'] / first['seconds']:.2f}",
                "TFLOP, growth": f"{entry['flops'] / first['flops']:.2f}",
                "peak MiB": "" if peak is None else f"{peak / MEBIBYTE:.0f}",
                "memory, growth": f"{peak / first_peak:.2f}" if peak and first_peak else "",
                "difference": f"{entry['difference']:.1e}",
            }
        )
    return rows


def make_native_rows(entries: list[dict]) -> list[dict]:
    """Rows of the table of aspect ratios; every way relative to padding the same picture."""
    rows = []
    for entry in entries:
        pad = next(other for other in entries if other["picture"] == entry["picture"] and other["way"] == "pad")
        row = {
            "picture": entry["picture"],
            "way": entry["way"],
            "pixels": f"{entry['width']}x{entry['height']}",
            "tokens": entry["tokens"],
            "tokens, of pad": f"{entry['tokens'] / pad['tokens']:.2f}",
            "TFLOP": f"{entry['flops'] / TERA:.3f}",
            "TFLOP, of pad": f"{entry['flops'] / pad['flops']:.2f}",
        }
        if "seconds" in entry:
            row |= {"seconds": f"{entry['seconds']:.4f}", "seconds, of pad": f"{entry['seconds'] / pad['seconds']:.2f}"}
        rows.append(row)
    return rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; see `--help`. What depends on the device is filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument(
        "--resolutions",
        nargs="+",
        type=int,
        metavar="SIDE",
        help="squares to time, in pixels (default: 512 768 on a CPU, 512 768 1024 1536 on a GPU)",
    )
    parser.add_argument(
        "--native-side",
        type=int,
        metavar="SIDE",
        help="time native aspect ratios against padding to this square; 0 leaves it out (default: the first of "
        "--resolutions on a CPU, the last on a GPU)",
    )
    parser.add_argument("--budget", type=int, default=1536, help="square of the table of aspect ratios, pixels (1536)")
    parser.add_argument("--batch", type=int, default=1, help="images per call (1)")
    parser.add_argument("--repeats", type=int, help="timed calls (default: 3 on a CPU, 20 on a GPU)")
    parser.add_argument("--threads", type=int, help="threads on a CPU (default: torch's choice)")
    parser.add_argument("--channels-last", action="store_true", help="also time the tower in channels_last layout")
    parser.add_argument("--compile", action="store_true", help="also time our towers under torch.compile")
    parser.add_argument("--no-stock", action="store_true", help="leave out transformers' stock ConvNextModel")
    parser.add_argument("--matmul", type=int, metavar="SIDE", help="matrices' side (default: 2048 on a CPU, 8192 else)")
    parser.add_argument("--depths", nargs=5, type=int, default=RELEASED_VISION_TOWER["depths"], help="blocks per stage")
    parser.add_argument(
        "--widths", nargs=5, type=int, default=RELEASED_VISION_TOWER["hidden_sizes"], help="channels per stage"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")
    options = parser.parse_args(arguments)
    slow = torch.device(options.device).type == "cpu"
    options.dtype = options.dtype or ("float32" if slow else "bfloat16")
    options.resolutions = sorted(options.resolutions or ([512, 768] if slow else [512, 768, 1024, 1536]))
    options.repeats = options.repeats or (3 if slow else 20)
    options.matmul = options.matmul or (2048 if slow else 8192)
    if options.native_side is None:
        options.native_side = options.resolutions[0 if slow else -1]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = describe_machine(torch.get_num_threads())
    machine |= {"device": f"{options.device}, {options.dtype}", "batch": str(options.batch)}
    tower_config = {**RELEASED_VISION_TOWER, "depths": options.depths, "hidden_sizes": options.widths}
    tower_config["layer_scale_init_value"] = 1.0  # as after training; with the initial 1e-6 blocks change nothing
    config = ConvLlavaConfig(vision_config=tower_config)

    with torch.device("meta"):
        meta_tower = build_vision_tower(config).eval()
        meta_clip = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()

    def describe_work(height: int, width: int) -> dict:
        show_progress(f"counting {width}x{height}")
        tokens = config.num_image_tokens(height, width)
        return {"height": height, "width": width, "tokens": tokens, "flops": count_flops(meta_tower, height, width)}

    work = [
        {"tower": "ours", **describe_work(side, side)} for side in sorted({512, 768, 1024, 1536, *options.resolutions})
    ]
    clip_side = CLIP["image_size"]
    clip_tokens = (clip_side // CLIP["patch_size"]) ** 2
    clip_flops = count_flops(meta_clip, clip_side, clip_side)
    work.append(
        {
            "tower": "CLIP ViT-L/14, LLaVA-1.5",
            "height": clip_side,
            "width": clip_side,
            "tokens": clip_tokens,
            "flops": clip_flops,
        }
    )
    factor = config.downsampling_factor
    ratios = [
        {"picture": picture, "way": way, **describe_work(height, width)}
        for picture, way, height, width in get_native_sizes(options.budget, factor)
    ]

    bench = Bench(config, options)

    def measure(height: int, width: int, names: list[str]) -> list[dict]:
        flops = options.batch * count_flops(meta_tower, height, width)
        return bench.measure(height, width, flops, names)

    times = [entry for side in options.resolutions for entry in measure(side, side, list(bench.towers))]
    native = []
    if options.native_side:
        measured = {}
        for picture, way, height, width in get_native_sizes(options.native_side, factor):
            if (height, width) not in measured:
                measured[height, width] = measure(height, width, ["ours"])[0]
            native.append({"picture": picture, "way": way, **describe_work(height, width), **measured[height, width]})
    show_progress("")

    print("# The vision tower")
    print_table("Work", make_work_rows(work))
    print_table(f"Work by aspect ratio, {options.budget} pixels", make_native_rows(ratios))
    print_table("Time and memory", make_time_rows(times))
    if native:
        print_table(f"Time by aspect ratio, {options.native_side} pixels", make_native_rows(native))
    print_machine(machine)
    write_json(
        options.json,
        {"machine": machine, "work": work, "work_by_ratio": ratios, "times": times, "times_by_ratio": native},
    )


if __name__ == "__main__":
    main()
