"""Names of weights: for each original family a table from its names to those of the model it becomes.

Notation: a rule is `template: target`. In a template, `{x}` stands for one integer, which reaches the target under the
same name, and `{rest}` for whatever follows. A target is a name, or [`Dropped`] with the reason. A rule without
`{rest}` goes before one with it; else exactly one rule must match a name, so the order of the rules never matters.
"""

import re
from dataclasses import dataclass


class ConversionError(ValueError):
    """Weights, a configuration or a place that cannot be converted from or to; says what, why and what to do."""


def describe_cause(error: Exception, limit: int = 300) -> str:
    """What an error of a library says, in one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


@dataclass(frozen=True)
class Dropped:
    """What becomes of a weight that the new model has no place for: `reason` is written to the conversion report."""

    reason: str


def _compile(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    pattern = re.escape(parts[0])
    for field, literal in zip(parts[1::2], parts[2::2], strict=True):
        pattern += f"(?P<{field}>{'.+' if field == 'rest' else '[0-9]+'}){re.escape(literal)}"
    return re.compile(pattern)


class WeightMap:
    """A table of rules for the names of one kind of checkpoint.

    Args:
        kind (`str`): what the table reads, for messages, for example `"a timm ConvNeXt"`.
        rules (`dict[str, str | Dropped]`): see the notation of this module.
    """

    def __init__(self, kind: str, rules: dict[str, str | Dropped]):
        self.kind = kind
        self.rules = rules
        self._exact = [(_compile(rule), target) for rule, target in rules.items() if "{rest}" not in rule]
        self._open = [(_compile(rule), target) for rule, target in rules.items() if "{rest}" in rule]

    def rename(self, name: str) -> str | Dropped:
        """Looks a name up.

        Args:
            name: name of a weight in the original checkpoint.

        Returns:
            Its new name, or [`Dropped`].

        Raises:
            ConversionError: no rule matches the name, or more than one does.
        """
        for rules in (self._exact, self._open):
            found = [(match, target) for pattern, target in rules if (match := pattern.fullmatch(name))]
            if len(found) > 1:
                raise ConversionError(f"the table of {self.kind} has {len(found)} rules for {name!r}; expected one.")
            if found:
                match, target = found[0]
                return target if isinstance(target, Dropped) else target.format(**match.groupdict())
        raise ConversionError(
            f"unknown weight {name!r}; expected names of {self.kind}, such as {next(iter(self.rules))!r}. Check that "
            "this is the right repository. If the weight belongs to a module that was added to the model, remove it."
        )


def _affine(*modules: str) -> list[str]:
    """`m.weight` and `m.bias` for each module."""
    return [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]


def _pair(names: list[str], targets: list[str]) -> dict[str, str]:
    return dict(zip(names, targets, strict=True))


# transformers' ConvNextModel; the tower of ConvLLaVA has the same names behind `model.vision_tower.`.
CONVNEXT_MAP = {
    **{name: name for name in _affine("embeddings.patch_embeddings", "embeddings.layernorm")},
    **{
        f"encoder.stages.{{s}}.{leaf}": f"encoder.stages.{{s}}.{leaf}"
        for leaf in _affine("downsampling_layer.0", "downsampling_layer.1")
    },
    **{
        f"encoder.stages.{{s}}.layers.{{l}}.{leaf}": f"encoder.stages.{{s}}.layers.{{l}}.{leaf}"
        for leaf in [*_affine("dwconv", "layernorm", "pwconv1", "pwconv2"), "layer_scale_parameter"]
    },
}
POOLED_NORM = {name: name for name in _affine("layernorm")}
CLASSIFIER = Dropped("classification head; a tower's output is its last map")

# ConvNextModel as released in ConvLLaVA-ConvNeXt-*, and the same inside ConvNextForImageClassification.
CONVNEXT = WeightMap(
    "transformers' ConvNeXt",
    {
        **CONVNEXT_MAP,
        **POOLED_NORM,
        **{f"convnext.{name}": target for name, target in {**CONVNEXT_MAP, **POOLED_NORM}.items()},
        **dict.fromkeys(_affine("classifier"), CLASSIFIER),
    },
)

# timm's ConvNeXt, `timm/models/convnext.py`, into ConvNextModel. `head.norm` is the norm of the pooled map.
TIMM_CONVNEXT_RULES = {
    **_pair(_affine("stem.0", "stem.1"), _affine("embeddings.patch_embeddings", "embeddings.layernorm")),
    **_pair(
        _affine("stages.{s}.downsample.0", "stages.{s}.downsample.1"),
        _affine("encoder.stages.{s}.downsampling_layer.0", "encoder.stages.{s}.downsampling_layer.1"),
    ),
    **{
        f"stages.{{s}}.blocks.{{l}}.{leaf}": f"encoder.stages.{{s}}.layers.{{l}}.{target}"
        for leaf, target in _pair(
            [*_affine("conv_dw", "norm", "mlp.fc1", "mlp.fc2"), "gamma"],
            [*_affine("dwconv", "layernorm", "pwconv1", "pwconv2"), "layer_scale_parameter"],
        ).items()
    },
    **_pair(_affine("head.norm"), _affine("layernorm")),
    **dict.fromkeys(_affine("head.pre_logits.fc", "head.fc"), CLASSIFIER),
}
TIMM_CONVNEXT = WeightMap("a timm ConvNeXt", TIMM_CONVNEXT_RULES)

# A CLIP model of open_clip with a timm trunk, `open_clip/timm_model.py`; the text tower in both of its layouts.
CLIP_TEXT = Dropped("text tower of CLIP")
OPEN_CLIP_CONVNEXT = WeightMap(
    "an open_clip CLIP model with a ConvNeXt trunk",
    {
        **{f"visual.trunk.{name}": target for name, target in TIMM_CONVNEXT_RULES.items()},
        "visual.head.{rest}": Dropped("projection of CLIP's image embedding"),
        "text.{rest}": CLIP_TEXT,
        "transformer.{rest}": CLIP_TEXT,
        **dict.fromkeys(["positional_embedding", "token_embedding.weight", "text_projection"], CLIP_TEXT),
        **dict.fromkeys(_affine("ln_final"), CLIP_TEXT),
        **dict.fromkeys(["logit_scale", "logit_bias"], Dropped("scale of CLIP's contrastive loss")),
    },
)

# ConvNextModel into ConvLlavaForConditionalGeneration.
VISION_TOWER = WeightMap(
    "a ConvNeXt tower",
    {
        **{name: f"model.vision_tower.{name}" for name in CONVNEXT_MAP},
        **dict.fromkeys(POOLED_NORM, Dropped("norm of the pooled output; the tower's output is its last map")),
    },
)

LLAMA_LAYER = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *_affine(*(f"self_attn.{projection}_proj" for projection in "qkvo")),
    *_affine(*(f"mlp.{projection}_proj" for projection in ("gate", "up", "down"))),
]
ROTARY_BUFFER = Dropped("buffer, computed from the configuration")
# nn.Sequential counts the activations in between: the original's n-th linear layer has index 2(n - 1).
MAX_PROJECTOR_LAYERS = 8

# LlavaLlamaForCausalLM of alibaba/conv-llava, `llava/model/language_model/llava_llama.py`, into
# ConvLlavaForConditionalGeneration. The vision tower lies in a repository of its own.
CONVLLAVA = WeightMap(
    "a released ConvLLaVA language model",
    {
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        **{f"model.layers.{{l}}.{leaf}": f"model.language_model.layers.{{l}}.{leaf}" for leaf in LLAMA_LAYER},
        "model.layers.{l}.self_attn.rotary_emb.inv_freq": ROTARY_BUFFER,
        **_pair(_affine("model.mm_projector"), _affine("model.multi_modal_projector.linear_1")),
        **{
            f"model.mm_projector.{2 * n}.{leaf}": f"model.multi_modal_projector.linear_{n + 1}.{leaf}"
            for n in range(MAX_PROJECTOR_LAYERS)
            for leaf in ("weight", "bias")
        },
    },
)


# A vision transformer of CLIP or SigLIP, alone or in the repository of the whole model, as transformers saves it.
# Which of these weights there are, the configuration says.
NO_IMAGE_EMBEDDING = Dropped("not in the vision tower's features")
VIT = WeightMap(
    "a CLIP or SigLIP model",
    {
        **{
            f"vision_model.{name}": f"vision_tower.vision_model.{name}"
            for name in [
                "embeddings.class_embedding",
                "embeddings.position_embedding.weight",
                *_affine("embeddings.patch_embedding", "pre_layrnorm", "post_layernorm"),
                *(
                    f"encoder.layers.{{l}}.{leaf}"
                    for leaf in _affine(
                        *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
                        *(f"self_attn.{projection}_proj" for projection in ("q", "k", "v", "out")),
                    )
                ),
            ]
        },
        "vision_model.embeddings.position_ids": ROTARY_BUFFER,
        "vision_model.head.{rest}": NO_IMAGE_EMBEDDING,
        "text_model.{rest}": CLIP_TEXT,
        **dict.fromkeys(["visual_projection.weight", "text_projection.weight"], NO_IMAGE_EMBEDDING),
        **dict.fromkeys(["logit_scale", "logit_bias"], NO_IMAGE_EMBEDDING),
    },
)

# The LLaVA family (LLaVA, LLaVAR, TinyLLaVA) into the names under which LlavaForConditionalGeneration is published.
# Llama, Phi and StableLM differ in the leaves; which of them there are, the configuration says.
LLAVA = WeightMap(
    "a checkpoint of the LLaVA family",
    {
        "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        **{name: f"language_model.{name}" for name in _affine("model.norm", "model.final_layernorm", "lm_head")},
        **{
            f"model.layers.{{l}}.{leaf}": f"language_model.model.layers.{{l}}.{leaf}"
            for leaf in [
                *LLAMA_LAYER,
                *("input_layernorm.bias", "post_attention_layernorm.bias"),
                *_affine("self_attn.dense", "mlp.fc1", "mlp.fc2"),
            ]
        },
        "model.layers.{l}.self_attn.rotary_emb.inv_freq": ROTARY_BUFFER,
        **{
            f"model.mm_projector.{name}": f"multi_modal_projector.{target}"
            for name, target in {
                **_pair(["weight", "bias"], _affine("linear_1")),
                **_pair(_affine("0", "2"), _affine("linear_1", "linear_2")),
            }.items()
        },
        "model.image_newline": "image_newline",
        "model.vision_tower.{rest}": Dropped("copy of the vision tower; the tower's own repository is read, as before"),
    },
)

# The same with a tower that was trained: it is taken from the checkpoint, as the original's loader does.
OWN_TOWER = "model.vision_tower.vision_tower."
LLAVA_WITH_TOWER = WeightMap(
    "a checkpoint of the LLaVA family with a tower of its own",
    {
        **{name: target for name, target in LLAVA.rules.items() if not name.startswith("model.vision_tower.")},
        **{f"{OWN_TOWER}{name}": target for name, target in VIT.rules.items()},
    },
)

# TinyLLaVA Factory, `tinyllava/model/modeling_tinyllava.py`: everything in one checkpoint, under names of its own.
FACTORY = WeightMap(
    "a checkpoint of TinyLLaVA Factory",
    {
        "language_model.{rest}": "{rest}",
        "connector._connector.{rest}": "model.mm_projector.{rest}",
        "vision_tower._vision_tower.{rest}": f"{OWN_TOWER}{{rest}}",
    },
)

# LlavaForConditionalGeneration in memory, and as it is published: older versions and servers know the latter.
LLAVA_PUBLISHED = WeightMap(
    "transformers' llava",
    {
        "model.language_model.{rest}": "language_model.model.{rest}",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.multi_modal_projector.{rest}": "multi_modal_projector.{rest}",
        "model.vision_tower.{rest}": "vision_tower.vision_model.{rest}",
        "model.image_newline": "image_newline",
    },
)


def build_causal_lm_map(base: str, head: str) -> WeightMap:
    """Table of any causal language model of transformers into ConvLlavaForConditionalGeneration.

    Args:
        base: name of the model without its output layer, `base_model_prefix` of its class; `"model"` for Llama.
        head: name of the output layer; `"lm_head"` for Llama.

    Returns:
        The table. It checks no more than these two names: the configuration says which weights there are.
    """
    return WeightMap(
        "a causal language model",
        {
            f"{base}.{{rest}}": "model.language_model.{rest}",
            f"{base}.layers.{{l}}.self_attn.rotary_emb.inv_freq": ROTARY_BUFFER,
            **_pair(_affine(head), _affine("lm_head")),
        },
    )
