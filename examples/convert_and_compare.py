"""Convert a checkpoint of the original code, and set its numbers beside the original's.

    python examples/convert_and_compare.py                  # from a clone: the tests' tiny reference checkpoint

The reference folder holds a checkpoint in the released layout (`llm/`, `vision/`), images, and what the original code
computed with it (`expected.json`, `expected.safetensors`). A released checkpoint is converted in the same way:

    convllava convert ConvLLaVA/ConvLLaVA-sft-1536 --output ConvLLaVA-sft-1536
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from convllava_hf.conversion.convert import convert_checkpoint


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--reference", type=Path, default=Path("tests/reference/convllava"))
parser.add_argument("--output", type=Path, help="keep the converted checkpoint here [default: do not keep it]")
arguments = parser.parse_args()
reference = arguments.reference
if not (reference / "expected.json").is_file():
    parser.error(f"there is no {reference / 'expected.json'}: run this from a clone, or pass --reference")

folder = tempfile.TemporaryDirectory()
output = arguments.output or Path(folder.name) / "converted"

# The language model's config.json names its tower by a Hub id; here it lies beside it.
report = convert_checkpoint(reference / "llm", output, vision_tower=reference / "vision")
print(report.summary())

# The original computed in float32 and resized images with Pillow.
model = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(output)
processor.image_processor = AutoImageProcessor.from_pretrained(output, backend="pil")

expected = json.loads((reference / "expected.json").read_text())
tensors = load_file(reference / "expected.safetensors")
words = expected["tokenizer"]["vocab_size"]  # the converted vocabulary also has <image>, <pad> and rows of padding
identical = True

print(f"\n{'image':<24}{'pixel values':>14}{'features':>14}{'projected':>14}    largest difference from the original")
for name in expected["images"]:
    pixels = processor.image_processor(Image.open(reference / "images" / f"{name}.png"), return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(pixels["pixel_values"], return_dict=True)
    found = [pixels["pixel_values"][0], features.last_hidden_state[0], features.pooler_output[0]]
    kinds = ["pixel_values", "vision_features", "projected_features"]
    differences = [
        (tensor - tensors[f"image.{name}.{kind}"]).abs().max().item() for tensor, kind in zip(found, kinds, strict=True)
    ]
    print(f"{name:<24}" + "".join(f"{difference:>14.1e}" for difference in differences))

print(f"\n{'prompt':<24}{'tokens':>14}{'logits':>14}{'answer':>14}")
for name, case in expected["cases"].items():
    if f"case.{name}.logits" not in tensors:
        continue  # longer than the original's limit: it cut the end of the prompt off, where the answer begins
    images = [Image.open(reference / "images" / f"{image}.png") for image in case["images"]]
    inputs = processor(text=case["prompt"], images=images or None, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, :, :words]
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    # The original marks an image by one -200, which it replaces by features later on.
    tokens_per_image = case["image_spans"][0][1] - case["image_spans"][0][0] if images else 0
    ids = [
        token
        for original in case["input_ids"]
        for token in ([processor.image_token_id] * tokens_per_image if original == -200 else [original])
    ]
    same_tokens = inputs["input_ids"][0].tolist() == ids
    same_answer = answer.tolist() == case["generated_ids"]
    difference = (logits - tensors[f"case.{name}.logits"]).abs().max().item()
    identical &= same_tokens and same_answer
    print(f"{name:<24}{'same' if same_tokens else 'OTHER':>14}{difference:>14.1e}", end="")
    print(f"{'same' if same_answer else 'OTHER':>14}")

print("\nTokens and answers are the original's." if identical else "\nTokens or answers differ: please report this.")
