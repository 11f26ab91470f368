"""Memory and time of a conversion against the size of the checkpoint, beside the usual way of converting in memory.

    python benchmarks/convert.py                       # 0.3B, 1B and 3B language models; needs 18 GB of disk
    python benchmarks/convert.py --sizes 0.3B 7B       # up to the size of the released models: 31 GB of disk

Synthetic checkpoints in the layout of the released ones (random bfloat16 values in `.bin` shards of at most 5 GB, the
full five-stage ConvNeXt-L as the tower) are built in a temporary folder, one shard in memory at a time, and removed
afterwards. Each conversion runs in a process of its own; its memory is the process's peak resident set as the system
counts it, mapped pages of files included.

- streamed: `convert_checkpoint`. Its time includes SHA-256 of all sources, reading the output back, and its SHA-256.
- in memory: what most converters do. All shards are loaded with `torch.load`, renamed, assigned to a model that was
  built on the meta device, and saved with `save_pretrained`. It runs where it needs less than 60% of the free memory.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ConvNextConfig, ConvNextModel, LlamaConfig


REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "convllava"
SHARD_BYTES = 5 * 10**9
# Language models of the Llama family: width, width of the MLP, layers.
SIZES = {"0.3B": (1024, 2816, 16), "1B": (2048, 5504, 22), "3B": (3200, 8640, 26), "7B": (4096, 11008, 32)}
TOWER = {"num_stages": 5, "depths": [3, 3, 27, 3, 6], "hidden_sizes": [192, 384, 768, 1536, 3072], "image_size": 1536}
VOCABULARY = 32000
HEAD_SIZE = 64


def list_tensors(model_class, config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model, without memory for it."""
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def save_random(
    shapes: dict[str, tuple[int, ...]], folder: Path, dtype: torch.dtype = torch.bfloat16, norms: float = 1.0
) -> list[int]:
    """Writes `.bin` shards and their index; returns the shards' sizes in bytes. Holds one shard in memory.

    Values are around 0, those of norms around `norms`: a trained model's are positive, a delta's are not.
    """
    noise = torch.randn(2**24, dtype=torch.float32).mul_(0.02).to(dtype)
    shards, room = [], 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    sizes, index = [], {}
    for number, names in enumerate(shards):
        file = folder / f"pytorch_model-{number + 1:05d}-of-{len(shards):05d}.bin"
        content = {}
        for name in names:
            count = torch.Size(shapes[name]).numel()
            content[name] = noise.repeat(-(-count // len(noise)))[:count].clone().reshape(shapes[name])
            if name.endswith("norm.weight"):
                content[name] += norms
            index[name] = file.name
        torch.save(content, file)
        sizes.append(file.stat().st_size)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return sizes


def build_checkpoint(size: str, folder: Path) -> list[int]:
    """Writes a language model and a tower in the released layout; returns the sizes of their weight files in bytes."""
    width, mlp_width, layers = SIZES[size]
    for part in ("llm", "vision"):
        (folder / part).mkdir()
        for path in (REFERENCE / part).iterdir():
            if "pytorch_model" not in path.name:
                shutil.copy(path, folder / part)
    values = {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_SIZE,
        "num_key_value_heads": width // HEAD_SIZE,
        "vocab_size": VOCABULARY,
    }
    edit_json(folder / "llm" / "config.json", **values, mm_hidden_size=TOWER["hidden_sizes"][-1])
    edit_json(folder / "vision" / "config.json", **TOWER)
    sides = {"size": {"shortest_edge": TOWER["image_size"]}, "crop_size": TOWER["image_size"]}
    edit_json(folder / "vision" / "preprocessor_config.json", **sides)

    shapes = list_tensors(AutoModelForCausalLM.from_config, LlamaConfig(**values))
    shapes |= {"model.mm_projector.0.weight": (width, 3072), "model.mm_projector.0.bias": (width,)}
    shapes |= {"model.mm_projector.2.weight": (width, width), "model.mm_projector.2.bias": (width,)}
    tower = list_tensors(ConvNextModel, ConvNextConfig(**TOWER))
    tower = {name: shape for name, shape in tower.items() if not name.startswith("layernorm.")}
    return save_random(shapes, folder / "llm") + save_random(tower, folder / "vision")


def edit_json(path: Path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def convert_streamed(source: Path, output: Path):
    from convllava_hf.conversion.convert import convert_checkpoint

    convert_checkpoint(source / "llm", output, vision_tower=source / "vision")


def convert_in_memory(source: Path, output: Path):
    from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
    from convllava_hf.checkpoints.weight_maps import CONVLLAVA, CONVNEXT, VISION_TOWER

    state = {}
    for path in sorted((source / "llm").glob("*.bin")):
        state |= {CONVLLAVA.rename(name): t for name, t in torch.load(path, weights_only=True).items()}
    for path in sorted((source / "vision").glob("*.bin")):
        weights = torch.load(path, weights_only=True)
        state |= {VISION_TOWER.rename(CONVNEXT.rename(name)): tensor for name, tensor in weights.items()}
    text = json.loads((source / "llm" / "config.json").read_text())
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(**TOWER),
        text_config=LlamaConfig(**{key: text[key] for key in keys}),
        image_token_id=0,
    )
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config)
    model.load_state_dict(state, strict=True, assign=True)
    del state, weights
    model.resize_token_embeddings(VOCABULARY + 2, pad_to_multiple_of=64, mean_resizing=False)
    model.save_pretrained(output, max_shard_size=SHARD_BYTES)


WAYS = {"streamed": convert_streamed, "in memory": convert_in_memory}


def work(way: str, source: Path, output: Path):
    """One conversion, in this process; prints what it took."""
    import convllava_hf.conversion  # noqa: F401  what both ways import is no part of the measurement

    before = peak_memory()
    started = time.monotonic()
    WAYS[way](source, output)
    print(json.dumps({"seconds": time.monotonic() - started, "imports": before, "peak": peak_memory()}))


def peak_memory() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory() -> int:
    """Bytes that processes can still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def run_worker(*arguments):
    """Calls this script in a process of its own; returns what it prints last, as JSON."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, folder: Path):
    """Prints the rows of one size."""
    # In a process of its own too: what it leaves in memory would be counted for the conversions.
    sizes = run_worker("build", size, folder)
    total, largest = sum(sizes), max(sizes)
    for way in WAYS:
        row = f"| {size} | {total / 1e9:.2f} | {largest / 1e9:.2f} | {way} |"
        if way == "in memory" and 1.2 * total > 0.6 * available_memory():
            print(f"{row} not run: does not fit | | | | |", flush=True)
            continue
        found = run_worker(way, folder, folder / "output")
        peak, growth = found["peak"], found["peak"] - found["imports"]
        print(
            f"{row} {found['seconds']:.0f} | {peak / 1e9:.2f} | {growth / 1e9:.2f} | {peak / largest:.2f} | "
            f"{peak / total:.2f} |",
            flush=True,
        )
        shutil.rmtree(folder / "output")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.3B", "1B", "3B"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        task, first, second = arguments.worker
        if task == "build":
            print(json.dumps(build_checkpoint(first, Path(second))))
        else:
            work(task, Path(first), Path(second))
        return
    print("| model | weights, GB | largest file, GB | way | s | peak, GB | over imports, GB | / largest | / weights |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        width, mlp_width, layers = SIZES[size]
        parameters = 2 * VOCABULARY * width + layers * (4 * width**2 + 3 * width * mlp_width) + 700_000_000
        needed = 4.2 * parameters
        if shutil.disk_usage(arguments.folder).free < needed:
            sys.exit(f"{size} needs {needed / 1e9:.0f} GB of disk in {arguments.folder}; choose another --folder.")
        with tempfile.TemporaryDirectory(prefix="convert-", dir=arguments.folder) as folder:
            measure(size, Path(folder))


if __name__ == "__main__":
    main()
