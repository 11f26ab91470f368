"""Quantise a finetuned checkpoint with llm-compressor, for vLLM and transformers (compressed-tensors).

    python examples/training/quantize.py --model CHECKPOINT --output DIR                            # W8A16, no data
    python examples/training/quantize.py --model CHECKPOINT --output DIR --scheme W4A16 --data DATA # GPTQ

llm-compressor 0.14 asks for transformers 5.17 at most, but runs with newer ones: give it an environment of its own,
with transformers 5.19 or newer (`pip install --no-deps llmcompressor`, and what it names). This package need not be in
it. The checkpoint's own code runs, so look at it first. Tower, projector and output layer stay as they are.
"""

import argparse

import torch
from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForImageTextToText, AutoProcessor


IGNORE = ["lm_head", r"re:^model\.vision_tower\.", r"re:^model\.multi_modal_projector\."]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or Hub id")
parser.add_argument("--output", required=True, help="folder to make")
parser.add_argument("--scheme", default="W8A16", choices=["W8A16", "W4A16"], help="bits of weights and activations")
parser.add_argument("--data", help="folder of `convllava data build`: GPTQ adapts the weights to it")
parser.add_argument("--rows", type=int, default=256, help="of the data that have images (256)")
arguments = parser.parse_args()

model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)


def prepare(row: dict) -> dict:
    """Tokens and pixels of a row, as in training."""
    text = processor.apply_chat_template(row["messages"], tokenize=False)
    return processor(images=row["images"], text=[text], add_special_tokens=False, return_tensors="pt")


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    (row,) = batch
    return {key: torch.tensor(value) for key, value in row.items()}


if arguments.data:
    rows = load_dataset(arguments.data, split="train").filter(lambda row: row["images"]).shuffle(seed=0)
    rows = rows.select(range(min(arguments.rows, len(rows))))
    rows = rows.map(prepare, remove_columns=rows.column_names)
    recipe = GPTQModifier(targets="Linear", scheme=arguments.scheme, ignore=IGNORE)
    settings = {"num_calibration_samples": len(rows), "max_seq_length": 4096, "trust_remote_code_model": True}
    settings["pipeline"] = "basic"  # the others trace the model's code, which they cannot
    oneshot(model=model, processor=processor, dataset=rows, recipe=recipe, data_collator=collate, **settings)
else:
    recipe = QuantizationModifier(targets="Linear", scheme=arguments.scheme, ignore=IGNORE)
    oneshot(model=model, processor=processor, recipe=recipe, trust_remote_code_model=True)
model.save_pretrained(arguments.output, save_compressed=True)
processor.save_pretrained(arguments.output)
print(f"wrote {arguments.output}")
