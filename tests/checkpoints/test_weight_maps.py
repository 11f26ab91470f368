"""The tables of weight names: against the real classes of transformers and timm, and against names that must not pass.

Models are built on the meta device; only the comparison with timm computes anything.
"""

import re

import pytest
import timm
import torch
from transformers import (
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    Qwen2Config,
)

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.checkpoints.weight_maps import (
    CONVLLAVA,
    CONVNEXT,
    LLAVA,
    LLAVA_PUBLISHED,
    OPEN_CLIP_CONVNEXT,
    TIMM_CONVNEXT,
    VISION_TOWER,
    VIT,
    ConversionError,
    Dropped,
    WeightMap,
    build_causal_lm_map,
)


TABLES = [
    *(CONVLLAVA, CONVNEXT, TIMM_CONVNEXT, OPEN_CLIP_CONVNEXT, VISION_TOWER, LLAVA, LLAVA_PUBLISHED, VIT),
    build_causal_lm_map("model", "lm_head"),
]
# Configurations of the released models: Vicuna-7B v1.5, and ConvNeXt-L with its fifth stage.
VICUNA_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
CONVNEXT_L = {"num_stages": 5, "depths": [3, 3, 27, 3, 6], "hidden_sizes": [192, 384, 768, 1536, 3072]}


def build_meta(model_class, config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's state dict, without memory for it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}


def fill(template: str) -> str:
    """A name that a template stands for."""
    return re.sub(r"\{\w+\}", "7", template.replace("{rest}", "a.b"))


def rename_all(names, *tables) -> tuple[dict[str, str], dict[str, str]]:
    """What the tables make of the names: new name -> old name, and old name -> why it is dropped."""
    targets, dropped = {}, {}
    for name in names:
        target = name
        for table in tables:
            target = table.rename(target)
            if isinstance(target, Dropped):
                dropped[name] = target.reason
                break
        else:
            assert target not in targets, f"{name} and {targets[target]} become {target}"
            targets[target] = name
    return targets, dropped


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.kind)
def test_every_rule_matches_and_none_overlaps(table):
    for template, target in table.rules.items():
        expected = target if isinstance(target, Dropped) else fill(target)
        assert table.rename(fill(template)) == expected


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.kind)
def test_names_must_match_from_end_to_end(table):
    for template in table.rules:
        if "{rest}" in template or template.startswith("convnext."):
            continue
        name = fill(template)
        for wrong in (
            f"x{name}",
            f"x.{name}",
            f"{name}x",
            f"{name}.x",
            name.replace(".", "_"),
            name.upper(),
            f"{name}\n",
        ):
            if wrong == name or (table.kind == "a causal language model" and wrong.startswith("model.")):
                continue
            with pytest.raises(ConversionError):
                table.rename(wrong)


def test_unknown_name_says_what_was_expected():
    with pytest.raises(ConversionError, match=r"'model\.layers\.0\.adapter\.weight'.*ConvLLaVA.*'model\.embed_tokens"):
        CONVLLAVA.rename("model.layers.0.adapter.weight")
    for name in ("model.layers..mlp.up_proj.weight", "model.layers.-1.mlp.up_proj.weight", "model.layers.²x", ""):
        with pytest.raises(ConversionError, match=re.escape(repr(name))):
            CONVLLAVA.rename(name)


def test_two_rules_for_one_name_are_an_error():
    table = WeightMap("a test", {"a.{x}": "b.{x}", "a.{y}": "c.{y}"})
    with pytest.raises(ConversionError, match=r"2 rules for 'a\.1'"):
        table.rename("a.1")


def test_exact_rules_go_before_open_ones_in_any_order():
    for rules in ({"a.{rest}": "b.{rest}", "a.x": "c"}, {"a.x": "c", "a.{rest}": "b.{rest}"}):
        table = WeightMap("a test", rules)
        assert (table.rename("a.x"), table.rename("a.x.y")) == ("c", "b.x.y")


