"""One checkpoint in eager torch, torch.compile, ONNX Runtime and OpenVINO, in one run on this CPU.

Every way runs in a process of its own, one after the other, with the same threads: its memory is its own, and no way
works beside another. Measured are the tower with the projector on one picture, the time to the first token of a prompt
with that picture, and tokens per second behind it; medians of `--repeats` after one to warm up. The answers of all ways
are compared with those of eager torch in float32.

    python benchmarks/export.py CHECKPOINT
    python benchmarks/export.py --random 768              # no checkpoint: ConvNeXt-B, 768 pixels, a small Qwen3
    python benchmarks/export.py CHECKPOINT --ways eager onnx onnx-int4 --new-tokens 64 --json results.json
    python benchmarks/export.py --random 768 --keep work  # exports stay in work, and are found there the next time
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from machine import describe_machine, print_machine, print_table, show_progress, write_json


WAYS = ("eager", "compile", "onnx", "onnx-int8", "openvino", "openvino-int8")
# bfloat16 takes hundreds of times longer on a CPU that lacks it.
MORE_WAYS = ("bfloat16", "onnx-int4", "openvino-int4")
MEBIBYTE = 2**20


def make_random_checkpoint(folder: Path, side: int) -> Path:
    """A checkpoint with random weights: five stages of the widths of ConvNeXt-B, and a Qwen3 of 14 layers (286M)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from convllava_hf import (
        ConvLlavaConfig,
        ConvLlavaForConditionalGeneration,
        ConvLlavaImageProcessor,
        ConvLlavaProcessor,
    )

    pieces = ["<pad>", "<image>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", additional_special_tokens=["<image>"]
    )
    vision = {
        "model_type": "convnext",
        "num_stages": 5,
        "depths": [3, 3, 27, 3, 3],
        "hidden_sizes": [128, 256, 512, 1024, 2048],
        "image_size": side,
    }
    text = {
        "model_type": "qwen3",
        "vocab_size": 32064,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    config = ConvLlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    model = ConvLlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.save_pretrained(folder)
    ConvLlavaProcessor(
        ConvLlavaImageProcessor(size={"height": side, "width": side}, downsampling_factor=64), tokenizer
    ).save_pretrained(folder)
    return folder


def measure_median(call, repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(folder: str, way: str, new_tokens: int, repeats: int, threads: int) -> dict:
    """Loads one way in this process and measures it.

    Returns:
        Seconds of the tower and to the first token, tokens per second, mebibytes, and the tokens of the answer.
    """
    import torch

    from convllava_hf.export.agreement import make_probes
    from convllava_hf.inference.load import load
    from convllava_hf.registration import register

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    register()
    runtime = way.split("-")[0] if way.split("-")[0] in ("onnx", "openvino") else None
    settings = {"device": "cpu", "dtype": "bfloat16" if way == "bfloat16" else "float32"}
    if runtime:
        settings = {"runtime": runtime}
    model, processor = load(folder, **settings)
    if way == "compile":
        model.forward = torch.compile(model.forward, dynamic=True)
        model.model.vision_tower.forward = torch.compile(model.model.vision_tower.forward)
    probe = make_probes(model, processor)[0]
    images = {key: probe[key] for key in ("pixel_values", "image_sizes") if key in probe}
    stop = {"do_sample": False, "eos_token_id": None}

    @torch.inference_mode()
    def look():
        return model.get_image_features(**images)

    def generate(tokens):
        return model.generate(**probe, max_new_tokens=tokens, **stop)

    tower = measure_median(look, repeats)
    first = measure_median(lambda: generate(1), repeats)
    whole = measure_median(lambda: generate(new_tokens), repeats)
    return {
        "tower": tower,
        "first": first,
        "rate": (new_tokens - 1) / (whole - first),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEBIBYTE,
        "answer": generate(new_tokens)[0, probe["input_ids"].shape[1] :].tolist(),
    }


def run_apart(arguments: list[str]) -> dict:
    """Runs this file in a process of its own and reads the last line that it prints."""
    result = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--random", type=int, metavar="PIXELS")
    parser.add_argument("--ways", nargs="+", choices=WAYS + MORE_WAYS, default=WAYS)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=WAYS + MORE_WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        found = measure(options.checkpoint, options.measure, options.new_tokens, options.repeats, options.threads)
        print(json.dumps(found))
        return
    if bool(options.checkpoint) == bool(options.random):
        parser.error("give a checkpoint, or --random PIXELS")
    from convllava_hf.export.run import export_checkpoint
    from convllava_hf.registration import register

    register()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = options.keep or Path(scratch)
        checkpoint = options.checkpoint or scratch / "random"
        if options.random and not checkpoint.exists():
            make_random_checkpoint(checkpoint, options.random)
        for way in options.ways:
            show_progress(way)
            folder, (target, _, quantize) = checkpoint, way.partition("-")
            if target in ("onnx", "openvino"):
                folder = scratch / way
                if not folder.exists():
                    export_checkpoint(checkpoint, target, folder, quantize or None)
            results[way] = run_apart(
                [
                    str(folder),
                    f"--measure={way}",
                    f"--new-tokens={options.new_tokens}",
                    f"--repeats={options.repeats}",
                    f"--threads={options.threads}",
                ]
            )
    base = results[options.ways[0]]
    rows = [
        {
            "": way,
            "tower, ms": f"{1e3 * found['tower']:.1f} ({base['tower'] / found['tower']:.2f}x)",
            "first token, ms": f"{1e3 * found['first']:.1f} ({base['first'] / found['first']:.2f}x)",
            "tokens/s": f"{found['rate']:.1f} ({found['rate'] / base['rate']:.2f}x)",
            "memory, MiB": f"{found['memory']:.0f}",
            "equal tokens": sum(map(int.__eq__, found["answer"], base["answer"])),
        }
        for way, found in results.items()
    ]
    print_table(f"Ways to answer, against {options.ways[0]}", rows)
    print_machine(describe_machine(options.threads))
    write_json(options.json, results)


if __name__ == "__main__":
    main()
