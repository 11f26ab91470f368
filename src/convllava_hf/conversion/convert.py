"""Makes checkpoints of ours from the released ones: ConvLLaVA, the LLaVA family, or a vision tower alone."""

from pathlib import Path

import torch
from transformers import CLIPImageProcessor, ConvNextConfig, ConvNextModel

from ..checkpoints.reading import read_json
from ..checkpoints.shapes import check_counts, list_shapes
from ..checkpoints.weight_maps import ConversionError
from ..shipped import read_chat_template
from .finetuned import is_finetuning, put_on_base, write_adapter
from .llava_family import FACTORY_TYPE, JoinedLlava, JoinedLlavaNext, is_vit, read_factory, read_llava_family, read_vit
from .models import write_convllava
from .sources import Tower, find_source, read_llava, read_tower
from .writer import CheckpointWriter, ConversionReport, check_stored, plan_weights


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    vision_tower: str | Path | None = None,
    base: str | Path | None = None,
    keep_adapter: bool = False,
    chat_template: str | None = None,
    revision: str | None = None,
    vision_revision: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> ConversionReport | Path:
    """Converts a checkpoint of ConvLLaVA or of the LLaVA family, a finetuning of LLaVA's code, or a vision tower.

    A language model with `mm_vision_tower` in its configuration becomes a model with its tower, tokenizer, processor
    and chat template: with a ConvNeXt a [`ConvLlavaForConditionalGeneration`] and its code files, with CLIP or SigLIP
    (LLaVA, LLaVAR, TinyLLaVA) transformers' `LlavaForConditionalGeneration`, without code. A tower
    (ConvLLaVA-ConvNeXt-*, LAION-CLIP-ConvNeXt-*, any ConvNeXt of transformers, timm or open_clip) becomes a
    `ConvNextModel` that [`init_model`] takes.

    Args:
        source: Hub id or folder.
        output: folder to make.
        vision_tower: Hub id or folder in place of the configuration's `mm_vision_tower`.
        base: Hub id or folder of the model that a LoRA or a projector was trained on, in its original layout.
        keep_adapter: write a LoRA as a PEFT adapter of `base`, which is a folder of transformers' `llava` then.
        chat_template: name of a template of this package. Default: the one that the checkpoint was trained with.
        revision: branch, tag or commit of `source` on the Hub.
        vision_revision: the same for the tower.
        dtype: `"auto"` (every tensor as it is stored), `"float32"`, `"float16"` or `"bfloat16"`.
        max_shard_size: bytes per weight file, or such as `"5GB"`.
        force: replace `output` if it is the folder of a model.

    Returns:
        The report; it also lies in the output. With `keep_adapter` the folder.

    Raises:
        ConversionError: anything that keeps the result from being complete and exact. Nothing is left at `output`.
    """
    writer = CheckpointWriter(output, dtype, max_shard_size, force)
    if chat_template is not None:
        read_chat_template(chat_template)
    main = find_source(source, revision, "language model", "Pass a Hub id or a folder.")
    config = read_json(main.folder / "config.json") if (main.folder / "config.json").is_file() else {}
    is_factory = config.get("model_type") == FACTORY_TYPE
    if config.get("model_type") == "convllava" or (
        {"text_config", "vision_config"} <= config.keys() and not is_factory
    ):
        kind = config.get("model_type")
        raise ConversionError(f"{main.name} is converted already (its model_type is {kind!r}); use it as it is.")
    finetuned = is_finetuning(main.folder)
    if (base is not None or keep_adapter) and not finetuned:
        raise ConversionError(
            f"{main.name} is no LoRA or projector of LLaVA's code, so it takes no --base. Leave it out."
        )
    if finetuned and base is None:
        known = config.get("_name_or_path") or "its own"
        raise ConversionError(
            f"{main.name} holds what was trained on a base model, without it. Pass --base; config.json says {known!r}."
        )
    if keep_adapter:
        return write_adapter(main, base, writer.output, force)
    if finetuned:
        put_on_base(main, find_source(base, None, "base", "Pass --base with a Hub id or a folder."))
    if is_factory:
        tower, text, settings = read_factory(main, config)
        text.chat_template = chat_template or text.chat_template
        return JoinedLlava(tower, text, settings).write(writer, {"kind": "checkpoint of TinyLLaVA Factory"})
    if not config.get("mm_vision_tower"):
        if vision_tower is not None:
            raise ConversionError(
                f"{main.name} has no 'mm_vision_tower' in its config.json, so it is no ConvLLaVA or LLaVA language "
                f"model and takes no --vision-tower {str(vision_tower)!r}. To join a tower and a model use init."
            )
        main.role = "vision tower"
        return _write_tower(writer, read_tower(main))

    fix = "Pass --vision-tower with the folder or Hub id of the tower."
    tower_source = find_source(str(vision_tower or config["mm_vision_tower"]), vision_revision, "vision tower", fix)
    if is_vit(tower_source):
        tower = read_vit(tower_source)
        text = read_llava_family(main, config, tower)
        content = {"kind": f"checkpoint of the LLaVA family, from {config['architectures'][0]}"}
        text.chat_template = chat_template or text.chat_template
        family = JoinedLlavaNext if config.get("image_aspect_ratio") == "anyres" else JoinedLlava
        return family(tower, text, config).write(writer, content)

    text, projector_type = read_llava(main, config)
    tower = read_tower(tower_source)
    width = tower.config.hidden_sizes[-1]
    if width != config.get("mm_hidden_size", width):
        raise ConversionError(
            f"the tower {tower.source.name} gives features of width {width}; the projector of {main.name} expects "
            f"mm_hidden_size = {config['mm_hidden_size']}. Pass the right one with --vision-tower."
        )
    content = {"kind": "ConvLLaVA checkpoint", "license": "llama2"}
    text.chat_template = chat_template or "vicuna_v1"
    return write_convllava(writer, content, tower, text, projector_type, tower.image_size)


def _write_tower(writer: CheckpointWriter, tower: Tower) -> ConversionReport:
    """Writes a tower alone, as a ConvNextModel with the image processor that its original comes with."""
    config = tower.config
    check_counts(config, len(tower.source.tensors))
    with torch.device("meta"):
        shapes, _ = list_shapes(ConvNextModel(config), config)
    # The released towers lack the norm of the pooled output. With one they load without a warning.
    pooled = {"layernorm.weight": torch.ones, "layernorm.bias": torch.zeros}
    tensors, records = plan_weights(
        shapes,
        [tower.source],
        dtype=writer.dtype,
        fresh=lambda name: (lambda: pooled[name](shapes[name])) if name in pooled else None,
    )
    config.dtype = tensors[0].dtype
    config.architectures = [ConvNextModel.__name__]
    processor = CLIPImageProcessor(
        size={"shortest_edge": tower.image_size},
        crop_size={"height": tower.image_size, "width": tower.image_size},
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        resample=tower.resample,
    )

    def save(folder: Path):
        config.save_pretrained(folder)
        processor.save_pretrained(folder)

    def check(folder: Path) -> list[str]:
        saved = ConvNextConfig.from_pretrained(folder)
        with torch.device("meta"):
            check_stored(folder, ConvNextModel(saved), saved)
        return ["ConvNextModel has exactly these tensors"]

    return writer.write({"kind": "vision tower"}, [tower.source], tensors, records, save, check)
