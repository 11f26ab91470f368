"""Tiny training data, and a tiny LLaVA of transformers, for the tests that train."""

import io
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tiny_checkpoint import build_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)


def make_png(width: int, height: int, seed: int) -> bytes:
    """Random pixels as a PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_rows(count: int) -> Dataset:
    """Conversations with one image, and every fifth without; questions of different lengths."""
    messages, images = [], []
    for index in range(count):
        question = f"Question {index}?" + " more" * (index * 7 % 11)
        messages.append([{"role": "user", "content": question}, {"role": "assistant", "content": f"Answer {index}."}])
        picture = {"bytes": make_png(40 + index * 13 % 90, 40 + index * 29 % 90, index), "path": None}
        images.append([] if index % 5 == 4 else [picture])
    features = Features({"messages": [{"role": Value("string"), "content": Value("string")}], "images": List(Image())})
    return Dataset.from_dict({"messages": messages, "images": images}, features=features)


def save_rows(folder: Path, count: int = 24) -> Path:
    """Writes the rows as `convllava data build` does: parquet in a folder."""
    folder.mkdir(parents=True)
    make_rows(count).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def save_tiny_llava(folder: Path) -> Path:
    """Writes a LLaVA of transformers with random weights: 28-pixel squares, 4 tokens each."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=3,
            bos_token_id=None,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=files("convllava_hf").joinpath("chat_templates/chatml.jinja").read_text(encoding="utf-8"),
    )
    processor.save_pretrained(folder)
    return folder
