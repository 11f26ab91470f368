"""Turns chats into what the model reads: token ids in which only the template writes control tokens, and images.

Notation: `S` tokens, `N` tokens of an image, `C, H, W` of pixels, `D` width of the language model.
"""

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from PIL import Image
from transformers import ProcessorMixin

from ..images import ImageError, ImageTooLargeError, limit_image_tokens, load_image
from ..inference.answer import choose_bytes
from .requests import ChatRequest, RequestError


# Formats that need no other program to decode; Pillow would start Ghostscript for EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
ZERO_WIDTH_SPACE = "\u200b"
CHARACTERS_PER_TOKEN = 32  # no text that fits a context is longer than this per token, on average


@dataclass
class ImageInput:
    """An image on its way to the model.

    Args:
        key: hash of the file and of what the processor was told.
        num_tokens: `N`.
        pixel_values: `(1, C, H, W)`, bytes where the image processor can normalise them later; `None` once there are
            features.
        features: `(N, D)`, projected, on the model's device.
    """

    key: str
    num_tokens: int
    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None


@dataclass
class Prompt:
    """A chat, ready for the model.

    Args:
        input_ids: `(S,)`, with `N` placeholders for each image.
        images: in reading order.
    """

    input_ids: torch.Tensor
    images: list[ImageInput] = field(default_factory=list)

    @property
    def image_tokens(self) -> int:
        return sum(image.num_tokens for image in self.images)


def open_checked(data: bytes, max_pixels: int, original_rgb: bool = False) -> Image.Image:
    """Decodes the first frame of an image file, within limits that its header is held to before.

    Args:
        data: the file.
        max_pixels: most pixels, width times height.
        original_rgb: see `load_image`.

    Returns:
        RGB, upright.

    Raises:
        RequestError: no image in one of `FORMATS`, one with too many pixels (413), or a broken one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return load_image(data, original_rgb=original_rgb, formats=FORMATS, max_pixels=max_pixels)
    except ImageError as error:
        status = 413 if isinstance(error, ImageTooLargeError) else 400
        raise RequestError(f"an image cannot be used: {str(error).partition(': ')[2][:200]}", status) from None


def hash_image(data: bytes, max_image_tokens: int | None) -> str:
    """What an image is remembered by: its file and the budget it was prepared for."""
    return f"{hashlib.sha256(data).hexdigest()}:{max_image_tokens}"


def prepare_image(
    processor: ProcessorMixin, data: bytes, key: str, max_pixels: int, max_image_tokens: int | None
) -> ImageInput:
    """Decodes a file and runs the image processor; raises RequestError."""
    image = open_checked(data, max_pixels, getattr(processor.image_processor, "original_rgb", False))
    settings = choose_bytes(processor)
    if max_image_tokens is not None:
        try:
            settings |= limit_image_tokens(processor.image_processor, max_image_tokens)
        except ValueError as error:
            raise RequestError(str(error)) from None
    try:
        inputs = processor(images=[image], text=processor.image_token, return_tensors="pt", images_kwargs=settings)
    except ValueError as error:  # such as an aspect ratio that no budget holds
        raise RequestError(f"an image cannot be used: {str(error)[:200]}") from None
    num_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    return ImageInput(key, num_tokens, inputs["pixel_values"])


def list_messages(request: ChatRequest) -> list[dict]:
    """The chat as templates take it. Texts that stand side by side are one text; `developer` is the system."""
    messages = []
    for message in request.messages:
        parts = [message.content] if isinstance(message.content, str) else message.content
        content = []
        for part in parts:
            text = part if isinstance(part, str) else getattr(part, "text", None)
            if text is None:
                content.append({"type": "image"})
            elif content and content[-1]["type"] == "text":
                content[-1]["text"] += text
            else:
                content.append({"type": "text", "text": text})
        messages.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return messages


def escape_control_tokens(tokenizer, text: str) -> str:
    """Breaks every control token that stands in a text, with a space of no width, so that it is read as text."""
    broken = _compile_control_tokens(tokenizer).sub(lambda match: match[0][0] + ZERO_WIDTH_SPACE + match[0][1:], text)
    return broken if broken == text else escape_control_tokens(tokenizer, broken)  # tokens overlap


@lru_cache(maxsize=8)
def _compile_control_tokens(tokenizer) -> re.Pattern:
    """Finds control tokens, the longest first."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


@lru_cache(maxsize=8)
def _list_control_ids(processor: ProcessorMixin) -> frozenset[int]:
    ids = {*processor.tokenizer.all_special_ids, processor.image_token_id}
    return frozenset(ids - {processor.tokenizer.unk_token_id})


def build_input_ids(processor: ProcessorMixin, messages: list[dict], image_tokens: list[int], context: int | None):
    """Renders and tokenises a chat that ends with the cue for the answer.

    Args:
        processor: of the model.
        messages: from `list_messages`.
        image_tokens: `N` of each image.
        context: what the model takes together; `None` for no limit.

    Returns:
        `(S,)` token ids.

    Raises:
        RequestError: the template does not take such a chat, the text is far too long, or a control token in a text
            could not be broken.
    """
    texts = [part for message in messages for part in message["content"] if part["type"] == "text"]
    if context is not None and sum(len(part["text"]) for part in texts) > CHARACTERS_PER_TOKEN * context:
        raise RequestError(f"the text is too long: the model takes {context} tokens together")
    escaped = _map_texts(messages, lambda text: escape_control_tokens(processor.tokenizer, text))
    input_ids = _tokenize(processor, escaped, image_tokens)
    # The same chat with harmless texts has the control tokens that the template writes: there must be no others.
    twin = json.dumps(_map_texts(messages, lambda text: "x"))
    if _count_control_ids(processor, input_ids) != _count_twin(processor, twin, tuple(image_tokens)):
        raise RequestError("a text contains control tokens of the model that could not be taken as text")
    return input_ids


def _count_control_ids(processor: ProcessorMixin, input_ids: torch.Tensor) -> Counter:
    control = _list_control_ids(processor)
    return Counter(token for token in input_ids.tolist() if token in control)


@lru_cache(maxsize=256)
def _count_twin(processor: ProcessorMixin, messages: str, image_tokens: tuple[int, ...]) -> Counter:
    """Control tokens of a chat, as JSON, without anything that a client wrote: most chats have one of few shapes."""
    return _count_control_ids(processor, _tokenize(processor, json.loads(messages), image_tokens))


def _map_texts(messages: list[dict], change) -> list[dict]:
    return [
        {
            **message,
            "content": [
                {**part, "text": change(part["text"])} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _tokenize(processor: ProcessorMixin, messages: list[dict], image_tokens: Sequence[int]) -> torch.Tensor:
    from jinja2 import TemplateError

    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:  # roles and orders that the template refuses
        raise RequestError(f"the chat template refuses this chat: {str(error)[:200]}") from None
    if text.count(processor.image_token) != len(image_tokens):
        raise RequestError("the chat template does not take images in that place; put them into messages of the user")
    replacements = [processor.image_token * count for count in image_tokens]
    rows, _ = processor.get_text_with_replacements([text], replacements)
    start = processor.tokenizer.bos_token
    # As `apply_chat_template(tokenize=True)`: a template that writes the first token itself gets no second one.
    add_special_tokens = not (start and text.startswith(start))
    ids = processor.tokenizer(rows[0], add_special_tokens=add_special_tokens)["input_ids"]
    return torch.tensor(ids)  # (S,)
