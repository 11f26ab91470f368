"""Answer a batch of chats at once: images of different sizes, and a chat without any.

    pip install convllava-hf
    python examples/batched_generate.py --model MODEL

MODEL is a Hub id or a folder. Without it the script takes the tiny model that `make quickstart` trains. The questions
are those that this model was trained on, and what it should say stands beside its answers.

Rows of a batch are padded on the left, so that every answer starts where its prompt ends. Images go through the vision
tower in groups of equal size; what pads them in the batch is never computed. With --native each image keeps its aspect
ratio, which takes fewer tokens; models that were trained on padded squares answer best without it.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import convllava_hf  # noqa: F401 -- registers ConvLLaVA with transformers


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="quickstart/checkpoint")
parser.add_argument("--max-new-tokens", type=int, default=32)
parser.add_argument("--native", action="store_true", help="keep the aspect ratio of each image")
arguments = parser.parse_args()
if arguments.model == "quickstart/checkpoint" and not Path(arguments.model).is_dir():
    parser.error(f"there is no {arguments.model} yet: run `make quickstart`, or name a model with --model")

# Many CPUs compute bfloat16, the dtype of most checkpoints, a hundred times slower than float32.
device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
processor = AutoProcessor.from_pretrained(arguments.model)
model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=dtype).to(device).eval()

if arguments.native:
    processor.image_processor.image_aspect_ratio = "native"


def draw_page(*shapes: tuple[str, tuple[int, int], tuple[int, int, int]]) -> Image.Image:
    """A white page with shapes of 42 pixels: kind, corner, colour."""
    page = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(page)
    for kind, (x, y), colour in shapes:
        (draw.ellipse if kind == "circle" else draw.rectangle)((x, y, x + 42, y + 42), fill=colour)
    return page


RED, BLUE = (215, 40, 40), (40, 80, 215)
one = draw_page(("circle", (11, 11), RED))
two = draw_page(("circle", (11, 11), RED), ("square", (75, 75), BLUE))
# Question, images, and what a model says that was trained on such pages.
questions = [
    ("Which colour is the circle?", [one], "red"),
    ("Where is the circle?", [one.resize((384, 384))], "top left"),
    ("How many shapes are there?", [two], "2"),
    ("nothing, blue star, nothing, nothing. Which colour is the star?", [], "blue"),
]

chats = []
for question, images, _ in questions:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    chats.append([{"role": "user", "content": content}])

inputs = processor.apply_chat_template(
    chats,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={"padding": True, "padding_side": "left"},
).to(device, model.dtype)

tokens = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
new_tokens = tokens[:, inputs["input_ids"].shape[1] :]  # (rows, prompt + new) -> (rows, new)
answers = processor.batch_decode(new_tokens, skip_special_tokens=True)

for (question, images, expected), answer in zip(questions, answers, strict=True):
    print(f"[{len(images)} images] {question} -> {answer.strip()} (expected: {expected})")
