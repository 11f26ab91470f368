"""Makes a new model from a tower and a language model, ready for the first training stage."""

import re
from pathlib import Path

from transformers import ConvNextConfig

from ..checkpoints.weight_maps import ConversionError
from ..shipped import read_chat_template
from .models import write_convllava
from .sources import CONVNEXT_CONFIG_KEYS, find_source, read_causal_lm, read_tower
from .writer import CheckpointWriter, ConversionReport


def init_model(
    vision: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    resolution: int,
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
        vision: Hub id or folder of a ConvNeXt tower, as for [`convert_checkpoint`].
        text: Hub id or folder of a causal language model of transformers.
        output: folder to make.
        resolution: side of the square images in pixels, a multiple of the tower's downsampling factor.
        add_stage: `"BLOCKSxWIDTH"`, a stage to put behind the tower's last, for example `"6x3072"`.
        projector_type: `"mlpNx_gelu"` or `"linear"`.
        chat_template: name of a template of this package. Default: `"vicuna_v1"` where `</s>` ends a text, `"chatml"`
            where the tokenizer knows `<|im_end|>`.
        vision_revision, text_revision: branch, tag or commit on the Hub.
        dtype, max_shard_size, force: as for [`convert_checkpoint`].
        seed: of the fresh weights. Each tensor depends on the seed and its name alone.

    Returns:
        The report; it also lies in the output.

    Raises:
        ConversionError: as for [`convert_checkpoint`]; also parts that do not fit together.
    """
    writer = CheckpointWriter(output, dtype, max_shard_size, force)
    stage = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", add_stage or "1x1")
    if not stage:
        raise ConversionError(f"add_stage={add_stage!r}; expected BLOCKSxWIDTH, for example '6x3072'.")
    if chat_template is not None:
        read_chat_template(chat_template)
    fix = "Pass --vision and --text with a Hub id or a folder each."
    tower = read_tower(find_source(vision, vision_revision, "vision tower", fix))
    fresh = ["model.multi_modal_projector."]
    if add_stage is not None:
        fresh.append(f"model.vision_tower.encoder.stages.{tower.config.num_stages}.")
        values = {key: getattr(tower.config, key) for key in CONVNEXT_CONFIG_KEYS}
        values["num_stages"] += 1
        values["depths"] = [*tower.config.depths, int(stage[1])]
        values["hidden_sizes"] = [*tower.config.hidden_sizes, int(stage[2])]
        tower.config = ConvNextConfig(**values)
    tower.config.image_size = resolution

    language = read_causal_lm(find_source(text, text_revision, "language model", fix))
    if chat_template is None:
        if language.tokenizer.eos_token == "</s>":
            chat_template = "vicuna_v1"
        elif "<|im_end|>" in language.tokenizer.get_vocab():
            chat_template = "chatml"
        else:
            raise ConversionError(
                f"no chat template fits the tokenizer of {language.source.name}, whose texts end in "
                f"{language.tokenizer.eos_token!r}; expected '</s>', or a token '<|im_end|>'. Pass --chat-template to "
                "choose one all the same."
            )
    content = {"kind": "new model", "seed": seed}
    language.chat_template = chat_template
    return write_convllava(writer, content, tower, language, projector_type, resolution, tuple(fresh))
