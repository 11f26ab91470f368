"""Files for llama.cpp: `model.gguf`, the language model and its tokenizer, and `mmproj.gguf`, tower and projector.

llama.cpp knows LLaVA's towers, CLIP and SigLIP, and no ConvNeXt: of a ConvLLaVA the language model alone can go.
Everything is written in float32; llama.cpp's own `llama-quantize` makes it smaller.

Source of the layout: ggml-org/llama.cpp, `conversion/` (`llama.py`, `phi.py`, `stablelm.py`), `tools/mtmd/clip.cpp` and
`tools/mtmd/models/llava.cpp`.
"""

import json
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..checkpoints.weight_maps import ConversionError


# Language models and what llama.cpp calls their architecture.
TEXT_MODELS = {"llama": "llama", "mistral": "llama", "phi": "phi2", "stablelm": "stablelm"}
# By tower: its activation where the configuration names none, and which of its features llama.cpp projects.
TOWERS = {"clip_vision_model": ("quick_gelu", "default"), "siglip_vision_model": ("gelu_pytorch_tanh", "full")}
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
EMBEDDING_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
BLOCK_NAMES = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
CONVOLUTIONAL_TOWER = (
    "mmproj.gguf: llama.cpp has no ConvNeXt, so model.gguf reads text and no images. For images use --to onnx, "
    "openvino or web."
)

CLASS_TOKEN = (
    "nothing, but llama.cpp itself reads CLIP's class token in the place of a patch and gives every patch the position "
    "of its neighbour (ggml-org/llama.cpp#25814). Until that is mended there, answers about images differ from the "
    "checkpoint's; answers to text do not."
)


def check_gguf(stored: dict) -> None:
    """Refuses what llama.cpp does not know, by the checkpoint's config.json alone.

    Args:
        stored: its content.

    Raises:
        ConversionError: the language model, its position encoding, the tower, the features taken from it or the
            projector's activation is unknown there.
    """
    text, vision = stored.get("text_config", {}), stored.get("vision_config", {})
    kind = text.get("model_type", "llama")
    if kind not in TEXT_MODELS:
        raise ConversionError(
            f"text_config.model_type={kind!r} cannot go to gguf; expected one of {', '.join(TEXT_MODELS)}. For others "
            "use --to onnx or openvino."
        )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConversionError(f"rope_parameters={rope} cannot go to gguf; expected rope_type 'default'.")
    if text.get("qk_layernorm"):
        raise ConversionError("text_config.qk_layernorm=True cannot go to gguf; expected False.")
    if stored.get("model_type") != "llava":
        return
    tower = vision.get("model_type")
    activation, strategy = TOWERS.get(tower, (None, None))
    expected = {
        "vision_config.model_type": (tower, tuple(TOWERS)),
        "vision_config.hidden_act": (vision.get("hidden_act", activation), ACTIVATIONS),
        "vision_feature_select_strategy": (stored.get("vision_feature_select_strategy", "default"), (strategy,)),
        "projector_hidden_act": (stored.get("projector_hidden_act", "gelu"), ("gelu", "linear")),
    }
    for name, (value, known) in expected.items():
        if value not in known:
            raise ConversionError(f"{name}={value!r} cannot go to gguf; expected {' or '.join(known)}.")
    if not isinstance(stored.get("vision_feature_layer", -2), int):
        raise ConversionError(f"vision_feature_layer={stored['vision_feature_layer']} cannot go to gguf; expected one.")


