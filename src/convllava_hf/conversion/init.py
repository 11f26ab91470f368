"""Makes a new model from a tower and a language model, ready for the first training stage."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..checkpoints.turn_ends import find_turn_end, find_turn_problem
from ..checkpoints.weight_maps import ConversionError, WeightMap
from ..shipped import build_chat_template, read_chat_template
from .llava_family import JoinedLlava, is_vit, read_vit
from .models import make_fresh, write_convllava
from .sources import LanguageModel, Tower, find_source, read_causal_lm, read_tower
from .vocabulary import add_chat_tokens
from .writer import CheckpointWriter, ConversionReport


# Which template a tokenizer is made for: the first whose tokens it has, with the token that ends its texts where only
# this one tells. Words that end in `</s>` and have no format of their own take the one that ConvLLaVA was trained with.
CHAT_TEMPLATES = (
    ("llama_3", {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}, None),
    ("phi_3", {"<|user|>", "<|assistant|>", "<|end|>"}, None),
    ("gemma", {"<start_of_turn>", "<end_of_turn>"}, None),
    ("mistral_v3", {"[INST]", "[/INST]"}, "</s>"),
    ("vicuna_v1", set(), "</s>"),
    ("chatml", {"<|im_start|>", "<|im_end|>"}, None),
    ("phi", set(), "<|endoftext|>"),
)
# Of any other tokenizer, which gets the tokens of this template.
DEFAULT_CHAT_TEMPLATE = "chatml"
# LanguageModel's names into those under which transformers' llava is published.
LLAVA_TEXT = WeightMap(
    "a causal language model",
    {
        "model.language_model.{rest}": "language_model.model.{rest}",
        "lm_head.{rest}": "language_model.lm_head.{rest}",
    },
)
PROJECTOR = "multi_modal_projector."
FINAL_NORM = "layer_norm."  # of DINOv3's ConvNeXt, over its last map


class NewLlava(JoinedLlava):
    """A ViT and a language model that meet for the first time: the projector comes from `seed`."""

    def __init__(self, tower: Tower, language: LanguageModel, source_config: dict, seed: int):
        super().__init__(tower, language, source_config)
        self.seed = seed

    def fresh(self, name: str) -> Callable[[], torch.Tensor] | None:
        if (identity := super().fresh(name)) is not None:
            return identity
        return partial(make_fresh, self.model, f"model.{name}", self.seed) if name.startswith(PROJECTOR) else None


def init_model(
    vision: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    resolution: int | None = None,
    add_stage: str | None = None,
    projector_type: str = "mlp2x_gelu",
    chat_template: str | None = None,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    force: bool = False,
    seed: int = 0,
) -> ConversionReport:
    """Builds a new model from a tower and a language model, ready for stage 1: projector and added stage are fresh.

    Args:
        vision: Hub id or folder of a tower. With a ConvNeXt, ConvNeXt V2 or DINOv3 ConvNeXt of transformers, or a
            ConvNeXt, ConvNeXt V2 or FastViT of timm, the result is a [`ConvLlavaForConditionalGeneration`]; with CLIP
            or SigLIP it is transformers' `LlavaForConditionalGeneration`.
        text: Hub id or folder of a causal language model of transformers.
        output: folder to make.
        resolution: side of the square images in pixels, a multiple of the tower's downsampling factor. Default: the
            tower's; CLIP and SigLIP take no other.
        add_stage: `"BLOCKSxWIDTH"`, a stage to put behind the last of a tower of four, for example `"6x3072"`.
        projector_type: `"mlpNx_gelu"` or `"linear"`.
        chat_template: name of a template of this package. Default: the one of the language model's family, by the
            tokens of its tokenizer; `"chatml"`, with its tokens added, for one that has none.
        vision_revision, text_revision: branch, tag or commit on the Hub.
        dtype, max_shard_size, force: as for [`convert_checkpoint`].
        seed: of the fresh weights. Each tensor depends on the seed and its name alone.

    Returns:
        The report; it also lies in the output.

    Raises:
        ConversionError: as for [`convert_checkpoint`]; also parts that do not fit together, or a template whose answers
            end in no end token of the tokenizer.
    """
    writer = CheckpointWriter(output, dtype, max_shard_size, force)
    stage = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", add_stage or "1x1")
    if not stage:
        raise ConversionError(f"add_stage={add_stage!r}; expected BLOCKSxWIDTH, for example '6x3072'.")
    if chat_template is not None:
        read_chat_template(chat_template)
    fix = "Pass --vision and --text with a Hub id or a folder each."
    source = find_source(vision, vision_revision, "vision tower", fix)
    is_llava = is_vit(source)
    tower = read_vit(source) if is_llava else read_tower(source, others=True)
    fresh = ["model.multi_modal_projector."]
    if add_stage is not None:
        fresh.extend(_add_stage(tower, int(stage[1]), int(stage[2])))
    if is_llava and resolution not in (None, tower.image_size):
        raise ConversionError(
            f"resolution={resolution}; {source.name} takes images of {tower.image_size} pixels alone, as its patches "
            "have learned positions. Leave the resolution out, or pass a ConvNeXt, which takes any."
        )
    resolution = resolution or tower.image_size

    language = read_causal_lm(find_source(text, text_revision, "language model", fix))
    language.chat_template = _choose_chat_template(language, chat_template)
    content = {"kind": "new model", "seed": seed}
    if is_llava:
        return _write_llava(writer, content, tower, language, projector_type)
    tower.config.image_size = resolution
    return write_convllava(writer, content, tower, language, projector_type, resolution, tuple(fresh))


def _add_stage(tower: Tower, blocks: int, width: int) -> list[str]:
    """Puts a stage behind a tower's last; returns what the names of the weights begin with that are new by it."""
    config = tower.config
    depths = getattr(config, "depths", None)
    if not depths or len(depths) != 4:
        what = f"{len(depths)} stages" if depths else f"the type {config.model_type!r}, which grows by no stage"
        raise ConversionError(
            f"--add-stage puts a fifth stage behind the fourth of a ConvNeXt, ConvNeXt V2 or DINOv3 ConvNeXt; "
            f"{tower.source.name} has {what}. Leave --add-stage out."
        )
    values = config.to_dict()
    derived = ("model_type", "architectures", "transformers_version", "dtype", "stage_names", "out_features")
    derived += ("out_indices",)
    values = {key: value for key, value in values.items() if key not in derived and not key.startswith("_")}
    values |= {"depths": [*depths, blocks], "hidden_sizes": [*config.hidden_sizes, width]}
    if "num_stages" in values:
        values["num_stages"] = len(depths) + 1
    tower.config = type(config)(**values)
    first = next(target for target in tower.source.targets if "stages.3." in target)
    fresh = [f"model.vision_tower.{first.partition('stages.3.')[0]}stages.4."]
    for target in [target for target in tower.source.targets if target.startswith(FINAL_NORM)]:
        tower.source.dropped[tower.source.targets.pop(target)] = "norm of the last map, which is that of the new stage"
        fresh.append(f"model.vision_tower.{target}")
    return fresh


