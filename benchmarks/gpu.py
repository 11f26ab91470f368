"""Every question of speed that needs an accelerator, in one command that goes on where it stopped.

    python benchmarks/gpu.py                          # all parts, at most 8 minutes each; run it again to go on
    python benchmarks/gpu.py --parts tower serving --sizes 1B
    python benchmarks/gpu.py --device cpu --toy       # every part at a size that says nothing, to see that it runs

A part consists of cases. Each case is written into `results.json` as soon as it is done, and a case that is there is
not run again; `--again PART` forgets a part. A part runs in a process of its own, which is ended after `--seconds`: the
case that ran then is left out of later runs, by name. `results.md` is the same as a page. Weights are random and made
on the device, so nothing is fetched. What a case needs and the machine lacks (memory, a model class that an older
transformers has not) is skipped by name. docs/gpu.md says what to carry to a machine without a network.

- correctness: the tests with the mark `gpu`, one case per file. Look here first: speed of wrong answers is no speed.
- tower: the released tower, pictures times batch, eager, channels_last and compiled, against the larger of two bounds:
  its work at the measured rate of matrix multiplication, and the bytes that its layers read and write at the measured
  bandwidth of memory.
- first_token: from a picture in memory to the first token, and tokens per second after it, for ConvLLaVA, LLaVA-1.5,
  LLaVA-NeXT and FastVLM behind one shape of language model, and for ConvLLaVA run as the original is: one image at a
  time, Pillow on the CPU, eager attention, float16.
- training: steps of the three stages, AdamW, with recomputation. MFU counts the work without what is recomputed.
- serving: the package's own engine, in this process, with as many clients as chats that it may batch.
"""

import argparse
import gc
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from machine import describe_machine, print_machine, print_table, show_progress


ROOT = Path(__file__).parents[1]
SECONDS = 480
if importlib.util.find_spec("convllava_hf") is None:  # a clone that is not installed
    sys.path.insert(0, str(ROOT / "src"))
