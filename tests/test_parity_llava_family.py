"""Equality with the originals on every case of the LLaVA family's references: LLaVA v1.5, LLaVA v0 and LLaVAR (deltas
that are merged first), TinyLLaVA with Phi-2, TinyLlama and StableLM-2. The READMEs beside the numbers say how they were
made. Nothing of this package runs the converted checkpoints: classes, processor and tokenizer are transformers' own.
"""

import hashlib
import json
import re
import shutil
from functools import cache
from importlib.resources import files
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
    LogitsProcessorList,
)

from convllava_hf.conversion.convert import convert_checkpoint
from convllava_hf.images import fit_to_corner
from convllava_hf.inference.answer import answer


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
def load(convert_family):
    """Loads a family's model in float32 and its processor with the exact image backend, once."""

    @cache
    def load(family):
        folder = convert_family(family)
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
def test_pixel_values(family, name, load, convert_family):
    expected, tensors = read_expected(family)
    image, exact = open_image(family, name), load(family)[1].image_processor
    fast = AutoProcessor.from_pretrained(convert_family(family)).image_processor
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
    if f"pixel_values_resize_image.{name}" in tensors:
        pixels = exact(fit_to_corner(image, 70), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, tensors[f"pixel_values_resize_image.{name}"], rtol=0, atol=1e-6)
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
    image = open_image(family, name)
    if f"pixel_values_resize_image.{name}" in tensors:
        image = fit_to_corner(image, 70)
    pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
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
    if prompt.get("preprocess") == "resize_image":
        images = [fit_to_corner(image, 70) for image in images]
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


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_llava_v0_end_at_the_separator(stream, load):
    model, processor = load("llava_v0_delta")
    said = processor.tokenizer("A # disc.###Human: More", add_special_tokens=False)["input_ids"]

    def say(ids, scores):
        scores[:, said[ids.shape[1] - length]] = 1e4
        return scores

    def ask(**kwargs):
        return answer(model, processor, "What is it?", max_new_tokens=len(said), **kwargs)

    length = ask(stream=True).stats.prompt_tokens
    found = ask(logits_processor=LogitsProcessorList([say]), stream=stream)
    if not stream:
        assert found == "A # disc."
        return
    assert "".join(found) == "A # disc." and found.stats.finish_reason == "stop"
    assert found.stats.new_tokens < len(said)


@pytest.mark.parametrize("family", ["llava_v0_delta", "llavar"])
@torch.no_grad()
def test_ids_of_the_later_code(family, load):
    """The code of v1.5 keeps the white space around `<im_start>` and `<im_end>`; on its ids the model is the same."""
    expected, tensors = read_expected(family)
    model, processor = load(family)
    later = expected["later_code"]
    ids = torch.tensor([expand(later["input_ids"], processor, model.config.image_seq_length)])
    assert ids.shape[1] == later["sequence_length"]
    images = [open_image(family, image) for image in later["images"]]
    inputs = {"input_ids": ids, **processor.image_processor(images, return_tensors="pt")}
    recorded = tensors["later_code.logits"]
    logits = model(**inputs).logits[0, -len(recorded) :, : recorded.shape[1]]
    torch.testing.assert_close(logits, recorded, rtol=0, atol=LOGITS)
    inputs["attention_mask"] = torch.ones_like(ids)
    answer = model.generate(**inputs, do_sample=False, min_new_tokens=16, max_new_tokens=16)
    assert answer[0, ids.shape[1] :].tolist() == later["greedy_tokens"]


# ---- training

# What TinyLLaVA's code trained on where it did not know a version: "###" between turns, whatever the template says. Its
# recipes use none of these. A tokenizer without ChatML's tokens makes the original give up on `chatml_direct`. The v0
# code's `sep_image_conv_front` put the image before the first role; no release was trained with it.
NOT_REPRODUCED = {
    *((family, "llava_llama_2") for family in TOWERS if family.startswith("tinyllava")),
    ("tinyllava_llama", "v1_mmtag"),
    ("llava_v1_5", "chatml_direct"),
    ("llava_v0_delta", "v0_square_sep_image_conv_front"),
}
# Version of the original -> template; the others have the version's name. None: the one that the checkpoint carries.
TEMPLATE_OF = {
    "v1": "vicuna_v1",
    "v0_square": None,
    "v0_pad": None,
    "llava_v1_pad": None,
    "vicuna_v1_1_square": "vicuna_v1",
}
START_END = "<im_start><im_patch><im_end>"


def list_versions():
    for family in TOWERS:
        training = read_expected(family)[0]["training"]
        for version in training.get("legacy_false", training):
            if (family, version) not in NOT_REPRODUCED:
                yield pytest.param(family, version, id=f"{family}-{version}")


def read_template(processor, version):
    """The template of a version, with the checkpoint's tag for images."""
    name = TEMPLATE_OF.get(version, version)
    if name is None:
        return processor.chat_template
    template = files("convllava_hf").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    return f"{{%- set image_tag = '{START_END}' -%}}\n{template}" if processor.image_token == "<im_patch>" else template


def encode(family, row, processor, template, **kwargs):
    """Model inputs and labels of a row, through the call that TRL makes.

    LLaVA v1.5 and TinyLLaVA put an image before the text of its turn; the v0 code leaves it where it is.
    """
    messages = []
    for turn in row["conversations"]:
        before, marker, after = turn["value"].partition("<image>")
        content = [{"type": "text", "text": text} for text in (before, after) if text]
        if marker:
            image = {"type": "image", "image": open_image(family, row["image"])}
            if processor.image_token == "<image>":
                content = [image, {"type": "text", "text": (before + after).strip()}]
            else:
                content.insert(1 if before else 0, image)
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    inputs = processor.apply_chat_template(
        [messages],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        **kwargs,
    )
    return inputs, inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, -100)


