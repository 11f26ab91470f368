"""Ask a question about an image with transformers' own pipeline.

    pip install convllava-hf
    python examples/ask.py photo.jpg "What is in this picture?" --model MODEL

MODEL is a Hub id or a folder. Without it the script takes the tiny model that `make quickstart` trains, and without an
image it draws a page as this model knows them, one coloured shape in a corner, and asks what it was trained on. That
model answers such questions and no others.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import pipeline

import convllava_hf  # noqa: F401 -- registers ConvLLaVA with transformers


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", nargs="?", help="path or URL")
parser.add_argument("question", nargs="?", default="Which colour is the circle?")
parser.add_argument("--model", default="quickstart/checkpoint")
parser.add_argument("--max-new-tokens", type=int, default=64)
arguments = parser.parse_args()
if arguments.model == "quickstart/checkpoint" and not Path(arguments.model).is_dir():
    parser.error(f"there is no {arguments.model} yet: run `make quickstart`, or name a model with --model")

image = arguments.image
if image is None:
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((12, 12, 54, 54), fill=(215, 40, 40))
    if arguments.question == parser.get_default("question"):
        print("a white page with a red circle at the top left; expected: red")

# Many CPUs compute bfloat16, the dtype of most checkpoints, a hundred times slower than float32.
dtype = "auto" if torch.accelerator.is_available() else torch.float32
pipe = pipeline("image-text-to-text", model=arguments.model, dtype=dtype)

chat = [
    {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": arguments.question}],
    }
]
generate = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
outputs = pipe(text=chat, generate_kwargs=generate, return_full_text=False)
print(outputs[0]["generated_text"].strip())
