"""Equality with the originals on every case of the LLaVA family's references: LLaVA v1.5, LLaVA v0 and LLaVAR (deltas
that are merged first), TinyLLaVA with Phi-2, TinyLlama and StableLM-2. The READMEs beside the numbers say how they were
made. Nothing of this package runs the converted checkpoints: classes, processor and tokenizer are transformers' own.
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from convllava_hf.conversion import convert_checkpoint
from convllava_hf.deltas import apply_delta


FEATURES, LOGITS, LOSS = 1e-4, 5e-4, 1e-4  # absolute tolerances
REFERENCE = Path(__file__).parent / "reference"
# Family -> folder of the tower.
TOWERS = {
    "llava_v1_5": "clip-vit-tiny-patch14-56",
    "llava_v0_delta": "clip-vit-tiny-patch14",
    "llavar": "clip-vit-tiny-patch14-70",
    "tinyllava": "tiny-siglip-so400m-patch14-384",
    "tinyllava_llama": "tiny-siglip-so400m-patch14-384",
    "tinyllava_stablelm": "tiny-siglip-so400m-patch14-384",
}


@cache
def read_expected(family):
    """The recorded numbers: texts and ids, and tensors."""
    folder = REFERENCE / family
    return json.loads((folder / "expected.json").read_text()), load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Converts a family once, as `convllava convert` does, after `convllava apply-delta` where there is a delta."""
    done = {}

    def convert(family):
        if family not in done:
            done[family] = tmp_path_factory.mktemp(family) / family
            folder = REFERENCE / family
            source = folder / "model"
            if not source.exists():
                source = done[family].with_name("merged")
                apply_delta(folder / "base", folder / "delta", source)
            convert_checkpoint(source, done[family], vision_tower=folder / TOWERS[family])
        return done[family]

    return convert


@pytest.fixture(scope="module")
def load(convert):
    """Loads a family's model in float32 and its processor with the exact image backend, once."""

    @cache
    def load(family):
        folder = convert(family)
        model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert type(model) is LlavaForConditionalGeneration and not any(info.values())
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor) is LlavaProcessor and type(processor.image_processor) is LlavaImageProcessor
        processor.image_processor = LlavaImageProcessorPil.from_pretrained(folder)
        return model.eval(), processor

    return load


def list_cases(kind):
    """Every prompt or image of every family."""
    for family in TOWERS:
        if kind == "prompts":
            names = [prompt["name"] for prompt in read_expected(family)[0]["prompts"]]
        else:
            names = sorted(path.name for path in (REFERENCE / family / "images").iterdir())
        yield from (pytest.param(family, name, id=f"{family}-{name}") for name in names)


def open_image(family, name):
    return Image.open(REFERENCE / family / "images" / name)


def test_no_case_is_left_out():
    assert len(list(list_cases("prompts"))) == 25 and len(list(list_cases("images"))) == 13


def check_pixels(exact, fast, expected, std):
    """Compares the exact backend (PIL) and the fast one (torchvision) with the original's values."""
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-6)
    difference = (fast - expected).abs()
    assert (difference * torch.tensor(std).view(3, 1, 1)).max() < 1 / 255 + 1e-6  # on the scale 0..1 of the pixels
    assert (difference > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize(("family", "name"), list(list_cases("images")))
def test_pixel_values(family, name, load, convert):
    expected, tensors = read_expected(family)
    image, exact = open_image(family, name), load(family)[1].image_processor
    fast = AutoProcessor.from_pretrained(convert(family)).image_processor
    pixels = [processor(image, return_tensors="pt")["pixel_values"][0] for processor in (exact, fast)]
    if f"pixel_values.{name}" in tensors:
        check_pixels(*pixels, tensors[f"pixel_values.{name}"], fast.image_std)
    else:  # SigLIP's are recorded in part, with a hash of the whole
        sampled = [pixel_values[:, ::8, ::8] for pixel_values in pixels]
        check_pixels(*sampled, tensors[f"pixel_values_sample.{name}"], fast.image_std)
        u8 = ((pixels[0] * 0.5 + 0.5) * 255).round().to(torch.uint8)
        values = ((u8.numpy() * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
        assert hashlib.sha256(values.tobytes()).hexdigest() == expected["pixel_values"][name]["sha256"]
        torch.testing.assert_close(pixels[0], torch.from_numpy(values), rtol=0, atol=1e-6)
    for option in ("no_pad", "pad"):
        if f"pixel_values_{option}.{name}" in tensors:
            pixels = [
                processor(image, do_pad=option == "pad", return_tensors="pt")["pixel_values"][0]
                for processor in (exact, fast)
            ]
            check_pixels(*pixels, tensors[f"pixel_values_{option}.{name}"], fast.image_std)


@pytest.mark.parametrize(("family", "name"), list(list_cases("images")))
@torch.no_grad()
def test_features(family, name, load):
    expected, tensors = read_expected(family)
    model, processor = load(family)
    pixel_values = processor.image_processor(open_image(family, name), return_tensors="pt")["pixel_values"]
    if f"pixel_values_resize_image.{name}" in tensors:
        pixel_values = tensors[f"pixel_values_resize_image.{name}"][None]
    stride = expected["pixel_values"][name]["feature_row_stride"] if "pixel_values" in expected else 1
    projected = torch.stack(list(model.get_image_features(pixel_values).pooler_output))[0, ::stride]
    torch.testing.assert_close(projected, tensors[f"projected_features.{name}"], rtol=0, atol=FEATURES)
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = hidden[model.config.vision_feature_layer][0]
    if model.config.vision_feature_select_strategy == "default":
        features = features[1:]
    torch.testing.assert_close(features[::stride], tensors[f"vision_features.{name}"], rtol=0, atol=FEATURES)


def expand(ids, processor, image_tokens):
    """The original's ids with each image marker (-200) as one placeholder per image token."""
    return [t for token in ids for t in ([processor.image_token_id] * image_tokens if token == -200 else [token])]


@pytest.mark.parametrize(("family", "name"), list(list_cases("prompts")))
@torch.no_grad()
def test_prompts_logits_and_answers(family, name, load):
    expected, tensors = read_expected(family)
    model, processor = load(family)
    prompt = next(prompt for prompt in expected["prompts"] if prompt["name"] == name)
    images = [open_image(family, image) for image in prompt["images"]]
    text = re.sub(r"(<im_patch>)\*\d+", r"\1", prompt["prompt"])  # the processor repeats it
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    if prompt.get("preprocess") == "resize_image":
        inputs["pixel_values"] = torch.stack(
            [tensors[f"pixel_values_resize_image.{image}"] for image in prompt["images"]]
        )
    ids = inputs["input_ids"][0].tolist()
    assert ids == expand(prompt["input_ids"], processor, model.config.image_seq_length)
    assert len(ids) == prompt["sequence_length"]

    logits = model(**inputs).logits[0]
    recorded = tensors[f"logits.{name}"]
    if f"logits_positions.{name}" in tensors:
        logits = logits[tensors[f"logits_positions.{name}"]]
    logits = logits[-len(recorded) :]
    words = min(recorded.shape[1], expected.get("vocab", {}).get("tokenizer_length", recorded.shape[1]))
    torch.testing.assert_close(logits[:, :words], recorded[:, :words], rtol=0, atol=LOGITS)
    answer = model.generate(**inputs, do_sample=False, min_new_tokens=16, max_new_tokens=16)
    assert answer[0, len(ids) :].tolist() == prompt["greedy_tokens"]
