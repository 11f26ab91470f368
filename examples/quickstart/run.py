"""Trains a tiny ConvLLaVA on real images through its three stages, and measures it on held-out questions.

    python examples/quickstart/run.py --output quickstart

Needs no network, no GPU and about four minutes on two CPU cores. Leaves in the output folder:

    results.json   accuracy per task and overall, counts, seconds per phase, seed
    report.html    the same to look at: loss curves, sample pictures with question, answer and truth
    checkpoint/    the model, which `convllava ask` answers from
    samples/       held-out pictures to ask about
    evaluation/    the held-out questions with their answers: `convllava eval-report quickstart/evaluation/results`
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow busy machines down
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
from pages import IMAGE_TASKS, TASKS, ask, ask_in_words, make_pages
from report import write_report
from stages import (
    BATCH_SIZE,
    STAGES,
    build_model,
    build_processor,
    build_rows,
    caption,
    learn_to_read,
    learn_to_see,
    train_stage,
)
from transformers import set_seed

from convllava_hf import load
from convllava_hf.evaluation.answering import make_local_answerer
from convllava_hf.evaluation.files import read_json_lines, write_json_lines
from convllava_hf.evaluation.metrics import compare_exact
from convllava_hf.evaluation.results import hash_checkpoint
from convllava_hf.evaluation.run import evaluate


TARGET, TARGET_PER_TASK = 0.92, 0.85


class Clock:
    """Headings with the time so far, and wall-clock and processor seconds per phase."""

    def __init__(self):
        self.started = self.last = self.read()
        self.seconds, self.phase = {}, None

    @staticmethod
    def read() -> tuple[float, float]:
        times = os.times()
        return time.monotonic(), times.user + times.system

    def start(self, phase: str | None):
        """Begins a phase, and ends the one before; None only ends it."""
        now = self.read()
        if self.phase:
            self.seconds[self.phase] = self.since(self.last)
        self.phase, self.last = phase, now
        if phase:
            print(f"\n[{now[0] - self.started[0]:4.0f} s] {phase}", flush=True)

    def since(self, moment: tuple[float, float]) -> dict[str, float]:
        wall, cpu = (now - then for now, then in zip(self.read(), moment, strict=True))
        return {"wall": round(wall, 1), "cpu": round(cpu, 1)}


def draw_questions(pages, per_task: int, seed: int) -> list[dict]:
    """Held-out questions, `per_task` of each task, each about a page of its own where there are enough."""
    questions = []
    for task in TASKS:
        rng, found = random.Random(f"questions {task} {seed}"), []
        for page in rng.sample(pages, len(pages)):
            if len(found) == per_task or page.kind == "mixed":
                continue
            pair = ask_in_words(page, rng) if task == "text" else ask(page, task, rng)
            if pair:
                image = None if task == "text" else page.image
                found.append({"task": task, "image": image, "question": pair[0], "truth": pair[1]})
        questions += found
    return questions


def answer_questions(checkpoint: Path, questions: list[dict], images: list, folder: Path) -> list[str]:
    """Answers as `convllava eval --task exact-match` does, with files and results in a folder for that command."""
    shutil.rmtree(folder, ignore_errors=True)  # answers of another checkpoint
    folder.mkdir(parents=True)
    rows = []
    for number, (question, image) in enumerate(zip(questions, images, strict=True)):
        row = {"question_id": number, "text": question["question"], "answer": question["truth"]}
        rows.append({**row, "category": question["task"]})
        if image is not None:
            rows[-1]["image"] = f"{number}.png"
            image.save(folder / f"{number}.png")
    write_json_lines(folder / "questions.jsonl", rows)

    def make_answerer(style, longest, settings):
        return make_local_answerer(*load(checkpoint), folder, style, longest, settings)

    evaluate(
        "exact-match",
        folder / "questions.jsonl",
        folder / "results",
        folder,
        make_answerer=make_answerer,
        model_id=str(checkpoint),
        checkpoint_hash=hash_checkpoint(str(checkpoint)),
        batch_size=32,
        max_new_tokens=10,
    )
    return [row["text"] for row in read_json_lines(folder / "results" / "predictions.jsonl")]


def main(
    output: Path,
    seed: int,
    num_pages: int = 8000,
    reading_rows: int = 6400,
    seeing_pages: int = 12000,
    share: float = 1.0,
    per_task: int = 90,
):
    """Runs everything.

    Args:
        output: folder for the results.
        seed: of the data, the split, the weights and the order.
        num_pages: training pages.
        reading_rows: text rows of stage 0a.
        seeing_pages: crowded pages of stage 0b.
        share: of the rows of each stage; tests use less than 1.
        per_task: held-out questions per task.

    Returns:
        What `results.json` holds.
    """
    # transformers has a new name for it, which TRL's oldest supported version does not know.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
    clock, losses = Clock(), {}
    set_seed(seed)
    clock.start("drawing pages, training the tokenizer")
    pages = make_pages("train", num_pages, seed)
    rng = random.Random(seed)
    texts = [
        f"{p.words}. {caption(p)} Describe the page. {' '.join(ask_in_words(p, rng))}"
        for p in pages
        if p.kind != "mixed"
    ]
    processor = build_processor(texts)
    model = build_model(processor)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(processor.tokenizer)} tokens, {len(pages)} pages")

    clock.start("stage 0a: the language model learns to read (stands in for a pretrained one)")
    losses["stage 0a: reading"] = learn_to_read(model, processor, pages, reading_rows, seed)
    clock.start("stage 0b: four vision stages learn to see (stand in for a pretrained tower)")
    crowded = make_pages("train", seeing_pages, seed, ("mixed",))
    losses["stage 0b: seeing"] = learn_to_see(model, processor, crowded, seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"  # its copies of this run's pages are of no use to the next
        checkpoint = folder / "stage0"
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        for number, stage in enumerate(STAGES, 1):
            clock.start(stage.title)
            data = build_rows(number, pages, max(BATCH_SIZE, int(stage.rows * share)), seed, folder / "data")
            trained = output / "checkpoint" if stage is STAGES[-1] else folder / f"stage{number}"
            losses[stage.title] = train_stage(stage, checkpoint, data, trained, seed)
            checkpoint = trained

    clock.start("answering held-out questions, as `convllava eval` does")
    questions = draw_questions(make_pages("test", 14 * per_task, seed), per_task, seed)
    images = [question["image"] for question in questions]
    answers = answer_questions(checkpoint, questions, images, output / "evaluation")
    clock.start("the same with the pictures swapped between questions")
    about_images = [question for question in questions if question["image"] is not None]
    swapped = [question["image"] for question in about_images]
    random.Random(seed).shuffle(swapped)
    swapped_answers = iter(answer_questions(checkpoint, about_images, swapped, output / "evaluation_swapped"))
    clock.start(None)

    for question, answer in zip(questions, answers, strict=True):
        question["answer"] = answer
        question["shuffled"] = next(swapped_answers) if question["image"] is not None else None

    def rate(selected, key):
        return round(sum(compare_exact(q[key], q["truth"]) for q in selected) / len(selected), 4)

    by_task = {task: [question for question in questions if question["task"] == task] for task in TASKS}
    accuracy = {
        "overall": rate(questions, "answer"),
        "overall_images_swapped": rate(about_images, "shuffled"),
        "tasks": {task: rate(selected, "answer") for task, selected in by_task.items()},
        "tasks_images_swapped": {task: rate(by_task[task], "shuffled") for task in IMAGE_TASKS},
    }
    results = {
        "seed": seed,
        "parameters": model.num_parameters(),
        "training_pages": num_pages + seeing_pages,
        "questions": {**{task: len(selected) for task, selected in by_task.items()}, "overall": len(questions)},
        "accuracy": accuracy,
        "targets": {"overall": TARGET, "each_image_task": TARGET_PER_TASK},
        "targets_met": accuracy["overall"] >= TARGET
        and all(accuracy["tasks"][task] >= TARGET_PER_TASK for task in IMAGE_TASKS),
        "seconds": {**clock.seconds, "total": clock.since(clock.started)},
    }
    (output / "samples").mkdir(exist_ok=True)
    about_images[0]["image"].save(output / "samples" / "page.png")
    samples = [question for task in TASKS for question in by_task[task][:3]]
    wrong = [question for question in questions if question["answer"] != question["truth"]]
    write_report(str(output / "report.html"), results, losses, samples, wrong)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    print(f"\n{'task':10} {'questions':>9} {'exact':>7} {'pictures swapped':>17}")
    for task in TASKS:
        swapped = f"{accuracy['tasks_images_swapped'][task]:.1%}" if task in IMAGE_TASKS else ""
        print(f"{task:10} {len(by_task[task]):9} {accuracy['tasks'][task]:7.1%} {swapped:>17}")
    print(f"{'all':10} {len(questions):9} {accuracy['overall']:7.1%} {accuracy['overall_images_swapped']:17.1%}")
    verdict = "met" if results["targets_met"] else "missed"
    print(f"targets ({TARGET:.0%} overall, {TARGET_PER_TASK:.0%} in each image task): {verdict}")
    print(f"\nreport: {output / 'report.html'}\ntry: convllava ask {output / 'samples/page.png'} \\")
    print(f'       "{about_images[0]["question"]}" --model {output / "checkpoint"}')
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for the results (quickstart)")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the split, the weights and the order (0)")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    main(arguments.output, arguments.seed)
