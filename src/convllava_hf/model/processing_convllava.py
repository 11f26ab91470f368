# Copyright 2026 The convllava-hf authors. Licensed under the Apache License, Version 2.0.
"""Processor of ConvLLaVA: one call prepares text and images.

Notation: `B` rows of text, `S` tokens per row, `I` images in the batch in reading order, `H, W` pixels, `F`
downsampling factor of the vision tower.

Source of the original behaviour: alibaba/conv-llava, `llava/mm_utils.py` (`tokenizer_image_token`): the text is
tokenised chunk by chunk between images, so SentencePiece puts its leading space before every chunk.
"""

from .configuration_convllava import ConvLlavaConfig  # noqa: F401  (checks the version of transformers)


# isort: split
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging


logger = logging.get_logger(__name__)


class ConvLlavaProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of the processor: those of the tokenizer and of the image processor."""

    _defaults = {"text_kwargs": {"padding": False}}


class ConvLlavaProcessor(ProcessorMixin):
    r"""
    Wraps an image processor and a tokenizer. Each `<image>` in the text becomes one placeholder per token of its image.

    Args:
        image_processor ([`ConvLlavaImageProcessor`]): prepares images.
        tokenizer (`PreTrainedTokenizerBase`): has `image_token` as a special token.
        chat_template (`str`, *optional*): Jinja template; default: the tokenizer's.
        image_token (`str`, *optional*, defaults to `"<image>"`): the placeholder.
        chunk_prefix_space (`bool`, *optional*, defaults to `False`): put the leading space of SentencePiece before
            every chunk of text between images, as the original LLaVA tokenisation does. True in checkpoints converted
            from it; tokenizers without such a space need `False`.

    Raises:
        ValueError: the tokenizer has no such image token.
    """

    valid_processor_kwargs = ConvLlavaProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        chunk_prefix_space=False,
        **kwargs,
    ):
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if tokenizer.tokenize(self.image_token) != [self.image_token]:
            raise ValueError(
                f"the tokenizer has no token {self.image_token!r}; add it with tokenizer.add_special_tokens("
                f"{{'additional_special_tokens': [{self.image_token!r}]}}) and resize the model's embeddings."
            )
        self.chunk_prefix_space = chunk_prefix_space
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[ConvLlavaProcessorKwargs],
    ) -> BatchFeature:
        """Prepares text and images for the model.

        Args:
            images: Pillow images, arrays, tensors, paths or URLs: one, a list in reading order, or a list per row.
            text: one string or a list, with one `<image>` per image.
            kwargs: arguments of the tokenizer and of the image processor.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` `(B, S)`, and with images `pixel_values`
            `(I, 3, H, W)` and `image_sizes` `(I, 2)`.

        Raises:
            ValueError: the number of placeholders is not the number of images, or truncation would cut an image.
        """
        if isinstance(images, (list, tuple)) and not any(row for row in images if isinstance(row, (list, tuple))):
            # A batch of text-only chats comes with an empty list of images per row.
            images = images if any(not isinstance(row, (list, tuple)) for row in images) else None
        if text is not None and (images is None or isinstance(images, (list, tuple))):
            found = [row.count(self.image_token) for row in ([text] if isinstance(text, str) else text)]
            given = [len(row) if isinstance(row, (list, tuple)) else 1 for row in images or []]
            if len(found) == 1 or not any(isinstance(row, (list, tuple)) for row in images or []):
                found, given = sum(found), sum(given)
            if found != given:
                raise ValueError(
                    f"The number of {self.image_token} tokens in the prompts should be the same as the number of "
                    f"images: found {found} {self.image_token} tokens and {given} images."
                )
        outputs = super().__call__(images=images, text=text, **kwargs)
        if text is not None and (kwargs.get("truncation") or kwargs.get("text_kwargs", {}).get("truncation")):
            self._report_truncation(text, outputs)
        return outputs

    def _report_truncation(self, text, outputs):
        """Warns about each row that truncation shortened: what is lost on the right includes the cue for the answer."""
        num_images = len(outputs["image_sizes"]) if "image_sizes" in outputs else 0
        replacements = [self.replace_image_token(outputs, index) for index in range(num_images)]
        rows, _ = self.get_text_with_replacements([text] if isinstance(text, str) else list(text), replacements)
        for row, full in enumerate(self.tokenizer(rows)["input_ids"]):
            kept = outputs["input_ids"][row]
            kept = kept if isinstance(kept[0], int) or not hasattr(kept, "tolist") else kept.tolist()
            kept = sum(token != self.tokenizer.pad_token_id for token in kept)
            if kept < len(full):
                logger.warning(
                    f"row {row} was cut from {len(full)} to {kept} tokens on the {self.tokenizer.truncation_side}; a "
                    "prompt cut on the right has lost the cue for the answer. Shorten the text or raise max_length."
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Placeholders for one processed image: `image_token` once per cell of `F x F` pixels."""
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        factor = kwargs.get("downsampling_factor") or self.image_processor.downsampling_factor
        return self.image_token * ((height // factor) * (width // factor))

    def get_text_with_replacements(self, text, *replacements, **kwargs):
        """Expands placeholders; with `chunk_prefix_space` also puts the leading space of every chunk.

        A space goes before text that follows an image, and before a text that starts with a space itself: SentencePiece
        adds its own to such a text, the fast tokenizers do not. The offsets that are returned describe each inserted
        space as a replacement of the character after it, so a span that starts there includes the space's token.
        """
        text, offsets = super().get_text_with_replacements(text, *replacements, **kwargs)
        if not self.chunk_prefix_space:
            return text, offsets
        for row, (expanded, entries) in enumerate(zip(text, offsets, strict=True)):
            # Each insertion as (position in the text as given, position in the expanded text).
            insertions = [(0, 0)] if expanded.startswith((" ", "▁")) else []
            for entry in entries:
                end = entry["new_span"][1]
                if end < len(expanded) and not expanded.startswith(self.image_token, end):
                    insertions.append((entry["span"][1], end))
            for shift, (given, end) in enumerate(insertions):
                position = end + shift
                for entry in entries:
                    if entry["new_span"][0] >= position:
                        entry["new_span"] = tuple(edge + 1 for edge in entry["new_span"])
                character = text[row][position]
                text[row] = text[row][:position] + " " + text[row][position:]
                entries.append(
                    {
                        "type": "text",
                        "span": (given, given + 1),
                        "new_span": (position, position + 2),
                        "text": character,
                        "replacement": " " + character,
                    }
                )
            entries.sort(key=lambda entry: entry["span"])
        return text, offsets

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Saves all parts, see `ProcessorMixin`; how the tokenizer was loaded does not become one of its settings."""
        for transient in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(transient, None)
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # transformers leaves this on what it saves and takes it off what it loads; so they would differ.
        vars(self).pop("auto_map", None)
        return saved

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Number of image tokens per image, for servers that plan memory before they see pixels.

        Args:
            image_sizes (`list` of `(H, W)` in pixels, *optional*): sizes of the images as they come in.
            kwargs: settings of the image processor.

        Returns:
            `num_image_tokens` and `num_image_patches` (always 1), one entry per image; empty without `image_sizes`.
        """
        if image_sizes is None:
            return MultiModalData()
        tokens = [self.image_processor.num_image_tokens(height, width, **kwargs) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(tokens))


__all__ = ["ConvLlavaProcessor"]
