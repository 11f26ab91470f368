"""The arguments of a training run: TRL's own, and what they lack."""

from dataclasses import dataclass, field

from trl import SFTConfig


@dataclass
class ConvLlavaTrainingArguments(SFTConfig):
    r"""TRL's [`SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig), and what it lacks.

    Args:
        optim_target_modules: regular expressions of the parameters to train; all others are frozen. For models of this
            package `model_init_kwargs: {trainable: [...]}` does the same, and works with `trl sft` as well.
        vision_learning_rate: peak learning rate of the vision tower. Default: `learning_rate`.
        projector_learning_rate: peak learning rate of the projector. Default: `learning_rate`.
        group_by_modality_length: batches of rows with images or without, and of similar length. Not for streams.
        normalize_on_device: workers hand over images as bytes, a quarter of the size; the device normalises them.
        vision_cache: folder for the features of the frozen tower, which are then computed once instead of in every
            epoch and run; see `vision_cache.py`. What it will take is said first.
        image_size: side of the square that images are padded or squashed to, or the budget of `native`, in pixels.
            Default: the checkpoint's.
        draft_photos: let the JPEG decoder shrink photos of more than twice the processed size: faster, and not quite
            the same pixels. For `image_aspect_ratio` "pad" and "squash" of this package's models.
        max_length: rows are cut to so many tokens on the right, but never inside or before an image.
    """

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
