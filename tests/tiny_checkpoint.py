"""A tiny random checkpoint with everything that belongs to it, for the tests that load one as people do."""

from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ConvNextConfig, LlamaConfig, PreTrainedTokenizerFast

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaImageProcessor, ConvLlavaProcessor


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with the ChatML tokens and `<image>`; no training and no files."""
    specials = ["<pad>", "<image>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<image>", "<|im_start|>"],
        padding_side="left",
    )


def save_tiny_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, width: int = 64) -> Path:
    """Writes model and processor: 128-pixel squares (4 tokens), a context of 512 tokens, random weights.

    Args:
        folder: where to write.
        dtype: of the stored weights.
        width: of the language model.

    Returns:
        `folder`.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(
            num_stages=5, depths=[1] * 5, hidden_sizes=[8, 8, 16, 16, 24], layer_scale_init_value=1.0
        ),
        text_config=LlamaConfig(
            vocab_size=320,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=3,
            bos_token_id=None,
            initializer_range=0.2,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vocab_padding=320 - len(tokenizer),
    )
    ConvLlavaForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    template = files("convllava_hf").joinpath("chat_templates/chatml.jinja").read_text(encoding="utf-8")
    image_processor = ConvLlavaImageProcessor(size={"height": 128, "width": 128})
    ConvLlavaProcessor(image_processor, tokenizer, chat_template=template).save_pretrained(folder)
    return folder
