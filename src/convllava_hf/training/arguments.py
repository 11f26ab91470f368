"""The arguments of a training run: TRL's own, and what they lack."""

from dataclasses import dataclass, field

import torch
from transformers.utils import logging
from trl import SFTConfig

from ..inference.load import is_fast_on_cpu


logger = logging.get_logger(__name__)


@dataclass
class ConvLlavaTrainingArguments(SFTConfig):
    r"""TRL's [`SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig), and what it lacks.

    Args:
        trainable: regular expressions of the parameters to train; all others are frozen. For models of this package
            `model_init_kwargs: {trainable: [...]}` does the same, and works with `trl sft` as well.
        vision_learning_rate: peak learning rate of the vision tower. Default: `learning_rate`.
        projector_learning_rate: peak learning rate of the projector. Default: `learning_rate`.
        group_by_modality_length: batches of rows with images or without, and of similar length. Not for streams, and
            not with a `train_sampling_strategy` other than the default, `"random"`.
        normalize_on_device: workers hand over images as bytes, a quarter of the size; the device normalises them.
        vision_cache: folder for the features of the frozen tower, which are then computed once instead of in every
            epoch and run; see `vision_cache.py`. What it will take is said first.
        image_size: side of the square that images are padded or squashed to, or the budget of `native`, in pixels.
            Default: the checkpoint's.
        draft_photos: let the JPEG decoder shrink photos of at least twice the processed size: faster, and not quite
            the same pixels. For this package's models. Default: what the checkpoint's image processor says.
        image_aspect_ratio: `"pad"`, `"native"` or `"squash"` for a ConvNeXt tower, `"pad"` or `"crop"` for a ViT.
            Default: the checkpoint's.
        eval_generate: answer so many fixed questions of the evaluation data at every evaluation. Their share of exact
            answers is logged as `eval_exact_match`, and `evaluation_answers.html` shows them over time.
        early_stopping_patience: stop after so many evaluations without a better `metric_for_best_model`. Needs
            `load_best_model_at_end`.
        overwrite_output_dir: start anew in an `output_dir` that was used, and delete the checkpoints in it.
        max_length: rows are cut to so many tokens on the right, but never inside or before an image.
    """

    trainable: list[str] | None = field(
        default=None, metadata={"help": "Patterns of the names of the parameters to train. Default: all."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower. Default: learning_rate."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector. Default: learning_rate."}
    )
    group_by_modality_length: bool = field(
        default=True, metadata={"help": "Batch rows with images or without, and of similar length, together."}
    )
    normalize_on_device: bool = field(
        default=True, metadata={"help": "Move images as bytes and normalise them on the device."}
    )
    vision_cache: str | None = field(
        default=None, metadata={"help": "Folder to keep the features of the frozen vision tower in."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the processed square in pixels. Default: the checkpoint's."}
    )
    draft_photos: bool = field(
        default=False, metadata={"help": "Shrink large JPEG photos while they are decoded: faster, other pixels."}
    )
    image_aspect_ratio: str | None = field(
        default=None, metadata={"help": "How images become the tower's shape. Default: the checkpoint's."}
    )
    eval_generate: int = field(
        default=0, metadata={"help": "Held-out questions to answer at every evaluation, for eval_exact_match."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in an output_dir that was used; deletes its checkpoints."}
    )

    def __post_init__(self):
        if not (self.use_cpu or torch.accelerator.is_available()):
            logger.warning("no GPU was found: training on the CPU.")
            self.use_cpu = True
        if self.use_cpu and (self.bf16 or self.fp16) and not is_fast_on_cpu("bfloat16"):
            logger.warning("this processor has no bfloat16 arithmetic: computing in float32.")
            self.bf16 = self.fp16 = False
        if isinstance(self.trainable, str):
            self.trainable = [self.trainable]
        if self.tf32 and not torch.cuda.is_available():
            self.tf32 = None
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs --load_best_model_at_end true, with "
                "evaluations and checkpoints at the same steps, and --metric_for_best_model (the default is the loss)."
            )
        super().__post_init__()