# Llama's shapes: width, width of the MLP, layers, heads.
SIZES = {"0.1B": (768, 2048, 12, 12), "1B": (2048, 5504, 22, 32), "7B": (4096, 11008, 32, 32)}
TOY_SIZE = (32, 64, 2, 2)
VOCABULARY = 32000
TOWER = {"num_stages": 5, "depths": [3, 3, 27, 3, 6], "hidden_sizes": [192, 384, 768, 1536, 3072], "image_size": 1536}
TOY_TOWER = {"num_stages": 5, "depths": [1] * 5, "hidden_sizes": [8, 8, 16, 16, 32], "image_size": 128}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
TOY_CLIP = {**CLIP, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY_CLIP |= {"image_size": 28}
# The width of timm's `fastvit_mci3`, and its arguments.
FAST_VIT = {"hidden_size": 3072, "model_args": {"inference_mode": True}}
TOY_FAST_VIT = {"layers": [1] * 5, "embed_dims": [32, 32, 32, 32, 64], **FAST_VIT["model_args"]}
TOY_FAST_VIT = {"hidden_size": 128, "model_args": TOY_FAST_VIT}
PICTURE = (2048, 1536)  # a photo, 4:3
QUESTION = "What does the picture show, and what is written on it?"
TERA = 1e12
LONG_TESTS = "flex or compile or fsdp2 or bytes"  # those that a CPU compiles or imports for longer than it runs them

Case = Callable[[], dict]


class Skip(Exception):
    """Why a case cannot run here."""


def skip(reason: Exception) -> dict:
    """A case that cannot run."""
    raise reason


def check_transformers(needed: str) -> None:
    """Skips a case where transformers is older than the package's floor; what it calls is not there."""
    found = version("transformers")
    numbers = [[int(number) for number in re.findall(r"\d+", text)[:2]] for text in (found, needed)]
    if numbers[0] < numbers[1]:
        raise Skip(f"transformers {found} is older than {needed}; carry the wheels that docs/gpu.md names")


def read_floor() -> str:
    """The oldest supported transformers, from setup.cfg."""
    return re.search(r"transformers>=([\d.]+)", (ROOT / "setup.cfg").read_text(encoding="utf-8"))[1]


def synchronize(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def time_calls(call: Callable, device: str, repeats: int) -> float:
    """Seconds of a call until the device has finished it, the median; one call before it is not counted."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_peak(call: Callable, device: str) -> tuple[object, float | None]:
    """What a call returns, and the most device memory in GiB while it ran; `None` without an accelerator."""
    import torch

    if torch.device(device).type != "cuda":
        return call(), None
    torch.cuda.reset_peak_memory_stats()
    result = call()
    return result, torch.cuda.max_memory_allocated() / 2**30


def measure_roof(options) -> dict:
    """The device's own rates: a large matrix multiplication, and a copy, which reads and writes every byte."""
    import torch

    side, count = (128, 2**16) if options.toy else (8192, 2**30)
    dtype = getattr(torch, options.dtype)
    factors = [torch.randn(side, side, device=options.device).to(dtype) for _ in range(2)]
    source = torch.zeros(count, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    matmul = time_calls(lambda: factors[0] @ factors[1], options.device, 10)
    copy = time_calls(lambda: target.copy_(source), options.device, 10)
    return {"matmul TFLOP/s": 2 * side**3 / matmul / TERA, "memory GB/s": 2 * count / copy / 1e9}


# ---- models with random weights


def build_text_config(size: str, options):
    """One shape of language model for all families."""
    from transformers import LlamaConfig

    width, mlp, layers, heads = TOY_SIZE if options.toy else SIZES[size]
    return LlamaConfig(
        vocab_size=512 if options.toy else VOCABULARY,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )


def build_model(make: Callable, options, dtype: str | None = None, attention: str = "sdpa"):
    """Makes a model on the device, in the dtype, without a copy of it elsewhere.

    Args:
        make: gives the model's class and configuration.
        options: `device` and `dtype`.
        dtype: instead of `options.dtype`.
        attention: the implementation to ask for.
    """
    import torch

    model_class, config = make()
    config._attn_implementation = attention
    torch.manual_seed(0)
    with torch.device(options.device):
        return model_class._from_config(config, dtype=getattr(torch, dtype or options.dtype)).eval()


def make_convllava(size: str, options):
    check_transformers(read_floor())
    from transformers import ConvNextConfig

    from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration

    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(**(TOY_TOWER if options.toy else TOWER)),
        text_config=build_text_config(size, options),
        image_token_id=4,
    )
    return ConvLlavaForConditionalGeneration, config


def list_grids(side: int) -> list[list[int]]:
    """The sizes that LLaVA-NeXT cuts into squares of `side` pixels."""
    return [[rows * side, columns * side] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def make_llava(size: str, options, following: bool = False):
    import transformers

    name = "LlavaNext" if following else "Llava"
    clip = TOY_CLIP if options.toy else CLIP
    settings = {"image_grid_pinpoints": list_grids(clip["image_size"])} if following else {}
    config = getattr(transformers, f"{name}Config")(
        vision_config=transformers.CLIPVisionConfig(**clip),
        text_config=build_text_config(size, options),
        image_token_index=4,
        **settings,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration"), config


def make_fast_vlm(size: str, options):
    import transformers

    if not hasattr(transformers, "FastVlmConfig"):
        raise Skip(f"transformers {version('transformers')} has no FastVLM")
    tower = transformers.TimmWrapperConfig(
        architecture="fastvit_mci3",
        do_pooling=True,
        global_pool="avg",
        **(TOY_FAST_VIT if options.toy else FAST_VIT),
    )
    config = transformers.FastVlmConfig(
        vision_config=tower, text_config=build_text_config(size, options), image_token_index=4
    )
    return transformers.FastVlmForConditionalGeneration, config


def build_tokenizer():
    """A tokenizer of bytes whose `<image>` has the id 4; no training and no files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "<unk>", "</s>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<image>"], **special)


def build_convllava_processor(side: int, native: bool = False, pillow: bool = False):
    from convllava_hf import ConvLlavaImageProcessor, ConvLlavaProcessor
    from convllava_hf.model.image_processing_convllava import ConvLlavaImageProcessorPil

    processor_class = ConvLlavaImageProcessorPil if pillow else ConvLlavaImageProcessor
    # In the detail of the padded picture, a photo of 4:3 needs three quarters of the square's tokens.
    settings = (
        {"image_aspect_ratio": "native", "max_image_tokens": max(1, (side // 64) ** 2 * 3 // 4)} if native else {}
    )
    image_processor = processor_class(size={"height": side, "width": side}, **settings)
    return ConvLlavaProcessor(image_processor, build_tokenizer())


def build_llava_processor(kind: str, side: int):
    """The processors of transformers' own models; every patch of the picture is one token of the language model."""
    import transformers

    square = {"height": side, "width": side}
    if kind == "llava_next":
        images = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=list_grids(side)
        )
        processor_class, settings = (
            transformers.LlavaNextProcessor,
            {"patch_size": 14, "num_additional_image_tokens": 1},
        )
    else:
        images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
        processor_class = transformers.LlavaProcessor
        settings = {"patch_size": 14, "num_additional_image_tokens": 1}
        if kind == "fast_vlm":
            settings = {"patch_size": 64, "num_additional_image_tokens": 0}
    strategy = "full" if kind == "fast_vlm" else "default"
    return processor_class(images, build_tokenizer(), vision_feature_select_strategy=strategy, **settings)


def make_picture(size: tuple[int, int], seed: int = 0):
    """Coarse noise, so that resizing has something to do."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


# ---- the parts


def list_correctness(options) -> dict[str, Case]:
    """One case per file of tests/gpu; at toy size one for all, without the long ones."""
    folder = ROOT / "tests" / "gpu"
    files = [folder] if options.toy else sorted(folder.glob("test_*.py"))
    return {file.stem: partial(run_tests, file, options) for file in files}


def run_tests(path: Path, options) -> dict:
    """Runs the tests that carry the mark, and counts them; names what failed and why others were skipped."""
    check_transformers(read_floor())
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed; carry the wheels that docs/gpu.md names")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(path), "-m", "gpu", "-q", "--junitxml", str(report)]
        command += ["-k", f"not ({LONG_TESTS})"] if options.toy else []
        environment = {**os.environ, "CONVLLAVA_HF_GPU_TESTS_DEVICE": options.device}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not report.is_file():
            raise RuntimeError(f"pytest did not run: {(result.stdout + result.stderr)[-1500:]}")
        tests = list(ElementTree.parse(report).iter("testcase"))
    failed = [test.get("name") for test in tests if test.find("failure") is not None or test.find("error") is not None]
    reasons = [test.find("skipped").get("message") for test in tests if test.find("skipped") is not None]
    return {
        "tests": len(tests),
        "passed": len(tests) - len(failed) - len(reasons),
        "failed": ", ".join(failed) or "none",
        "skipped": "; ".join(f"{reasons.count(reason)}: {reason}" for reason in dict.fromkeys(reasons)) or "none",
        "output": result.stdout[-3000:] if failed else "",
    }


def list_tower(options) -> dict[str, Case]:
    """Every way at every size; compiling comes last, because it takes longest."""
    check_transformers(read_floor())
    from transformers import ConvNextConfig

    from convllava_hf import ConvLlavaConfig

    config = ConvLlavaConfig(vision_config=ConvNextConfig(**(TOY_TOWER if options.toy else TOWER)))
    sides, batches = ((64, 128), (1, 2)) if options.toy else ((512, 768, 1024, 1536, 2048, 3072), (1, 4, 8, 32))
    towers: dict[str, object] = {}
    cases: dict[str, Case] = {"the device": partial(measure_roof, options)}
    for way in ("eager", "channels_last", "compiled"):
        for side in sides:
            for batch in batches if way != "compiled" else batches[:2] if options.toy else (1, 8):
                cases[f"{side}x{side}, batch {batch}, {way}"] = partial(
                    measure_tower, config, towers, side, batch, way, options
                )
    return cases


def count_tower(config, side: int, itemsize: int) -> tuple[int, int, int]:
    """Work of one picture, the bytes that its layers read and write, and the bytes of the weights."""
    import torch
    from vision import count_flops

    from convllava_hf.model.modeling_convllava import build_vision_tower

    with torch.device("meta"):
        tower = build_vision_tower(config)
    moved = 0

    def count(module, inputs, output):
        nonlocal moved
        moved += itemsize * (inputs[0].numel() + output.numel())

    leaves = [module for module in tower.modules() if not list(module.children()) and list(module.parameters())]
    flops = count_flops(tower, side, side)
    for module in leaves:
        module.register_forward_hook(count)
    tower(torch.empty(1, 3, side, side, device="meta"))
    return flops, moved, itemsize * sum(parameter.numel() for parameter in tower.parameters())


def measure_tower(config, towers: dict, side: int, batch: int, way: str, options) -> dict:
    """Seconds of one pass over random pictures, and how near it comes to what the device can do."""
    import torch

    from convllava_hf.model.modeling_convllava import build_vision_tower

    dtype = getattr(torch, options.dtype)
    if way not in towers:
        towers.clear()
        torch.manual_seed(0)
        with torch.device(options.device):
            tower = build_vision_tower(config).to(dtype).eval()
        if way == "compiled":
            tower = torch.compile(tower, dynamic=False, backend="eager" if options.toy else "inductor")
        towers[way] = tower.to(memory_format=torch.channels_last) if way == "channels_last" else tower
    if way == "compiled":
        torch._dynamo.reset()  # after 8 sizes of one model torch would run the others eagerly
    if "roof" not in options.found:
        options.found["roof"] = measure_roof(options)
    roof = options.found["roof"]
    layout = torch.channels_last if way == "channels_last" else torch.contiguous_format
    images = torch.randn(batch, 3, side, side, device=options.device).to(dtype).contiguous(memory_format=layout)
    flops, moved, weights = count_tower(config, side, dtype.itemsize)
    with torch.inference_mode():
        seconds, peak = measure_peak(
            lambda: time_calls(lambda: towers[way](images), options.device, options.repeats), options.device
        )
    by_work = batch * flops / (roof["matmul TFLOP/s"] * TERA)
    by_bytes = (batch * moved + weights) / (roof["memory GB/s"] * 1e9)
    return {
        "ms": seconds * 1e3,
        "pictures/s": batch / seconds,
        "TFLOP/s": batch * flops / seconds / TERA,
        "of matmul rate": by_work / seconds,
        "of memory rate": by_bytes / seconds,
        "bound by": "work" if by_work > by_bytes else "memory",
        "peak GiB": peak,
    }


def list_first_token(options) -> dict[str, Case]:
    """Families times sizes of the language model."""
    sides = (128,) if options.toy else (768, 1024, 1536)
    clip_side, largest = (TOY_CLIP if options.toy else CLIP)["image_size"], sides[-1]
    cases = {}
    for size in options.sizes:
        ours = partial(make_convllava, size, options)
        families = {
            f"ConvLLaVA {side} {way}": (ours, partial(build_convllava_processor, side, native=way == "native"))
            for side in sides
            for way in ("pad", "native")
        }
        families |= {
            "LLaVA-1.5": (partial(make_llava, size, options), partial(build_llava_processor, "llava", clip_side)),
            "LLaVA-NeXT": (
                partial(make_llava, size, options, following=True),
                partial(build_llava_processor, "llava_next", clip_side),
            ),
            "FastVLM": (
                partial(make_fast_vlm, size, options),
                partial(build_llava_processor, "fast_vlm", 128 if options.toy else 1024),
            ),
        }
        for name, (make, build) in families.items():
            cases[f"{name}, {size}"] = partial(measure_answer, make, build, options)
        batched = partial(build_convllava_processor, largest)
        cases[f"ConvLLaVA {largest} pad, {size}, 8 at once"] = partial(measure_answer, ours, batched, options, 8)
        original = partial(build_convllava_processor, largest, pillow=True)
        cases[f"ConvLLaVA {largest} pad, {size}, as the original runs"] = partial(
            measure_answer, ours, original, options, 1, "float16", "eager"
        )
    return cases


def measure_answer(make, build, options, batch: int = 1, dtype: str | None = None, attention: str = "sdpa") -> dict:
    """Seconds from pictures to the first tokens, preparation included, and tokens per second after them."""
    import torch

    if dtype == "float16" and torch.device(options.device).type == "cpu":
        dtype = options.dtype  # half precision has no convolutions on some CPUs
    model, processor = build_model(make, options, dtype, attention), build()
    size = (160, 120) if options.toy else PICTURE
    pictures = [make_picture(size, seed) for seed in range(batch)]
    new_tokens = 4 if options.toy else 65

    def prepare():
        inputs = processor(
            images=pictures, text=[f"<image>\n{QUESTION}"] * batch, return_tensors="pt", padding=True
        ).to(options.device)
        return {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def answer(tokens: int):
        return model.generate(**prepare(), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    def measure():
        times = (time_calls(partial(answer, tokens), options.device, options.repeats) for tokens in (1, new_tokens))
        return time_calls(prepare, options.device, options.repeats), *times

    with torch.inference_mode():
        (preparing, first, whole), peak = measure_peak(measure, options.device)
        prompt = prepare()["input_ids"]
    return {
        "image tokens": int((prompt[0] == 4).sum()),
        "prompt tokens": prompt.shape[1],
        "prepare ms": preparing * 1e3,
        "first token ms": first * 1e3,
        "tokens/s": batch * (new_tokens - 1) / max(whole - first, 1e-9),
        "answers of 64 tokens/s": batch / (first + 64 * max(whole - first, 1e-9) / (new_tokens - 1)),
        "peak GiB": peak,
    }


def list_training(options) -> dict[str, Case]:
    """The three stages, as many rows per step as fit."""
    rows = (1,) if options.toy else (1, 4, 16)
    return {
        f"stage {stage}, {size}, {count} rows": partial(measure_training, stage, size, count, options)
        for size in options.sizes
        for stage in (1, 2, 3)
        for count in rows
    }


def measure_training(stage: int, size: str, rows: int, options) -> dict:
    """Seconds of a step (forward, backward with recomputation, AdamW) on rows of one image and 512 tokens of text."""
    check_transformers(read_floor())
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from convllava_hf.model.modeling_convllava import set_trainable
    from convllava_hf.training.plans import get_trainable

    side, text = (128, 8) if options.toy else (1536, 512)
    if "roof" not in options.found:
        options.found["roof"] = measure_roof(options)
    model = build_model(partial(make_convllava, size, options), options).train()
    model.config.use_cache = False
    set_trainable(model, get_trainable(model.config, stage))
    count = model.config.num_image_tokens(side, side)
    ids = torch.randint(5, 200, (rows, text), device=options.device)
    ids = torch.cat([torch.full((rows, count), 4, device=options.device), ids], dim=1)
    labels = ids.masked_fill(ids == 4, -100)
    pixels = torch.randn(rows, 3, side, side, device=options.device).to(model.dtype)

    def run(number: int):
        batch = {"input_ids": ids[:number], "pixel_values": pixels[:number], "labels": labels[:number]}
        model(**batch, use_cache=False).loss.backward()

    with FlopCounterMode(display=False) as counter:  # one row and no recomputation: this is the work that is needed
        run(1)
    flops = rows * counter.get_total_flops()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=torch.device(options.device).type == "cuda")

    def step():
        run(rows)
        optimizer.step()
        optimizer.zero_grad()

    seconds, peak = measure_peak(lambda: time_calls(step, options.device, options.repeats), options.device)
    return {
        "steps/s": 1 / seconds,
        "rows/s": rows / seconds,
        "tokens/s": ids.numel() / seconds,
        "TFLOP per step": flops / TERA,
        "MFU, of matmul rate": flops / seconds / TERA / options.found["roof"]["matmul TFLOP/s"],
        "trained, millions": sum(parameter.numel() for parameter in trained) / 1e6,
        "peak GiB": peak,
    }


def list_serving(options) -> dict[str, Case]:
    """Clients times pictures that are new or known."""
    clients = (2,) if options.toy else (1, 8, 32)
    return {
        f"{size}, {count} clients": partial(measure_serving, size, count, options)
        for size in options.sizes
        for count in clients
    }


def measure_serving(size: str, clients: int, options) -> dict:
    """Chats per second through the engine: each client asks about a new picture, then again about the same one."""
    check_transformers(read_floor())
    from convllava_hf.serving.engine import Engine, Job, Settings
    from convllava_hf.serving.prompts import ImageInput, Prompt

    side, tokens, turns = (128, 3, 2) if options.toy else (1536, 64, 4)
    model, processor = build_model(partial(make_convllava, size, options), options), build_convllava_processor(side)
    model.generation_config.eos_token_id = None  # random weights end anywhere; every answer has the same length
    known: dict[int, object] = {}

    def prepare(number: int) -> Prompt:
        ids, features = known[number]["input_ids"][0], engine.cache.get(str(number))
        pixels = known[number]["pixel_values"] if features is None else None
        return Prompt(ids, [ImageInput(str(number), int((ids == 4).sum()), pixels, features)])

    for number in range(clients * turns + 1):
        picture = make_picture((160, 120) if options.toy else PICTURE, number)
        known[number] = processor(images=[picture], text=[f"<image>\n{QUESTION}"], return_tensors="pt")
    engine = Engine(model, processor, max_batch=clients, max_queue=4 * clients + 4, cache_bytes=2**32)
    firsts, errors = [], []

    def ask(number: int) -> None:
        done, started, first = threading.Event(), time.perf_counter(), []

        def deliver(event) -> None:
            if event.error:
                errors.append(event.error)
            if event.new_tokens and not first:
                first.append(time.perf_counter() - started)
            if event.finish_reason or event.error:
                done.set()

        with engine.expect_chat():
            engine.submit(Job(prepare(number), Settings(max_new_tokens=tokens), deliver))
        done.wait()
        firsts.extend(first)

    def run_round(number: int) -> float:
        def work(client: int) -> None:
            for turn in range(turns):
                ask(client * turns + turn + 1)

        threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
        firsts.clear()
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started

    result = {}
    try:
        ask(0)
        for number, kind in enumerate(("new pictures", "known pictures")):
            seconds, peak = measure_peak(partial(run_round, number), options.device)
            if errors:
                raise errors[0]
            result |= {
                f"{kind}, chats/s": clients * turns / seconds,
                f"{kind}, tokens/s": clients * turns * tokens / seconds,
                f"{kind}, first token p50 ms": statistics.median(firsts) * 1e3 if firsts else None,
                f"{kind}, peak GiB": peak,
            }
        result["known pictures, from the cache"] = engine.cache.hits / (clients * turns)
    finally:
        engine.close()
    return result


PARTS = {
    "correctness": list_correctness,
    "tower": list_tower,
    "first_token": list_first_token,
    "training": list_training,
    "serving": list_serving,
}


# ---- running and writing


def load_results(options) -> dict:
    """What an earlier run left, or an empty start; results of another machine or size are refused."""
    machine = describe_machine(1)
    identity = {"accelerator": machine["accelerator"], "device": options.device, "toy": options.toy}
    results = {"identity": identity, "machine": machine, "parts": {}}
    file = options.output / "results.json"
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier["identity"] != identity:
            sys.exit(f"{file} is from {earlier['identity']}, this run is {identity}; name another folder with --output")
        results = earlier
    return results


def write_results(results: dict, folder: Path) -> None:
    """Writes the JSON, and the page from it; both are whole at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "results.json.part"
    part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "results.json")
    with (folder / "results.md").open("w", encoding="utf-8") as page, redirect_stdout(page):
        toy = " (toy sizes: the numbers mean nothing)" if results["identity"]["toy"] else ""
        print(f"# On {results['machine']['accelerator']}, device {results['identity']['device']}{toy}")
        for name, cases in results["parts"].items():
            measured = {case: values for case, values in cases.items() if not {"skipped!", "error!"} & values.keys()}
            shared = {}
            for case, values in measured.items():
                shared.setdefault(tuple(values), []).append((case, values))
            for number, entries in enumerate(shared.values()):
                columns = [key for key in entries[0][1] if key != "output"]
                rows = [{"case": case, **{key: show(values[key]) for key in columns}} for case, values in entries]
                print_table(name if not number else f"{name}, {number + 1}", rows)
            others = {case: values for case, values in cases.items() if case not in measured}
            if others:
                rows = [
                    {"case": case, "why": " ".join(next(iter(values.values())).split()).replace("|", "/")[:300]}
                    for case, values in others.items()
                ]
                print_table(f"{name}: not measured", rows)
        print_machine(results["machine"])


def show(value) -> str:
    """A number with three digits, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else " ".join(str(value).split()).replace("|", "/")


def run_case(case: Case, device: str) -> dict:
    """A case's values, or under `skipped!` or `error!` why there are none."""
    import torch

    try:
        return case()
    except Skip as reason:
        return {"skipped!": str(reason)}
    except ImportError as error:
        return {"skipped!": f"not installed, or too old: {error}"}
    except torch.cuda.OutOfMemoryError as error:
        return {"skipped!": f"out of memory: {error}"}
    except Exception as error:  # the other cases are still worth their time
        return {"error!": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def run_part(name: str, options) -> None:
    """Runs the cases of a part that have no result yet, in this process; before each its name is written down."""
    results = load_results(options)
    options.found = {}
    done = results["parts"].setdefault(name, {})
    try:
        cases = PARTS[name](options)
    except (Skip, ImportError) as reason:
        cases = {"all": partial(skip, reason)}
    for case, call in cases.items():
        if case in done:
            continue
        show_progress(f"{name}: {case}")
        (options.output / "running").write_text(case, encoding="utf-8")
        done[case] = run_case(call, options.device)
        write_results(results, options.output)
    (options.output / "running").unlink(missing_ok=True)


def supervise_part(name: str, options) -> None:
    """Runs a part in a process of its own, and writes down which case it was when that process did not end well."""
    command = [sys.executable, __file__, "--in-process", name, "--device", options.device, "--dtype", options.dtype]
    command += ["--output", str(options.output), "--repeats", str(options.repeats), "--sizes", *options.sizes]
    started = time.monotonic()
    while (left := options.seconds - (time.monotonic() - started)) > 0:
        process = subprocess.Popen(command + ["--toy"] * options.toy)
        try:
            code, why = process.wait(left), None
        except subprocess.TimeoutExpired:
            process.kill()
            code, why = process.wait(), f"the part's {options.seconds} seconds were over after this case had "
        running = options.output / "running"
        if code == 0 or not running.is_file():
            return
        case, begun = running.read_text(encoding="utf-8"), running.stat().st_mtime
        running.unlink()
        took = time.time() - begun
        # A case that had little of the time gets another chance in the next run.
        if why is None or took > options.seconds / 2:
            results = load_results(options)
            reason = f"{why}{took:.0f} s" if why else f"its process ended with status {code}"
            results["parts"].setdefault(name, {})[case] = {"error!": reason}
            write_results(results, options.output)
        if why:
            return


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", nargs="+", choices=PARTS, default=[], help="forget what these parts have measured")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1B", "7B"], help="of the language model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="most time of a part in one run")
    parser.add_argument("--output", type=Path, default=Path("build/gpu"), help="folder of results.json and results.md")
    parser.add_argument("--toy", action="store_true", help="tiny models and pictures")
    parser.add_argument("--in-process", choices=PARTS, help="run this part here, with no limit on its time")
    options = parser.parse_args(arguments)

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device was found; --device cpu --toy runs every part at a size that says nothing")
    if options.toy:
        options.sizes = options.sizes[:1]
    results = load_results(options)
    for name in options.again:
        results["parts"].pop(name, None)
    write_results(results, options.output)
    if options.in_process:
        run_part(options.in_process, options)
        return
    for name in options.parts:
        supervise_part(name, options)
    print((options.output / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
