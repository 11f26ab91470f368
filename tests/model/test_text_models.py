"""Causal language models of transformers behind the tower: their own logits, images, caches, tied weights, refusals."""

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, ConvNextConfig

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.model import modeling_convllava
from convllava_hf.model.modeling_convllava import check_text_model


IMAGE = 5
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
# What a family does after or around its layers is set so that leaving it out shows.
TEXT_MODELS = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 8, "tie_word_embeddings": True},
    "smollm3": GROUPED,
    "olmo2": GROUPED,
    "phi": {**GROUPED, "partial_rotary_factor": 0.5},  # a bias in the output layer
    "phi3": GROUPED,
    "stablelm": {**GROUPED, "use_qkv_bias": True},
    "gemma2": {
        **GROUPED,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 2.0,
        "sliding_window": 4,
    },
    "gemma3_text": {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "granite": {**GROUPED, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {**GROUPED, "logit_scale": 0.3},
    "hyperclovax": {**GROUPED, "logits_scaling": 3.0},
    "minicpm3": {
        **SIZES,
        "dim_model_base": 8,  # logits divided by 32 / 8
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {**SIZES, "tie_word_embeddings": True},  # embeddings named embed_in
    "gpt2": {**SIZES, "n_inner": 48},  # tied, embeddings named wte
    "bloom": SIZES,  # no positions; tied, embeddings named word_embeddings
}
EXPERTS = {
    **GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
OLD_GPT = {**SIZES, "n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_inner": 48, "n_positions": 64}
TEXT_MODELS |= {
    "bailing_hybrid": {**EXPERTS, **LATENT, "head_dim": 8, "layer_group_size": 2, "first_k_dense_replace": 1},
    "codegen": OLD_GPT,
    "cohere2": {**GROUPED, "sliding_window": 8},
    "deepseek_v3": {**EXPERTS, **LATENT, "first_k_dense_replace": 1},
    "ernie4_5": {**GROUPED, "head_dim": 8},
    "exaone4": {**GROUPED, "sliding_window": 8},
    "falcon": SIZES,
    "gemma": {**GROUPED, "head_dim": 8},
    "glm": {**GROUPED, "head_dim": 8},
    "glm4": {**GROUPED, "head_dim": 8},
    "gpt_neo": {
        **SIZES,
        "num_heads": 4,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_oss": {**EXPERTS, "head_dim": 8, "sliding_window": 8},
    "gptj": OLD_GPT,
    "granitemoe": EXPERTS,
    "helium": {**GROUPED, "head_dim": 8},
    "kimi_linear": {
        **EXPERTS,
        **LATENT,
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
        },
    },
    "lfm2": {**GROUPED, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    "mixtral": EXPERTS,
    "mpt": {**SIZES, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "nemotron": GROUPED,
    "nemotron_h": {
        **GROUPED,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "head_dim": 8,
        "chunk_size": 8,
    },
    "olmo": GROUPED,
    "olmo3": GROUPED,
    "olmoe": EXPERTS,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": SIZES,
    "qwen2_moe": EXPERTS,
    "qwen3_5_text": {**GROUPED, **LINEAR},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "qwen3_next": {**EXPERTS, **LINEAR},
    "seed_oss": {**GROUPED, "head_dim": 8},
    "starcoder2": GROUPED,
}
# These run by default; the others are slow only by their number.
COMMON = ("gemma2", "gpt2", "granite", "llama", "phi", "qwen3", "qwen3_moe")


def build_config(text: str) -> ConvLlavaConfig:
    """A configuration with a tiny four-stage tower (32 pixels a token) and the text model of that type."""
    if text not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {text}")
    vision = ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 8, 16, 24], layer_scale_init_value=1.0)
    text_config = AutoConfig.for_model(text, **TEXT_MODELS[text])
    return ConvLlavaConfig(vision_config=vision, text_config=text_config, image_token_id=IMAGE)


@pytest.fixture(params=[pytest.param(t, marks=[] if t in COMMON else pytest.mark.slow) for t in TEXT_MODELS])
def text(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(text: str) -> ConvLlavaForConditionalGeneration:
    torch.manual_seed(0)
    model = ConvLlavaForConditionalGeneration(build_config(text)).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.fixture
def input_ids() -> torch.Tensor:
    """Two rows of 10 tokens, none of them special."""
    return torch.randint(6, 96, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def image_inputs(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows with an image of 64 x 64 pixels each, four tokens."""
    input_ids = input_ids.clone()
    input_ids[:, 2:6] = IMAGE
    pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}


@torch.no_grad()
def test_text_alone_gives_the_logits_of_the_models_own_class(text, model, input_ids):
    own = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    own.base_model.load_state_dict(model.model.language_model.state_dict())
    own.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    expected = own(input_ids).logits
    assert expected.std() > 0.02
    torch.testing.assert_close(model(input_ids=input_ids).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_reach_the_text_and_the_cache_changes_nothing(model, image_inputs):
    logits = model(**image_inputs).logits
    other = model(**{**image_inputs, "pixel_values": image_inputs["pixel_values"].flip(0)}).logits
    assert torch.equal(logits[:, :2], other[:, :2])  # what comes before the image
    assert not torch.allclose(logits[:, 6:], other[:, 6:], atol=1e-4)

    # Random weights may well generate the placeholder, which stands for an image that does not exist.
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    cached = model.generate(**image_inputs, **settings)
    assert cached.shape == (2, 16)
    assert torch.equal(cached, model.generate(**image_inputs, **settings, use_cache=False))


@torch.no_grad()
def test_weights_and_their_ties_survive_saving(text, model, image_inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = ConvLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded(**image_inputs).logits, model(**image_inputs).logits)
    tied = AutoModelForCausalLM.from_config(model.config.text_config)
    tied = tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    for instance in (model, loaded):
        assert (instance.lm_head.weight is instance.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in saved) == (not tied)


@pytest.mark.parametrize(
    "text, obstacle",
    [
        ({"model_type": "bert"}, "output layer"),
        ({"model_type": "mamba"}, "past_key_values"),
        ({"model_type": "bart"}, "encoder"),
        ({"model_type": "bart", "is_encoder_decoder": False}, "past_key_values"),
        ({"model_type": "minimax"}, "cache of its own"),
        ({"model_type": "recurrent_gemma"}, "cache of its own"),
        ({"model_type": "falcon_h1"}, "scales embeddings"),
        ({"model_type": "gemma3n_text"}, "token ids"),
        ({"model_type": "deepseek_v4"}, "token ids"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"model_type": "gemma3"}, "pass its text configuration"),
    ],
)
def test_text_models_that_would_run_wrongly_are_refused(text, obstacle):
    with pytest.raises(ValueError, match=f"'{text['model_type']}'.*{obstacle}"), torch.device("meta"):
        ConvLlavaForConditionalGeneration(ConvLlavaConfig(text_config=text, image_token_id=IMAGE))


def test_text_models_that_nobody_compared_are_said_to_be(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_convllava.logger, "warning_once", said.append)
    check_text_model(build_config("llama"))
    assert not said
    monkeypatch.setattr(modeling_convllava, "TESTED_TEXT_MODELS", ("phi",))
    check_text_model(build_config("llama"))
    assert len(said) == 1 and "'llama'" in said[0]


def test_the_list_of_compared_text_models_is_that_of_this_test():
    assert set(modeling_convllava.TESTED_TEXT_MODELS) == set(TEXT_MODELS)


# ---- mixtures of experts


def test_the_loss_that_balances_experts_is_the_models_own(input_ids):
    torch.manual_seed(0)
    config = build_config("qwen3_moe")
    config.text_config.router_aux_loss_coef = 0.5
    model = ConvLlavaForConditionalGeneration(config).eval()
    own = AutoModelForCausalLM.from_config(config.text_config).eval()
    own.base_model.load_state_dict(model.model.language_model.state_dict())
    own.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
    plain = model(**inputs)
    assert plain.aux_loss is None and plain.router_logits is None
    found, expected = model(**inputs, output_router_logits=True), own(**inputs, output_router_logits=True)
    assert len(found.router_logits) == len(expected.router_logits) == 2
    assert found.loss > plain.loss + 0.1
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss)
    config.text_config.output_router_logits = True
    torch.testing.assert_close(model(**inputs).loss, expected.loss)


def test_scores_of_experts_are_refused_where_there_are_none(input_ids):
    model = ConvLlavaForConditionalGeneration(build_config("llama"))
    with pytest.raises(ValueError, match="output_router_logits.*'llama'"):
        model(input_ids=input_ids, output_router_logits=True)


def test_text_models_with_embeddings_of_another_width_are_refused():
    text = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 1}
    vision = ConvNextConfig(num_stages=5, depths=[1] * 5, hidden_sizes=[8, 8, 16, 16, 24])
    config = ConvLlavaConfig(
        vision_config=vision, text_config={**text, "vocab_size": 96, "num_attention_heads": 4}, image_token_id=IMAGE
    )
    with pytest.raises(ValueError, match="embeddings of width 16 and layers of width 32"):
        ConvLlavaForConditionalGeneration(config)
