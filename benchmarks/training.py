"""What training costs: our trainer and model against stock TRL and stock transformers blocks, in one run.

- Saved activations: what the backward pass of the tower keeps, counted on meta tensors, so every size costs nothing.
  The peer is the same tower with transformers' own blocks, which cannot recompute their activations.
- Gradients with and without recomputation are compared on a small tower, bit by bit.
- Batches: rows per second, and the share of tokens that are padding, for random batches of `SFTTrainer` and for ours,
  on rows with 7% text only and lengths as in LLaVA's instructions (log-normal), images padded to squares or native.
- Without padding: the same rows joined to one per batch. With flash attention where that is installed, else with eager
  attention, whose block-diagonal mask covers all tokens of the batch.
- Evaluation: seconds of the loss, and of answering questions (`eval_generate`), beside those of training steps.
- Memory: what `convllava plan --memory` plays against what the allocator was asked for in a real step.
- Cache: stage 3 with the features of the frozen tower from the disk, the first time and later, against images.
- Workers: time to prepare a batch against the time of its step, as floats and as bytes.
- Masks: marking the tokens of answers in a batch, by transformers' own loop and by what takes its place.

    python benchmarks/training.py                                  # a CPU: a small model, a few minutes
    python benchmarks/training.py --text 1B --device cuda          # a GPU: random weights in the shape of a 1B model
"""

import argparse
import copy
import io
import itertools
import os
import random
import statistics
import tempfile
import time
from functools import partial
from importlib.resources import files
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin: busy machines slow down by that
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from machine import describe_machine, print_machine, print_table, show_progress, write_json
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import ConvNextConfig, LlamaConfig, PreTrainedTokenizerFast, PrinterCallback, ProgressCallback
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_flash_attn_2_available
from trl import SFTTrainer

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaImageProcessor, ConvLlavaProcessor
from convllava_hf.model.modeling_convllava import CHECKPOINTED_BLOCKS, ConvLlavaModel, set_trainable
from convllava_hf.training.arguments import ConvLlavaTrainingArguments
from convllava_hf.training.masks import mark_answers
from convllava_hf.training.memory import play_step, run_step
from convllava_hf.training.plans import get_trainable
from convllava_hf.training.trainer import ConvLlavaTrainer


ACTIVATIONS = "Activations that the released tower keeps for the backward pass, float32"
MEBIBYTE = 2**20
TEXT_SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TINY_VISION = {"depths": [1, 1, 2, 1, 1], "hidden_sizes": [16, 32, 64, 96, 128]}
RELEASED_VISION = {"depths": [3, 3, 27, 3, 6], "hidden_sizes": [192, 384, 768, 1536, 3072]}
TEXT_ONLY = 0.07


def make_stock(tower: torch.nn.Module) -> torch.nn.Module:
    """Gives a tower the blocks of transformers again, which keep all their activations."""
    stock_of = {ours: stock for stock, ours in CHECKPOINTED_BLOCKS.items()}
    for module in tower.modules():
        module.__class__ = stock_of.get(type(module), type(module))
    return tower


