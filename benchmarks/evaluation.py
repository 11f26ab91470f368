"""Samples per second of `convllava eval` over batch size, against one question at a time as the originals ask.

    python benchmarks/evaluation.py --model quickstart/checkpoint

All variants run in one process, in turn, on the same questions; the answers are compared as well.
"""

import argparse
import time
from pathlib import Path

from machine import describe_machine, print_machine, print_table, write_json


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint")
    parser.add_argument("--device", help="such as cpu or cuda:1 (the best there is)")
    parser.add_argument("--questions", type=int, default=64, help="number of questions (64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="batch sizes (1 2 4 8 16)")
    parser.add_argument("--new-tokens", type=int, default=16, help="of every answer, none shorter (16)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts (3)")
    parser.add_argument("--json", type=Path, help="write all digits here")
    options = parser.parse_args(arguments)

    import torch
    from PIL import Image

    import convllava_hf
    from convllava_hf.evaluation.answering import make_local_answerer
    from convllava_hf.evaluation.questions import PROMPT_STYLES, Question

    model, processor = convllava_hf.load(options.model, device=options.device)
    model.generation_config.eos_token_id = None  # answers of one length, so that all variants do the same work
    image = Image.linear_gradient("L").convert("RGB")
    questions = []
    for number in range(options.questions):
        text = f"What is in the picture{' here' * (number % 5)}?"
        questions.append(Question(number, text, text, [image.rotate(number)]))
    settings = {"temperature": 0.0}
    answer = make_local_answerer(model, processor, None, PROMPT_STYLES["checkpoint"], options.new_tokens, settings)
    answer(questions[:2])
    rows, texts = [], {}
    for size in options.batches:
        seconds = []
        for _ in range(options.repeats):
            started = time.perf_counter()
            texts[size] = []
            for start in range(0, len(questions), size):
                texts[size] += answer(questions[start : start + size])
            seconds.append(time.perf_counter() - started)
        rows.append({"batch": size, "seconds": min(seconds), "samples/s": len(questions) / min(seconds)})
    first = rows[0]["samples/s"]
    for row in rows:
        row["times the first"] = row["samples/s"] / first
        same = sum(a == b for a, b in zip(texts[row["batch"]], texts[rows[0]["batch"]], strict=True))
        row["equal answers"] = f"{same}/{len(questions)}"
    shown = [{key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    print_table("Speed", shown)
    machine = describe_machine(torch.get_num_threads())
    print_machine(machine)
    write_json(options.json, {"machine": machine, "results": rows})


if __name__ == "__main__":
    main()