def check_labels(family, version, recorded, processor, image_tokens):
    """Compares ids and labels of every sample; returns how many the original accepts."""
    template, compared = read_template(processor, version), 0
    rows = json.loads((REFERENCE / family / "train.json").read_text())
    kwargs = {"original_masks": True} if "original_masks" in template else {}
    for row, expected in zip(rows, recorded, strict=True):
        if "error" in expected:  # captions of several rounds
            assert version == "plain"
            continue
        inputs, labels = encode(family, row, processor, template, **kwargs)
        assert inputs["input_ids"][0].tolist() == expand(expected["input_ids"], processor, image_tokens), row["id"]
        pairs = zip(expected["input_ids"], expected["labels"], strict=True)
        pairs = [label for token, label in pairs for _ in range(image_tokens if token == -200 else 1)]
        assert labels[0].tolist() == pairs, row["id"]
        compared += 1
    return compared


@pytest.mark.parametrize(("family", "version"), list(list_versions()))
def test_labels(family, version, load):
    model, processor = load(family)
    training = read_expected(family)[0]["training"]
    recorded = training.get("legacy_false", training)[version]
    compared = check_labels(family, version, recorded, processor, model.config.image_seq_length)
    assert compared == (1 if version == "plain" else 3)


def test_labels_with_a_legacy_tokenizer(tmp_path):
    """A checkpoint whose tokenizer puts the leading space after every special token, as those before v1.5."""
    for part in ("model", TOWERS["llava_v1_5"]):
        shutil.copytree(REFERENCE / "llava_v1_5" / part, tmp_path / part)
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "legacy": True}))
    convert_checkpoint(tmp_path / "model", tmp_path / "output", vision_tower=tmp_path / TOWERS["llava_v1_5"])
    processor = AutoProcessor.from_pretrained(tmp_path / "output")
    training = read_expected("llava_v1_5")[0]["training"]["legacy_true"]
    for version in training:
        if ("llava_v1_5", version) not in NOT_REPRODUCED:
            check_labels("llava_v1_5", version, training[version], processor, 16)


@pytest.mark.parametrize("family", ["llava_v0_delta", "llavar"])
def test_by_default_answers_and_their_ends_are_trained_on(family, load):
    processor = load(family)[1]
    row = json.loads((REFERENCE / family / "train.json").read_text())[1]
    _, labels = encode(family, row, processor, processor.chat_template)
    end = "###" if family == "llava_v0_delta" else "</s>"
    answers = "".join(f" {turn['value']}{end}" for turn in row["conversations"] if turn["from"] == "gpt")
    assert processor.decode(labels[labels != -100]).split() == answers.replace("</s>", "</s> ").split()


# The original's loader cuts Phi's and StableLM's tables, its trainer does not: their losses count rows without words.
LOSSES = [("llava_v1_5", "v1"), ("llava_v0_delta", "v0_square"), ("llavar", "llava_v1_pad"), ("tinyllava_llama", "v1")]


@pytest.mark.parametrize(("family", "version"), LOSSES, ids=[family for family, _ in LOSSES])
@torch.no_grad()
def test_loss_of_a_batch(family, version, load):
    model, processor = load(family)
    expected = read_expected(family)[0]["training_batch"]
    template, losses, tokens = read_template(processor, version), 0.0, 0
    words = read_expected(family)[1]["logits.text_only"].shape[1]  # without the rows that the conversion adds
    for row in json.loads((REFERENCE / family / "train.json").read_text()):
        kwargs = {"images_kwargs": {"do_pad": True}} if version.endswith("pad") else {}
        inputs, labels = encode(family, row, processor, template, original_masks=True, processor_kwargs=kwargs)
        logits = model(**inputs).logits[0, :-1, :words]
        losses += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        tokens += (labels[0, 1:] != -100).sum().item()
    assert losses / tokens == pytest.approx(expected["loss"], abs=LOSS)


def test_ocr_prompts_of_llavar(convert_family):
    """The prompts of LLaVAR's evaluation scripts (reading text, MME, instructions), character for character."""
    processor = AutoProcessor.from_pretrained(convert_family("llavar"))
    recorded = json.loads((REFERENCE / "llavar" / "ocr_prompts.json").read_text())
    compared = 0
    for name in ("mme", "multimodal_ocr", "instruction_following", "scienceqa"):
        entries = recorded[name] if isinstance(recorded[name], list) else [recorded[name]]
        for entry in [entry for entry in entries if "question_text" in entry]:
            content = [{"type": "text", "text": entry["question_text"]}]
            if "<im_start>" in entry.get("full_prompt", ""):  # the picture has a line of its own, at the end
                content = [{"type": "text", "text": f"{entry['question_text']}\n"}, {"type": "image"}]
            chat = [{"role": "user", "content": content}]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            if "full_prompt" not in entry:  # no picture: only the question is recorded
                assert f"USER: {entry['stored_prompt']} ASSISTANT:" in prompt
                continue
            expected = entry["full_prompt"].replace("<im_patch>{576}", processor.image_token)
            assert prompt.removeprefix(processor.tokenizer.bos_token).lstrip() == expected, name
            compared += 1
    assert compared == 7
