"""Make training data of LLaVA-format JSON, check it, and look at it.

    python examples/build_dataset.py --llava-json my.json --image-root images --output data [--model CHECKPOINT]

Rows that cannot be trained on are named and left out. With a checkpoint, rows of more than 2048 tokens are cut by
whole rounds, and the page shows in colour which tokens carry loss. The same from the command line: `convllava data`.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoProcessor

import convllava_hf  # noqa: F401 (registers the model with transformers)
from convllava_hf.data.build import build_dataset
from convllava_hf.data.check import check_dataset
from convllava_hf.data.page import write_page


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--llava-json", type=Path, required=True, help="a JSON list, or one object per line")
parser.add_argument("--image-root", type=Path, required=True, help="folder that the rows' images lie in")
parser.add_argument("--output", type=Path, required=True, help="folder to make")
parser.add_argument("--model", help="checkpoint to train: folder or Hub id")
arguments = parser.parse_args()

processor = AutoProcessor.from_pretrained(arguments.model) if arguments.model else None
report = build_dataset(
    [(arguments.llava_json, arguments.image_root)],
    arguments.output,
    on_error="skip",
    processor=processor,
    max_length=2048 if processor else None,
    long_rows="cut",
)
print(report.summary())
assert not check_dataset(arguments.output).bad_rows

rows = load_dataset(str(arguments.output), split="train")  # or streaming=True
print(rows)
print(rows[0])

page = arguments.output.with_suffix(".html")
write_page(arguments.output, page, processor=processor)
print(f"look at {page}; then: convllava train RECIPE --model_name_or_path CHECKPOINT --dataset_name {arguments.output}")