def test_full_size_release_fills_the_whole_model():
    """Names and shapes of the released 7B model and its tower, converted, are those of our model."""
    language = build_meta(LlamaForCausalLM, LlamaConfig(**VICUNA_7B))
    language |= {"model.mm_projector.0.weight": (4096, 3072), "model.mm_projector.0.bias": (4096,)}
    language |= {"model.mm_projector.2.weight": (4096, 4096), "model.mm_projector.2.bias": (4096,)}
    tower = build_meta(ConvNextModel, ConvNextConfig(**CONVNEXT_L))
    assert (len(language), len(tower)) == (295, 400)
    # Llama-7B as published has 6738415616 parameters; the projector of the release has these on top.
    count = sum(torch.Size(shape).numel() for shape in language.values())
    assert count == 6_738_415_616 + (3072 + 1) * 4096 + (4096 + 1) * 4096

    targets, dropped = rename_all(language, CONVLLAVA)
    shapes = {target: language[name] for target, name in targets.items()}
    assert not dropped
    targets, dropped = rename_all(tower, CONVNEXT, VISION_TOWER)
    shapes |= {target: tower[name] for target, name in targets.items()}
    assert set(dropped) == {"layernorm.weight", "layernorm.bias"}

    config = ConvLlavaConfig(
        vision_config=ConvNextConfig(**CONVNEXT_L), text_config=LlamaConfig(**VICUNA_7B), image_token_id=0
    )
    assert shapes == build_meta(ConvLlavaForConditionalGeneration, config)


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
def test_projectors_of_any_depth(depth):
    old = ["model.mm_projector"] if depth == 1 else [f"model.mm_projector.{2 * layer}" for layer in range(depth)]
    new = [f"model.multi_modal_projector.linear_{layer + 1}" for layer in range(depth)]
    assert [CONVLLAVA.rename(f"{name}.bias") for name in old] == [f"{name}.bias" for name in new]
    with pytest.raises(ConversionError):  # an activation has no weights
        CONVLLAVA.rename("model.mm_projector.1.weight")


def test_old_rotary_buffers_are_dropped():
    for table in (CONVLLAVA, build_causal_lm_map("model", "lm_head")):
        target = table.rename("model.layers.3.self_attn.rotary_emb.inv_freq")
        assert isinstance(target, Dropped) and "buffer" in target.reason


@pytest.mark.parametrize("model_class", [ConvNextModel, ConvNextForImageClassification])
def test_convnext_of_transformers(model_class):
    config = ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32])
    targets, dropped = rename_all(build_meta(model_class, config), CONVNEXT)
    assert set(targets) == set(build_meta(ConvNextModel, config))
    assert set(dropped) == ({"classifier.weight", "classifier.bias"} if "Image" in model_class.__name__ else set())


@pytest.mark.parametrize("options", [{}, {"head_hidden_size": 24}, {"conv_mlp": True}, {"num_classes": 0}])
def test_timm_convnext_computes_the_same(options):
    """timm's features under our names are ConvNextModel's: same epsilon, same GELU, same order of everything."""
    torch.manual_seed(0)
    options = {"num_classes": 5, **options}
    original = timm.create_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), **options).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_(std=0.2)
    state = original.state_dict()
    targets, dropped = rename_all(state, TIMM_CONVNEXT)
    assert all(name.startswith("head.") for name in dropped)

    model = ConvNextModel(ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], layer_norm_eps=1e-6)).eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({target: state[name].reshape(shapes[target]) for target, name in targets.items()})
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features, outputs = original.forward_features(pixels), model(pixels)
        pooled = original.head.norm(features.mean([-2, -1], keepdim=True)).flatten(1)
    assert features.abs().max() > 0.5
    torch.testing.assert_close(outputs.last_hidden_state, features, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.pooler_output, pooled, rtol=0, atol=1e-5)


def test_open_clip_keeps_the_trunk_alone():
    """Names of open_clip 3.3.0's convnext_large_d and convnext_base_w, and of models with a text tower of their own."""
    with torch.device("meta"):
        trunk = timm.create_model("convnext_large", num_classes=0).state_dict()
    block = "transformer.resblocks.11."
    text = ["positional_embedding", "text_projection", "token_embedding.weight", "ln_final.weight", "ln_final.bias"]
    text += [block + name for name in ("ln_1.weight", "attn.in_proj_weight", "attn.out_proj.bias", "mlp.c_fc.weight")]
    text += [f"text.{name}" for name in text]
    heads = ["visual.head.proj.weight", "visual.head.mlp.fc1.weight", "visual.head.mlp.fc1.bias"]
    names = [f"visual.trunk.{name}" for name in trunk]
    targets, dropped = rename_all([*names, *text, *heads, "logit_scale"], OPEN_CLIP_CONVNEXT)
    assert set(targets) == set(
        build_meta(ConvNextModel, ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536]))
    )
    assert set(dropped) == {*text, *heads, "logit_scale"}
    assert {dropped[name] for name in text} == {"text tower of CLIP"}
    with pytest.raises(ConversionError):
        OPEN_CLIP_CONVNEXT.rename("visual.transformer.resblocks.0.ln_1.weight")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48),
        Qwen2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64),
        PhiConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48),
        GPT2Config(n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False),
    ],
    ids=lambda config: config.model_type,
)
def test_causal_language_models(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    targets, dropped = rename_all(model.state_dict(), build_causal_lm_map(model.base_model_prefix, "lm_head"))
    assert not dropped
    whole = build_meta(ConvLlavaForConditionalGeneration, ConvLlavaConfig(text_config=config, image_token_id=0))
    parts = ("model.vision_tower.", "model.multi_modal_projector.")
    assert set(targets) == {name for name in whole if not name.startswith(parts)}