def write_gguf(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> tuple[dict[str, int], str]:
    """Writes the files for llama.cpp.

    Args:
        model: the checkpoint in float32 on the CPU, accepted by `check_gguf`.
        processor: the checkpoint's.
        folder: where the files go.

    Returns:
        Bytes of each file, and what is missing, in a sentence.

    Raises:
        ConversionError: a tokenizer that splits text as neither SentencePiece nor GPT-2 does, or a weight without a
            name in llama.cpp.
    """
    write_language_model(model, processor, folder / "model.gguf")
    missing = CONVOLUTIONAL_TOWER
    if model.config.model_type == "llava":
        write_image_encoder(model, processor, folder / "mmproj.gguf")
        missing = CLASS_TOKEN if model.config.vision_config.model_type == "clip_vision_model" else ""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.gguf"))}, missing


def write_language_model(model: PreTrainedModel, processor: ProcessorMixin, path: Path) -> None:
    """Writes the language model and its tokenizer; arguments as for `write_gguf`."""
    import gguf

    config = model.config.get_text_config()
    architecture = TEXT_MODELS[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(int(width * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "llama":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(getattr(config, "use_parallel_residual", True))
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, processor, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    weights = {f"model.{name}": weight for name, weight in model.model.language_model.state_dict().items()}
    weights |= {f"lm_head.{name}": weight for name, weight in model.get_output_embeddings().state_dict().items()}
    if architecture == "phi2":  # llama.cpp wants the bias of Phi's scores, which a LLaVA on Phi does not have
        weights.setdefault("lm_head.bias", torch.zeros(config.vocab_size))
    for name, weight in weights.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ConversionError(f"the weight {name} has no name in llama.cpp's architecture {architecture!r}.")
        for part, count in (("q_proj", heads), ("k_proj", key_value_heads)):
            if architecture == "llama" and f"{part}." in name:
                weight = _interleave_rotary(weight, count)
        writer.add_tensor(target, _to_array(weight))
    _close(writer)


def _add_tokenizer(writer, processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Adds the vocabulary of a SentencePiece BPE, whose merges are the order of its pieces, or of GPT-2's kind."""
    import gguf

    tokenizer = processor.tokenizer
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    before = stored["pre_tokenizer"] or {}
    sentencepiece = stored["model"].get("byte_fallback", False)
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
    if stored["model"]["type"] != "BPE" or not (sentencepiece or (plain and stored["normalizer"] is None)):
        raise ConversionError(
            f"the tokenizer ({type(tokenizer).__name__}) splits text neither as SentencePiece with byte fallback nor "
            "as GPT-2 does, the only kinds that are exported to gguf. Use --to onnx or openvino."
        )
    added = {token["id"]: token for token in stored["added_tokens"]}
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    tokens, scores, types = [], [], []
    for index in range(config.vocab_size):
        piece, kind = pieces.get(index), gguf.TokenType.NORMAL
        if piece is None:
            piece, kind = f"[PAD{index}]", gguf.TokenType.UNUSED
        elif index == tokenizer.unk_token_id:
            kind = gguf.TokenType.UNKNOWN
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        elif piece.startswith("<0x") and piece.endswith(">"):
            kind = gguf.TokenType.BYTE
        tokens.append(piece.encode())
        scores.append(-float(index))
        types.append(kind)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if sentencepiece:
        writer.add_add_space_prefix(True)
    else:
        merges = stored["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if isinstance(processor.chat_template, str):
        writer.add_chat_template(processor.chat_template)


def write_image_encoder(model: PreTrainedModel, processor: ProcessorMixin, path: Path) -> None:
    """Writes the tower up to the layer that LLaVA reads, and the projector; arguments as for `write_gguf`."""
    import gguf

    config, vision = model.config, model.config.vision_config
    layer = config.vision_feature_layer
    layers = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer  # -1 is behind the last
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", vision.hidden_act != "quick_gelu")
    writer.add_uint32("clip.vision.image_size", vision.image_size)
    writer.add_uint32("clip.vision.patch_size", vision.patch_size)
    writer.add_uint32("clip.vision.embedding_length", vision.hidden_size)
    writer.add_uint32("clip.vision.feed_forward_length", vision.intermediate_size)
    writer.add_uint32("clip.vision.projection_dim", config.get_text_config().hidden_size)
    writer.add_uint32("clip.vision.attention.head_count", vision.num_attention_heads)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_uint32("clip.vision.block_count", layers)
    # Where this is not said, llama.cpp runs one block fewer than the file has.
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_array("clip.vision.image_mean", list(processor.image_processor.image_mean))
    writer.add_array("clip.vision.image_std", list(processor.image_processor.image_std))
    tower = {name.removeprefix("vision_model."): w for name, w in model.model.vision_tower.state_dict().items()}
    tensors = {target: tower[name] for name, target in EMBEDDING_NAMES.items() if name in tower}
    for index in range(layers):
        for name, target in BLOCK_NAMES.items():
            for kind in ("weight", "bias"):
                tensors[f"v.blk.{index}.{target}.{kind}"] = tower[f"encoder.layers.{index}.{name}.{kind}"]
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    inner, inner_bias, outer = first.weight, first.bias, second.weight
    if config.projector_hidden_act == "linear":
        # LLaVA v0 has nothing between the two, and llama.cpp always puts GELU there: gelu(x) - gelu(-x) is x.
        inner, inner_bias = torch.cat([inner, -inner]), torch.cat([inner_bias, -inner_bias])
        outer = torch.cat([outer, -outer], dim=1)
    tensors |= {"mm.0.weight": inner, "mm.0.bias": inner_bias, "mm.2.weight": outer, "mm.2.bias": second.bias}
    for name, weight in tensors.items():
        writer.add_tensor(name, _to_array(weight))
    _close(writer)


def _interleave_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order: it rotates neighbours, transformers halves."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])  # (heads, 2, width / 2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)


def _to_array(weight: torch.Tensor):
    return weight.detach().float().contiguous().numpy()


def _close(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
