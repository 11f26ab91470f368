"""Language models and towers in the layouts of the families that people build from, tiny and with random weights."""

from pathlib import Path

import timm
import torch
from tiny_sources import save_timm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextV2Config,
    DINOv3ConvNextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"intermediate_size": 48, "head_dim": 16, "max_position_embeddings": 512}
# Family -> model type, whether the output layer is tied, the special tokens in order, and how the tokenizer is built.
FAMILIES = {
    "qwen3": ("qwen3", True, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "bytes"),
    "smollm2": ("llama", True, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], "bytes"),
    "llama_3": (
        "llama",
        False,
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ],
        "bytes",
    ),
    "phi_3": (
        "phi3",
        False,
        ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
        "pieces",
    ),
    "gemma": ("gemma2", True, ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], "spaces"),
    "mistral": ("mistral", False, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "pieces"),
    "gpt2": ("gpt2", True, ["<|endoftext|>"], "bytes"),
    "other": ("llama", False, ["<|stop|>"], "bytes"),
}
# Family -> start, end and padding of texts, and whether the start is added to each.
ENDS = {
    "qwen3": (None, "<|im_end|>", "<|endoftext|>", False),
    "smollm2": ("<|im_start|>", "<|im_end|>", "<|im_end|>", False),
    "llama_3": ("<|begin_of_text|>", "<|end_of_text|>", None, True),
    "phi_3": ("<s>", "<|endoftext|>", "<|endoftext|>", False),
    "gemma": ("<bos>", "<eos>", "<pad>", True),
    "mistral": ("<s>", "</s>", None, True),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", None, False),
    "other": (None, "<|stop|>", None, False),
}


def build_family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens, the pieces and the rules of a family, and a vocabulary of bytes.

    `bytes`: byte-level BPE. `pieces`: SentencePiece BPE that puts a space before a text. `spaces`: one that does not.
    """
    _, _, specials, kind = FAMILIES[family]
    start, end, padding, adds_start = ENDS[family]
    if kind == "bytes":
        words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        words = [*specials, *BYTES, "▁", *map(chr, range(33, 127))]
        vocab = {word: i for i, word in enumerate(words)}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        space = normalizers.Replace(" ", "▁")
        parts = [normalizers.Prepend("▁"), space] if kind == "pieces" else [space]
        backend.normalizer = normalizers.Sequence(parts)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if kind == "pieces" else [])])
    # Phi-3's markers of turns take the white space behind them away.
    strips = family == "phi_3"
    backend.add_special_tokens([AddedToken(token, normalized=False, rstrip=strips, special=True) for token in specials])
    if adds_start:
        pair = [(start, backend.token_to_id(start))]
        backend.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=pair)
    names = {"bos_token": start, "eos_token": end, "pad_token": padding}
    names |= {"unk_token": "<unk>"} if "<unk>" in specials else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{key: value for key, value in names.items() if value})


def save_language_model(family: str, folder: Path) -> Path:
    """Writes model and tokenizer; the table of Qwen3 has spare rows, as the released one."""
    tokenizer = build_family_tokenizer(family)
    kind, tied, _, _ = FAMILIES[family]
    rows = len(tokenizer) + (20 if family == "qwen3" else 0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512} if kind == "gpt2" else SIZES
    config = AutoConfig.for_model(
        kind,
        **sizes,
        vocab_size=rows,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tower(name: str, folder: Path) -> Path:
    """Writes a tower of four stages; a timm model as its repository on the Hub."""
    torch.manual_seed(0)
    sizes = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 8, 16, 24]}
    configs = {"convnext": ConvNextConfig, "convnextv2": ConvNextV2Config, "dinov3_convnext": DINOv3ConvNextConfig}
    if name in configs:
        AutoModel.from_config(configs[name](**sizes)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}).save_pretrained(folder)
        return folder
    if name in ("clip", "siglip"):
        config_class = CLIPVisionConfig if name == "clip" else SiglipVisionConfig
        vit = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        AutoModel.from_config(config_class(**vit, image_size=28, patch_size=14)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
        return folder
    arguments = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24)}
    if not name.startswith("convnext"):
        arguments = {}  # a FastViT comes in its own sizes
    model = timm.create_model(name, num_classes=3, **arguments)
    save_timm(model, folder, architecture=name, model_args=arguments, num_classes=3)
    return folder