def count_saved_bytes(tower: torch.nn.Module, side: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without weights and the input."""
    images = torch.empty(1, 3, side, side, device="meta")
    known = {parameter.untyped_storage()._cdata for parameter in tower.parameters()} | {images.untyped_storage()._cdata}
    kept, total = [], 0

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(tensor)  # a storage that is gone would lend its address to the next
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tower(images)
    return total


def measure_activations(sides: list[int], plan: str) -> list[dict]:
    """Rows of the table of saved activations, for the released tower."""
    rows = []
    for side in sides:
        config = ConvLlavaConfig(
            vision_config=ConvNextConfig(num_stages=5, **RELEASED_VISION), text_config=LlamaConfig(vocab_size=32064)
        )
        saved = {}
        for name in ("stock", "ours"):
            with torch.device("meta"):
                model = ConvLlavaModel(config).train()
            tower = model.vision_tower
            model.gradient_checkpointing_enable() if name == "ours" else make_stock(tower)
            if plan == "stage 2":
                for parameter_name, parameter in tower.named_parameters():
                    parameter.requires_grad_("stages.2." in parameter_name or "stages.3." in parameter_name
                                             or "stages.4." in parameter_name)  # fmt: skip
            saved[name] = count_saved_bytes(tower, side)
        rows.append(
            {
                "trained": plan,
                "pixels": f"{side}x{side}",
                "stock, MiB": f"{saved['stock'] / MEBIBYTE:.0f}",
                "ours, MiB": f"{saved['ours'] / MEBIBYTE:.0f}",
                "ours, of stock": f"1/{saved['stock'] / saved['ours']:.1f}",
            }
        )
    return rows


def compare_gradients(side: int = 256) -> float:
    """Largest difference between gradients with and without recomputation, on a small tower."""
    torch.manual_seed(0)
    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(num_stages=5, layer_scale_init_value=1.0, **TINY_VISION),
        text_config=LlamaConfig(vocab_size=32064, **TEXT_SHAPES["tiny"]),
    )
    model, images, gradients = ConvLlavaModel(config).train(), torch.randn(2, 3, side, side), []
    tower = model.vision_tower
    for recompute in (False, True):
        model.gradient_checkpointing_enable() if recompute else model.gradient_checkpointing_disable()
        tower.zero_grad()
        tower(images).last_hidden_state.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in tower.parameters()])
    return max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))


def build_parts(
    options: argparse.Namespace, aspect: str
) -> tuple[ConvLlavaForConditionalGeneration, ConvLlavaProcessor]:
    """A model with random weights, and a processor whose tokens are bytes."""
    specials = ["<pad>", "<image>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<image>", "<|im_start|>"],
        padding_side="left",
    )
    torch.manual_seed(0)
    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(num_stages=5, **(TINY_VISION if options.text == "tiny" else RELEASED_VISION)),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=4096, pad_token_id=0, **TEXT_SHAPES[options.text]
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.device(options.device):
        model = ConvLlavaForConditionalGeneration(config)
    template = files("convllava_hf").joinpath("chat_templates/chatml.jinja").read_text(encoding="utf-8")
    size = {"height": options.side, "width": options.side}
    image_processor = ConvLlavaImageProcessor(size=size, image_aspect_ratio=aspect, max_upscale=1.0)
    return model, ConvLlavaProcessor(image_processor, tokenizer, chat_template=template)


def make_rows(count: int, side: int) -> Dataset:
    """Rows of one image and some turns: 7% without image, photographs of common shapes, log-normal lengths."""
    rng, pictures = random.Random(0), []
    noise = np.random.default_rng(0)
    for width, height in ((4, 3), (3, 4), (16, 9), (1, 1), (3, 2), (2, 3)):
        long = side * 4 // 3
        size = (long * width // max(width, height), long * height // max(width, height))
        file = io.BytesIO()
        blocks = noise.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        PILImage.fromarray(blocks).resize(size, PILImage.BICUBIC).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    messages, images = [], []
    for number in range(count):
        characters = min(1500, int(rng.lognormvariate(5.0, 0.8)))
        messages.append(
            [
                {"role": "user", "content": "q" * (characters // 3)},
                {"role": "assistant", "content": "a" * (characters - characters // 3)},
            ]
        )
        # What follows the end of a JPEG is not decoded, and makes it another file: caches tell files by their hash.
        picture = {"bytes": rng.choice(pictures) + number.to_bytes(4, "big"), "path": None}
        images.append([] if rng.random() < TEXT_ONLY else [picture])
    features = Features({"messages": [{"role": Value("string"), "content": Value("string")}], "images": List(Image())})
    return Dataset.from_dict({"messages": messages, "images": images}, features=features)


def build_trainer(
    options, variant: str, rows: Dataset, folder: str, stage: int = 2, eval_dataset: Dataset | None = None, **changes
):
    """A trainer: "stock" is TRL's with transformers' blocks, "ours" ours; both train what the stage trains."""
    model, processor = build_parts(options, changes.pop("aspect", "pad"))
    set_trainable(model, get_trainable(model.config, stage))
    if variant == "stock":
        make_stock(model.model.vision_tower)
    arguments = ConvLlavaTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        learning_rate=1e-4,
        max_length=None,
        assistant_only_loss=True,
        use_cpu=options.device == "cpu",
        bf16=options.device != "cpu",
        logging_steps=10**9,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    cls = SFTTrainer if variant == "stock" else ConvLlavaTrainer
    trainer = cls(
        model=model, processing_class=processor, train_dataset=rows, eval_dataset=eval_dataset, args=arguments
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return trainer


def measure_training(options, rows: Dataset) -> list[dict]:
    """Rows of the table of training: the same number of steps for every variant, by turns."""
    variants = {
        "stock TRL, stock blocks, random batches": ("stock", {}),
        "ours, random batches": ("ours", {"group_by_modality_length": False}),
        "ours, grouped": ("ours", {}),
        "ours, grouped, native": ("ours", {"aspect": "native"}),
        "ours, grouped, native, workers": ("ours", {"aspect": "native", "dataloader_num_workers": options.workers}),
    }
    measured = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats + 1):
            for name, (variant, changes) in variants.items():
                show_progress(f"{name}: round {turn} of {options.repeats}")
                trainer = build_trainer(options, variant, rows, folder, **copy.deepcopy(changes))
                padding, tokens = 0, 0
                if options.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - start
                peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
                if turn:
                    for step, batch in enumerate(trainer.get_train_dataloader()):
                        if step == options.steps:
                            break
                        tokens += batch["attention_mask"].numel()
                        padding += (batch["attention_mask"] == 0).sum().item()
                    measured[name].append((seconds, padding / tokens, tokens / options.steps, peak))
    rows_out, base = [], None
    for name, values in measured.items():
        seconds = statistics.median(value[0] for value in values)
        rate = options.steps * options.batch / seconds
        base = base or rate
        _, padding, tokens, peak = values[0]
        row = {
            "variant": name,
            "rows/s": f"{rate:.2f}",
            "of stock": f"{rate / base:.2f}",
            "padding": f"{padding:.1%}",
            "tokens per step": f"{tokens:.0f}",
        }
        rows_out.append(row if peak is None else {**row, "peak, GB": f"{peak / 1e9:.2f}"})
    return rows_out


def measure_joined(options, rows: Dataset) -> list[dict]:
    """Rows of the table of batches without padding: the same steps with padded and with joined rows, by turns."""
    attention = "flash_attention_2" if is_flash_attn_2_available() else "eager"
    variants = {(order, kind): [] for order in ("random batches", "grouped") for kind in ("padded", "without padding")}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats + 1):
            for (order, kind), values in variants.items():
                show_progress(f"{order}, {kind}: round {turn} of {options.repeats}")
                grouped = order == "grouped"
                trainer = build_trainer(options, "ours", rows, folder, group_by_modality_length=grouped)
                trainer.model.set_attn_implementation(attention)
                trainer.data_collator.padding_free = kind == "without padding"
                start = time.perf_counter()
                trainer.train()
                if turn:
                    values.append(time.perf_counter() - start)
            if turn == 0:
                shapes = {
                    order: measure_lengths_of_batches(options, rows, folder, grouped=order == "grouped")
                    for order in ("random batches", "grouped")
                }
    table, base = [], None
    for (order, kind), values in variants.items():
        seconds = statistics.median(values)
        base = base or seconds
        tokens, places, pairs, joined_pairs = shapes[order]
        is_joined = kind == "without padding"
        table.append(
            {
                "batches": f"{order}, {kind}",
                "attention": attention,
                "rows/s": f"{options.steps * options.batch / seconds:.2f}",
                "of the first": f"{base / seconds:.2f}",
                "tokens per step": f"{(tokens if is_joined else places) / options.steps:.0f}",
                "padding": f"{0 if is_joined else 1 - tokens / places:.1%}",
                "cells of masks per step": f"{(joined_pairs if is_joined else pairs) / options.steps:.2e}",
            }
        )
    return table


def measure_lengths_of_batches(options, rows: Dataset, folder: str, grouped: bool) -> tuple[int, int, int, int]:
    """Tokens, places of the padded batches, and cells of the masks of padded and of joined rows, over all steps."""
    trainer = build_trainer(options, "ours", rows, folder, group_by_modality_length=grouped)
    tokens = places = pairs = joined_pairs = 0
    for step, batch in enumerate(trainer.get_train_dataloader()):
        if step == options.steps:
            break
        count, length = batch["attention_mask"].shape
        inside = batch["attention_mask"].sum().item()
        tokens, places = tokens + inside, places + count * length
        pairs, joined_pairs = pairs + count * length**2, joined_pairs + inside**2
    return tokens, places, pairs, joined_pairs


def measure_evaluation(options, rows: Dataset) -> list[dict]:
    """Rows of the table of evaluation: seconds for the loss of 8 batches, alone and with answers."""
    held_out = rows.select(range(8 * options.batch))
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for answers in (0, 8, 32):
            show_progress(f"evaluation, {answers} answers")
            changes = {"eval_strategy": "steps", "eval_generate": answers, "per_device_eval_batch_size": options.batch}
            trainer = build_trainer(options, "ours", rows, folder, eval_dataset=held_out, **changes)
            start = time.perf_counter()
            trainer.train()
            step = (time.perf_counter() - start) / options.steps
            times = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                trainer.evaluate()
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times)
            table.append(
                {
                    "answers": answers,
                    "s": f"{seconds:.2f}",
                    "training steps in that time": f"{seconds / step:.1f}",
                    "of a run that evaluates every 200 steps": f"{seconds / (seconds + 200 * step):.1%}",
                }
            )
    return table


def measure_memory(options) -> list[dict]:
    """Rows of the table of memory: a played step against a real one, in float32 on one process, per stage."""
    table = []
    for stage in (1, 2, 3):
        for recompute in (True, False):
            show_progress(f"memory, stage {stage}")
            model, _ = build_parts(options, "pad")
            patterns = get_trainable(model.config, stage)
            tokens, count = 512, options.batch
            settings = {"rows": count, "tokens": tokens, "image_size": options.side}
            played = play_step(model.config, patterns, **settings, bf16=False, recompute=recompute)
            set_trainable(model.train(), patterns)
            model.gradient_checkpointing_enable() if recompute else model.gradient_checkpointing_disable()
            optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
            run_step(model, torch.rand(count, 3, options.side, options.side, device=options.device), tokens)
            optimizer.step()
            states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
            held = [
                *model.parameters(),
                *(weight.grad for weight in model.parameters() if weight.requires_grad),
                *states,
            ]
            held = sum(tensor.nbytes for tensor in held)
            activations = measure_peak(model, options, tokens)
            row = {"stage": stage, "recomputed": "yes" if recompute else "no"}
            row["weights, gradients, moments: plan, MiB"] = f"{(played.total - played.activations) / MEBIBYTE:.2f}"
            row["real, MiB"] = f"{held / MEBIBYTE:.2f}"
            row["activations: plan, MiB"] = f"{played.activations / MEBIBYTE:.1f}"
            row["real at the peak, MiB"] = f"{activations / MEBIBYTE:.1f}"
            row["plan of real"] = f"{played.activations / activations:.3f}"
            table.append(row)
    return table


def measure_peak(model, options, tokens: int) -> int:
    """The most bytes that a step takes beside what is there before it."""
    shape = (options.batch, 3, options.side, options.side)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_step(model, torch.rand(shape, device="cuda"), tokens)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_step(model, torch.rand(shape), tokens)
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


def measure_cache(options) -> list[dict]:
    """Rows of the table of the cache: an epoch of stage 3, with the seconds that filling and reading the cache take.

    Images have four times the side of the other measurements: towers are small where the model is.
    """
    options = argparse.Namespace(**{**vars(options), "side": 4 * options.side})
    rows = make_rows(options.steps * options.batch, options.side)
    measured = {"images": [], "features, first run": [], "features, later run": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats + 1):
            cache = str(Path(folder) / str(turn))
            for name, values in measured.items():
                show_progress(f"cache, {name}: round {turn} of {options.repeats}")
                start = time.perf_counter()
                changes = {} if name == "images" else {"vision_cache": cache}
                build_trainer(options, "ours", rows, folder, stage=3, **changes).train()
                if turn:
                    values.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in Path(cache).rglob("*.safetensors"))
    undecoded = rows.cast_column("images", List(Image(decode=False)))
    images = sum(map(len, undecoded["images"]))
    table, base = [], None
    for name, values in measured.items():
        seconds = statistics.median(values)
        base = base or seconds
        table.append(
            {
                "stage 3 from": name,
                "s": f"{seconds:.1f}",
                "of images": f"{seconds / base:.2f}",
                "on disk, KiB per image": "" if name == "images" else f"{size / images / 1024:.1f}",
            }
        )
    return table


def measure_collator(options, rows: Dataset) -> list[dict]:
    """Rows of the table of the collator: preparing one batch in one process against one training step."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in (("floats", {"normalize_on_device": False}), ("bytes", {})):
            show_progress(f"collator, {name}")
            trainer = build_trainer(options, "ours", rows, folder, **changes)
            examples = [[rows[i + j] for j in range(options.batch)] for i in range(0, 4 * options.batch, options.batch)]
            times = []
            for batch in examples + examples:
                start = time.perf_counter()
                prepared = trainer.data_collator([dict(row) for row in batch])
                times.append(time.perf_counter() - start)
            prepare = statistics.median(times)
            trainer.create_optimizer()
            trainer.current_gradient_accumulation_steps = 1
            steps = []
            for _ in range(4):
                inputs = copy.deepcopy(dict(prepared))
                start = time.perf_counter()
                trainer.training_step(trainer.model, inputs)
                if options.device == "cuda":
                    torch.cuda.synchronize()
                steps.append(time.perf_counter() - start)
            step = statistics.median(steps)
            size = sum(value.nbytes for value in prepared.values() if isinstance(value, torch.Tensor))
            table.append(
                {
                    "images as": name,
                    "batch, MiB": f"{size / MEBIBYTE:.2f}",
                    "prepare, ms": f"{prepare * 1e3:.1f}",
                    "step, ms": f"{step * 1e3:.1f}",
                    "share": f"{prepare / (prepare + step):.1%}",
                    "workers to hide it": f"{prepare / step:.2f}",
                }
            )
    return table


def measure_masks(rows: int = 16, tokens: int = 2048) -> list[dict]:
    """Rows of the table of masks: conversations of more and more rounds, all of one length."""
    places = torch.arange(tokens)[:, None] * 4 + torch.tensor([0, 4])  # (S, 2), as a processor hands them over
    table = []
    for rounds in (1, 5, 20):
        width = 4 * tokens // (2 * rounds)
        answers = [[(start, start + width) for start in range(width, 4 * tokens, 2 * width)]] * rows
        seconds, marked = [], []
        for mark in (partial(ProcessorMixin._adjust_assistant_masks_indices, None), mark_answers):
            encoded = {"input_ids": [[0] * tokens] * rows, "offset_mapping": [places] * rows}
            start = time.perf_counter()
            marked.append(mark(encoded, answers)["assistant_masks"])
            seconds.append(time.perf_counter() - start)
        assert marked[0] == marked[1]
        names = ("transformers, ms", "ours, ms")
        table.append({"rounds": rounds, **{name: f"{1e3 * s:.1f}" for name, s in zip(names, seconds, strict=True)}})
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--text", default="tiny", choices=list(TEXT_SHAPES), help="shape of the language model (tiny)")
    parser.add_argument("--side", type=int, default=256, help="side of the square images in training, pixels (256)")
    parser.add_argument("--sides", nargs="*", type=int, default=[512, 768, 1024, 1536], help="of the saved activations")
    parser.add_argument("--batch", type=int, default=8, help="rows per step (8)")
    parser.add_argument("--steps", type=int, default=20, help="steps per measurement (20)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds after one to warm up (3)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the last variant (1)")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="PART",
        choices=["activations", "collator", "batches", "without", "evaluation", "memory", "cache", "masks"],
        help="parts to measure; default: all",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables to this file")
    options = parser.parse_args(arguments)

    machine = describe_machine(torch.get_num_threads())
    rows = make_rows(max(8, options.steps) * options.batch, options.side)
    parts = {
        ACTIVATIONS: lambda: measure_activations(options.sides, "all") + measure_activations(options.sides, "stage 2"),
        "Collator": lambda: measure_collator(options, rows),
        "Batches": lambda: measure_training(options, rows),
        "Without padding": lambda: measure_joined(options, rows),
        "Evaluation": lambda: measure_evaluation(options, rows),
        "Memory": lambda: measure_memory(options),
        "Cache": lambda: measure_cache(options),
        "Masks (16 rows of 2048 tokens)": measure_masks,
    }
    results = {}
    print("# Training")
    for title, measure in parts.items():
        if title.split()[0].lower() in options.only or not options.only:
            results[title] = measure()
            show_progress("")
            print_table(title, results[title])
    if not options.only or "activations" in options.only:
        results["gradients"] = compare_gradients()
        print(f"\nLargest difference between gradients with and without recomputation: {results['gradients']}")
    print_machine(machine)
    write_json(options.json, {"machine": machine, **results})


if __name__ == "__main__":
    main()
