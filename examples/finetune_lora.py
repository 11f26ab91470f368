"""Finetune a checkpoint on your own images and questions with LoRA: LLaVA-format JSON in, adapter out.

    python examples/finetune_lora.py --model quickstart/checkpoint --llava-json my.json --image-root images \\
        --output tuned

The JSON is a list of rows such as

    {"id": "1", "image": "page.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is the total?"},
                                                       {"from": "gpt", "value": "41.90"}]}

Rows without "image" are text only. The adapter loads with PEFT; `convllava merge tuned --output merged` makes a whole
checkpoint of it. The same from the command line: `convllava train custom_finetune_lora`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor

import convllava_hf  # noqa: F401 (registers the model with transformers)
from convllava_hf.data.build import build_dataset
from convllava_hf.training.arguments import ConvLlavaTrainingArguments
from convllava_hf.training.trainer import ConvLlavaTrainer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="checkpoint: folder or Hub id")
parser.add_argument("--llava-json", type=Path, required=True, help="training rows")
parser.add_argument("--image-root", type=Path, required=True, help="folder that the rows' images lie in")
parser.add_argument("--output", required=True, help="folder for the adapter")
parser.add_argument("--epochs", type=float, default=3.0)
parser.add_argument("--batch-size", type=int, default=4, help="rows per step")
parser.add_argument("--learning-rate", type=float, default=2e-4)
parser.add_argument("--rank", type=int, default=128, help="of the adapter's matrices")
arguments = parser.parse_args()

on_gpu = torch.cuda.is_available()
model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="bfloat16" if on_gpu else "float32")
processor = AutoProcessor.from_pretrained(arguments.model)

with tempfile.TemporaryDirectory() as folder:
    build_dataset([(arguments.llava_json, arguments.image_root)], Path(folder) / "data")
    rows = load_dataset(str(Path(folder) / "data"), split="train")
    trainer = ConvLlavaTrainer(
        model=model,
        processing_class=processor,
        train_dataset=rows,
        # The language model's linear layers get adapters, the projector is trained whole, the tower stays.
        peft_config=LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            lora_dropout=0.05,
            target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
            modules_to_save=["multi_modal_projector"],
        ),
        args=ConvLlavaTrainingArguments(
            output_dir=arguments.output,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            projector_learning_rate=arguments.learning_rate / 10,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,  # below 1: a share of all steps
            max_length=2048,
            assistant_only_loss=True,
            bf16=on_gpu,
            logging_steps=1,
            report_to="none",
        ),
    )
    trainer.train()
trainer.save_model(arguments.output)
print(f"the adapter: {arguments.output}, its curves: {arguments.output}/training_curves.png")
