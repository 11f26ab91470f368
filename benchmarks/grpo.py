"""What GRPO gains with a reward that can be verified: questions of the quickstart whose answers are known.

The recipe `convllava_grpo` trains the quickstart's checkpoint through the code of `trl grpo`, on new pages, with the
reward of the recipe: 1 for the right answer, else 0. Before and after, questions about held-out pages are answered with
the most likely token ("greedy") and by sampling at temperature 1 ("sampled"), which is what GRPO improves directly.
Questions of the other tasks show what is forgotten. The learning rate was chosen on validation pages, in short runs.

- "count": the quickstart's counting questions, about pages of shapes. It was trained on them.
- "count among digits": the same question about pages of shapes and digits, of which it only learned descriptions.

    python benchmarks/grpo.py --model quickstart/checkpoint
"""

import argparse
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))

import torch
from datasets import Dataset, Features, Image, List, Value
from machine import describe_machine, print_machine, print_table, show_progress, write_json
from pages import ask, make_pages
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.scripts import grpo

from convllava_hf.conversion.parts import merge_adapter
from convllava_hf.registration import register
from convllava_hf.shipped import find_file


KIND_OF = {"number": "number", "digit": "digit", "shape": "shape", "colour": "shape", "position": "shape"}
TASKS = {"count": "count", "count among digits": "mixed"}  # kinds of their pages
QUICKSTART_SEED = 0  # of the checkpoint's own pages: the same scans are held out here
SAMPLES = 4  # answers to each question at temperature 1
BATCH = 64


def make_questions(split: str, task: str, count: int) -> list[tuple]:
    """Page, question and answer. Pages with shapes and digits have one question, which the quickstart never asks."""
    kind = TASKS.get(task) or KIND_OF[task]
    questions = []
    for page in make_pages(split, 2 * count, QUICKSTART_SEED, kinds=(kind,)):
        shapes = sum(thing is not None and not thing.is_digit for thing in page.things)
        if kind != "mixed":
            questions.append((page, *ask(page, task, random.Random(page.style))))
        elif shapes:
            questions.append((page, "How many shapes are there?", str(shapes)))
    return questions[:count]


def save_questions(questions: list[tuple], folder: Path) -> Path:
    """Writes them in the form that `trl grpo` takes."""
    folder.mkdir()
    part = {"type": Value("string"), "text": Value("string")}
    prompt = List({"role": Value("string"), "content": List(part)})
    features = Features({"prompt": prompt, "images": List(Image()), "solution": Value("string")})
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            "images": [{"bytes": page.jpeg, "path": None}],
            "solution": answer,
        }
        for page, question, answer in questions
    ]
    Dataset.from_list(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


@torch.no_grad()
def score(checkpoint: Path, questions: list[tuple], samples: int, seed: int) -> float:
    """Share of right answers: greedy for `samples` 0, else of so many sampled answers to each question."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    torch.manual_seed(seed)
    settings = {"do_sample": samples > 0, "temperature": 1.0 if samples else None, "top_k": 0 if samples else None}
    right = 0
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": page.image}, {"type": "text", "text": question}]}]
            for page, question, _ in batch
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=12, num_return_sequences=samples or 1, **settings)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [answer for _, _, answer in batch for _ in range(samples or 1)]
        right += sum(text.split() == answer.split() for text, answer in zip(texts, answers, strict=True))
    return right / len(questions) / (samples or 1)


def train(options, data: Path, seed: int, folder: Path) -> Path:
    """Trains by the recipe, through the code of `trl grpo`; gives a merged checkpoint."""
    settings = {
        "config": find_file("recipe", "convllava_grpo"),
        "model_name_or_path": options.model,
        "dataset_name": data,
        "output_dir": folder / "adapter",
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "max_completion_length": 12,
        "gradient_accumulation_steps": options.questions_per_step,
        "steps_per_generation": options.questions_per_step,
        "seed": seed,
        "dtype": "float32",
        "bf16": "false",
        "tf32": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "logging_steps": 1000,
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    grpo.main(*grpo.make_parser().parse_args_and_config(arguments))
    gc.collect()
    return merge_adapter(folder / "adapter", folder / "merged", base=options.model)


def measure(options, task: str, folder: Path) -> list[dict]:
    """Rows of the table of a task: before, and after training from each seed."""
    held_out = make_questions(options.split, task, options.held_out)
    others = [row for other in KIND_OF for row in make_questions(options.split, other, options.held_out // 5)]
    data = save_questions(make_questions("train", task, options.steps * options.questions_per_step), folder / task)

    def measure_checkpoint(checkpoint: Path, seconds: float | None) -> dict:
        greedy, sampled = score(checkpoint, held_out, 0, 0), score(checkpoint, held_out, SAMPLES, 0)
        return {"greedy": greedy, "sampled": sampled, "other tasks": score(checkpoint, others, 0, 0), "s": seconds}

    results = {"before": measure_checkpoint(Path(options.model), None)}
    for seed in options.seeds:
        show_progress(f"{task}, seed {seed}")
        start = time.perf_counter()
        merged = train(options, data, seed, folder / f"{task}-{seed}")
        results[f"seed {seed}"] = measure_checkpoint(merged, time.perf_counter() - start)
    runs = [results[f"seed {seed}"] for seed in options.seeds]
    results["mean gain"] = {
        name: statistics.fmean(run[name] for run in runs) - results["before"][name]
        for name in ("greedy", "sampled", "other tasks")
    } | {"s": None}
    return [
        {
            "trained on": task,
            "checkpoint": name,
            **{key: f"{value[key]:{'+' if 'gain' in name else ''}.1%}" for key in ("greedy", "sampled", "other tasks")},
            "training, s": "" if value["s"] is None else f"{value['s']:.0f}",
        }
        for name, value in results.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint of the quickstart")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="of training (120)")
    parser.add_argument("--questions-per-step", type=int, default=8, help="each answered 8 times (8)")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--held-out", type=int, default=600, help="questions (600), and a fifth of it per other task")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    options = parser.parse_args(arguments)

    register()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for task in options.tasks for row in measure(options, task, Path(folder))]
    show_progress("")
    print("# GRPO")
    print_table(f"Right answers to {options.held_out} held-out questions", rows)
    machine = describe_machine(torch.get_num_threads())
    print_machine(machine)
    write_json(options.json, {"machine": machine, "results": rows})


if __name__ == "__main__":
    main()
