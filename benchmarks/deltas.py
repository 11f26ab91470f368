"""Memory and time of merging a delta against the size of the model, beside the original's way of merging in memory.

    python benchmarks/deltas.py --sizes 1B            # beside the way in memory; needs 8 GB of disk
    python benchmarks/deltas.py --sizes 7B 13B        # the sizes of the released deltas; needs 42 GB of disk

Synthetic pairs (a base, and a delta with four more words and a projector, float16) are built in a temporary folder and
removed afterwards. Where the disk has room, both are random values in `.bin` shards of at most 5 GB, as released. Else
they are safetensors files without content (sparse: they read as zeros and take no room): memory is the same, reading is
faster. Memory is the peak resident set of a process of its own, mapped pages of files included.

- streamed: the command `convllava apply-delta`. Its time includes SHA-256 of everything read and written, and reading
  the output back.
- in memory: what the original does. Both models are loaded, added and saved. It runs where it needs less than 60% of
  the free memory.

The target: at most twice the largest tensor plus 1 GB, whatever the size.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from convert import SHARD_BYTES, SIZES, VOCABULARY, available_memory, list_tensors, save_random
from transformers import AutoModelForCausalLM, LlamaConfig


SIZES = {**SIZES, "13B": (5120, 13824, 40)}
ADDED_WORDS = 4
VISION_WIDTH = 1024
IN_MEMORY = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
states = []
for folder in sys.argv[1:3]:
    states.append({})
    for path in sorted(Path(folder).glob("*.bin")):
        states[-1] |= torch.load(path, weights_only=True)
base, target = states
for name, tensor in target.items():
    if name in base:
        tensor[: len(base[name])] += base[name]
Path(sys.argv[3]).mkdir()
save_file(target, Path(sys.argv[3]) / "model.safetensors")
"""


def list_pair(size: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of a base and of its delta."""
    width, mlp_width, layers = SIZES[size]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers, vocab_size=VOCABULARY
    )
    base = list_tensors(AutoModelForCausalLM.from_config, config)
    delta = {name: (n + ADDED_WORDS, *rest) if n == VOCABULARY else (n, *rest) for name, (n, *rest) in base.items()}
    delta |= {"model.mm_projector.weight": (width, VISION_WIDTH), "model.mm_projector.bias": (width,)}
    return {name: tuple(shape) for name, shape in base.items()}, delta


def save_sparse(shapes: dict[str, tuple[int, ...]], folder: Path, norms: float):
    """Writes safetensors shards of zeros that take no room on the disk, and their index; the last norm is `norms`."""
    shards, room, index = [], 0, {}
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if size > room:
            shards.append({})
            room = SHARD_BYTES
        start = SHARD_BYTES - room
        shards[-1][name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, start + size]}
        index[name] = f"model-{len(shards)}.safetensors"
        room -= size
    for number, shard in enumerate(shards):
        text = json.dumps(shard).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / f"model-{number + 1}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in shard.values()))
            if "model.norm.weight" in shard:
                entry = shard["model.norm.weight"]
                file.seek(8 + len(text) + entry["data_offsets"][0])
                file.write(torch.full(entry["shape"], norms, dtype=torch.float16).numpy().tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def build_pair(size: str, folder: Path, is_sparse: bool):
    """Writes `base` and `delta`."""
    for part, shapes in zip(("base", "delta"), list_pair(size), strict=True):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
        if is_sparse:
            save_sparse(shapes, folder / part, float(part == "base"))
        else:
            save_random(shapes, folder / part, torch.float16, float(part == "base"))


def run(command: list) -> tuple[float, int]:
    """Runs a process; returns seconds and its peak memory in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(error)
    return time.monotonic() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(size: str, folder: Path, is_sparse: bool):
    """Prints the rows of one size."""
    base, delta = list_pair(size)
    sizes = [2 * torch.Size(shape).numel() for shapes in (base, delta) for shape in shapes.values()]
    total, largest = sum(sizes), max(sizes)
    # In a process of its own, whose memory goes with it.
    run([sys.executable, __file__, "--build", size, folder, int(is_sparse)])
    sources = "zeros, safetensors" if is_sparse else "random, .bin"
    bound = 2 * largest + 10**9
    convllava = Path(sys.executable).with_name("convllava")
    ways = {
        "streamed": [convllava, "apply-delta", "--base", folder / "base", "--delta", folder / "delta", "--output"],
        "in memory": [sys.executable, "-c", IN_MEMORY, folder / "base", folder / "delta"],
    }
    for way, command in ways.items():
        row = f"| {size} | {total / 1e9:.1f} | {sources} | {way} |"
        if way == "in memory" and (is_sparse or 1.1 * total > 0.6 * available_memory()):
            print(f"{row} not run: does not fit | | | |", flush=True)
            continue
        seconds, peak = run([*command, folder / "output"])
        print(
            f"{row} {seconds:.0f} | {peak / 1e9:.2f} | {bound / 1e9:.2f} | {'yes' if peak <= bound else 'no'} |",
            flush=True,
        )
        shutil.rmtree(folder / "output")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.3B", "1B"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        size, folder, is_sparse = arguments.build
        build_pair(size, Path(folder), bool(int(is_sparse)))
        return
    print("| model | base and delta, GB | sources | way | s | peak RSS, GB | target, GB | within |")
    print("|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        output = sum(2 * torch.Size(shape).numel() for shape in list_pair(size)[1].values())
        free = shutil.disk_usage(arguments.folder).free
        if free < 1.05 * output:
            sys.exit(f"{size} needs {output / 1e9:.0f} GB of disk in {arguments.folder}; choose another --folder.")
        with tempfile.TemporaryDirectory(prefix="deltas-", dir=arguments.folder) as folder:
            measure(size, Path(folder), is_sparse=free < 3.2 * output)


if __name__ == "__main__":
    main()
