"""Sources that the tests of conversion share: a small released checkpoint, its conversion, and parts to join."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from tiny_sources import save_timm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedTokenizerFast, Qwen2Config

from convllava_hf.conversion.convert import convert_checkpoint


@pytest.fixture(scope="session")
def released(reference) -> Path:
    """The reference checkpoint: `llm/` and `vision/`."""
    return reference / "convllava"


@pytest.fixture(scope="session")
def done(released, tmp_path_factory):
    """The report of a conversion of the reference checkpoint; its folder is `done.output`."""
    output = tmp_path_factory.mktemp("done") / "model"
    return convert_checkpoint(released / "llm", output, vision_tower=released / "vision")


@pytest.fixture
def broken(released, tmp_path) -> Path:
    """A copy of the reference checkpoint that a test may damage, in a folder of its own."""
    for part in ("llm", "vision"):
        shutil.copytree(released / part, tmp_path / part)
    return tmp_path


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """Parts for new models: a timm tower `timm/` and language models `llama/`, `qwen2/`, `phi/`."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tower = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=3)
    save_timm(tower, folder / "timm")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["a red square and a blue circle"] * 4, trainer)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    common |= {"bos_token_id": 0, "eos_token_id": 0}
    for config in (
        LlamaConfig(**common, vocab_size=bpe.get_vocab_size()),
        Qwen2Config(**common, vocab_size=320, num_key_value_heads=1, tie_word_embeddings=True),
        PhiConfig(**common, vocab_size=bpe.get_vocab_size()),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / config.model_type)
        eos = "</s>" if config.model_type == "llama" else "<|endoftext|>"
        chat = ["<|im_start|>", "<|im_end|>"]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, extra_special_tokens=chat)
        tokenizer.save_pretrained(folder / config.model_type)
        if config.model_type == "llama":
            model = AutoModelForCausalLM.from_pretrained(folder / "llama")
            model.resize_token_embeddings(len(tokenizer))
            model.save_pretrained(folder / "llama")
    return folder
