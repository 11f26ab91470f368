"""Make data for `trl grpo` and `trl dpo` of data to train on: the last question of every row, and its right answer.

    python examples/training/preferences.py --data DATA --output questions                     # for grpo and rloo
    python examples/training/preferences.py --data DATA --output pairs --model CHECKPOINT      # for dpo

Questions have the columns `prompt`, `images` and `solution`. For pairs the checkpoint answers each question once, at
temperature 1; where it is wrong, the right answer is `chosen` and its own `rejected`.
"""

import argparse
from pathlib import Path

from datasets import load_dataset

from convllava_hf.inference.answer import answer
from convllava_hf.inference.load import load
from convllava_hf.training.sample_answers import is_exact, make_question


def make_prompt(row: dict) -> dict:
    """Splits a conversation into what comes before its last answer, and that answer."""
    *prompt, last = row["messages"]
    return {"prompt": prompt, "solution": "".join(part["text"] or "" for part in last["content"])}


def make_pair(row: dict, model, processor) -> dict:
    """Adds the right answer as `chosen`, and the model's own as `rejected`, which is empty where it is right."""
    question = make_question(row)
    asked = {"images": question.images, "history": question.history, "temperature": 1.0, "max_new_tokens": 64}
    own = answer(model, processor, question.text, **asked)
    rejected = [] if is_exact(own, question.expected) else [say(own)]
    return {"chosen": [say(question.expected)], "rejected": rejected}


def say(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder of `convllava data build`")
parser.add_argument("--output", type=Path, required=True, help="folder to make")
parser.add_argument("--split", default="train", help="of the data (train)")
parser.add_argument("--rows", type=int, help="so many of them; default: all")
parser.add_argument("--model", help="checkpoint that answers: folder or Hub id; without it, questions alone")
arguments = parser.parse_args()

rows = load_dataset(arguments.data, split=arguments.split)
rows = rows.select(range(min(arguments.rows or len(rows), len(rows))))
rows = rows.filter(lambda row: make_question(row) is not None)
if arguments.model:
    model, processor = load(arguments.model)
    rows = rows.map(
        make_pair, fn_kwargs={"model": model, "processor": processor}, new_fingerprint=arguments.output.name
    )
    rows = rows.filter(lambda row: row["rejected"])
columns = ["prompt", "images", "solution", *(["chosen", "rejected"] if arguments.model else [])]
rows = rows.map(make_prompt).select_columns(columns)
arguments.output.mkdir(parents=True)
rows.to_parquet(arguments.output / f"{arguments.split}-00000-of-00001.parquet")
print(f"wrote {len(rows)} rows to {arguments.output}")
