"""Answers of a model of this process, in batches with left padding."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ..images import ImageError, get_draft, limit_image_tokens, load_image, read_size
from ..shipped import build_chat_template
from .questions import PromptStyle, Question


# Answers in the order of the questions; where there is none, why.
Answerer = Callable[[list[Question]], list[str | Exception]]


def open_images(question: Question, folder: Path | None) -> list[bytes | Path | Image.Image]:
    """What `load_image` reads the images of a question from; raises ImageError where a file is missing."""
    found = []
    for image in question.image if isinstance(question.image, list) else [question.image]:
        if isinstance(image, str):
            image = Path(folder or ".") / image
            if not image.is_file():
                raise ImageError(f"{image}: no such file")
        if image is not None:
            found.append(image)
    return found


def read_sizes(questions: list[Question], folder: Path | None) -> tuple[dict[int, tuple], dict[int, str]]:
    """Index -> height and width of a question's image from its first bytes; index -> what is wrong with the others."""
    sizes, bad = {}, {}
    for index, question in enumerate(questions):
        size = (0, 0)
        try:
            for source in open_images(question, folder):
                if not isinstance(source, Image.Image):
                    is_content = isinstance(source, bytes)
                    source = {"bytes": source if is_content else None, "path": None if is_content else source}
                size = read_size(source)
            sizes[index] = size
        except (ValueError, OSError) as error:
            bad[index] = str(error)
    return sizes, bad


def make_local_answerer(
    model, processor, folder: Path | None, style: PromptStyle, max_new_tokens: int, settings: dict
) -> Answerer:
    """Answers batches with a model of this process. An image that cannot be read gives its error for its own question.

    Args:
        model, processor: from `load`.
        folder: of the images.
        style: how the question is put.
        max_new_tokens: longest answer.
        settings: `temperature`, `seed`, `max_image_tokens`, `draft_photos`, as far as they are wanted.
    """
    import torch
    from transformers import GenerationConfig

    from ..inference.answer import choose_bytes, decode_tokens, list_stop_strings, move_inputs, prepare_inputs

    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    tokenizer.padding_side = "left"
    set_chat_template(processor, style)
    temperature, budget = settings.get("temperature") or 0.0, settings.get("max_image_tokens")
    sampling = {"temperature": temperature} if temperature else {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    ends = list_stop_strings(model)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, stop_strings=ends or None, **sampling
    )
    stops = {"tokenizer": tokenizer} if ends else {}
    resizing = limit_image_tokens(image_processor, budget) if budget else {}
    preparing = resizing | choose_bytes(processor)
    loading = {
        "original_rgb": getattr(image_processor, "original_rgb", False),
        "draft": get_draft(image_processor, settings.get("draft_photos"), **resizing),
    }

    def answer(questions: list[Question]) -> list[str | Exception]:
        chats, answers = [], [None] * len(questions)
        for place, question in enumerate(questions):
            try:  # the first bytes of an image may be whole and the rest not
                images = [load_image(source, **loading) for source in open_images(question, folder)]
            except ImageError as error:
                answers[place] = error
                continue
            chats.append(build_chat(question, images, style))
        if not chats:
            return answers
        inputs = prepare_inputs(processor, *chats, **preparing)
        if temperature:
            words = f"{settings.get('seed', 0)} {questions[0].question_id}"  # the same after an interruption
            torch.manual_seed(int(hashlib.sha256(words.encode()).hexdigest()[:8], 16))
        length = inputs["input_ids"].shape[1]
        inputs = move_inputs(processor, inputs, model)
        tokens = model.generate(**inputs, generation_config=config, **stops)[:, length:]  # (B, S + new) -> (B, new)
        texts = iter(tokens)
        return [decode_tokens(tokenizer, next(texts), ends) if answer is None else answer for answer in answers]

    return answer


def set_chat_template(processor, style: PromptStyle) -> None:
    """Gives a processor the template of a style. What its own writes around an image stays, as it was trained."""
    if style.template:
        tag = re.search("set image_tag = '([^']+)'", processor.chat_template or "")
        processor.chat_template = build_chat_template(processor.tokenizer, style.template, tag and tag[1])


def build_chat(question: Question, images: list[Image.Image], style: PromptStyle) -> list[dict]:
    """The chat of one question, its images where the style wants them."""
    text = question.text
    if "<image>" in text:
        raise ValueError(f"question {question.question_id!r} has '<image>' in its text; convert the file first.")
    pictures = [{"type": "image", "image": image} for image in images]
    if pictures and style.image_last:
        return [{"role": "user", "content": [{"type": "text", "text": f"{text}\n"}, *pictures]}]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