def _choose_chat_template(language: LanguageModel, name: str | None) -> str:
    """The template of a language model's family, or the one asked for; gives the tokenizer the tokens that it lacks.

    Raises:
        ConversionError: answers in the template that was asked for would not end in an end token.
    """
    tokenizer = language.tokenizer
    words = tokenizer.get_vocab()
    fitting = [
        template
        for template, tokens, eos in CHAT_TEMPLATES
        if tokens <= words.keys() and eos in (None, tokenizer.eos_token)
    ]
    chosen = name or next(iter(fitting), DEFAULT_CHAT_TEMPLATE)
    add_chat_tokens(language, chosen)
    template = build_chat_template(tokenizer, chosen)
    # What ends an answer becomes one of the ends of generation, see `models`.
    problem = find_turn_problem(tokenizer, template, [find_turn_end(tokenizer, template).token_id])
    if problem:
        fits = ", ".join(dict.fromkeys([*fitting, DEFAULT_CHAT_TEMPLATE]))
        raise ConversionError(
            f"chat_template={chosen!r} does not fit the tokenizer of {language.source.name}: {problem}. Pass "
            f"--chat-template with one of {fits} ({DEFAULT_CHAT_TEMPLATE} brings its tokens), or leave it out."
        )
    return chosen


def _write_llava(
    writer: CheckpointWriter, content: dict, tower: Tower, language: LanguageModel, projector_type: str
) -> ConversionReport:
    """Joins a CLIP or SigLIP tower and a language model into transformers' `llava`."""
    if projector_type not in ("linear", "mlp2x_gelu"):
        raise ConversionError(
            f"projector_type={projector_type!r}; expected 'linear' or 'mlp2x_gelu', which transformers' llava has."
        )
    language.source.rename(LLAVA_TEXT)
    language.embeddings = LLAVA_TEXT.rename(language.embeddings)
    language.head = "language_model.lm_head"
    settings = {"mm_projector_type": projector_type, "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    return NewLlava(tower, language, settings, content["seed"]).write(writer, content)
