"""Answers questions about images, whole or piece by piece."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread

import torch
from transformers import BatchFeature, GenerationConfig, PreTrainedModel, ProcessorMixin, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..images import GetSize, ImageSource, get_draft, limit_image_tokens, load_image
from .answer_text import AnswerText


logger = logging.get_logger(__name__)
DEFAULT_NEW_TOKENS = 512


@dataclass
class AnswerStats:
    """What an answer took. Filled while it is generated.

    Args:
        prompt_tokens: `S`.
        image_tokens: how many of them stand for images.
        new_tokens: tokens generated so far, the end token included.
        seconds_to_first_token: from the call of `answer` on: loading images, the vision tower, the prompt.
        seconds: from the call of `answer` to the end.
        finish_reason: `"stop"` (the model ended), `"length"` (cut at `max_new_tokens`) or `"interrupted"` (by the
            consumer or an error); `None` before the end.
    """

    prompt_tokens: int
    image_tokens: int
    new_tokens: int = 0
    seconds_to_first_token: float | None = None
    seconds: float | None = None
    finish_reason: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; `None` for less than two tokens."""
        if self.new_tokens < 2 or self.seconds is None:
            return None
        return (self.new_tokens - 1) / max(self.seconds - self.seconds_to_first_token, 1e-9)


class AnswerStream(Iterator[str]):
    """Iterates over the pieces of one answer as soon as they exist. Made by `answer(..., stream=True)`.

    Generation starts with the first `next()` and runs in a thread. `close()`, Ctrl-C in the consumer and dropping the
    object stop it after the current token. What fails in the thread is raised from `next()`.

    Attributes:
        text: the answer so far.
        stats: see [`AnswerStats`].
        messages: the chat up to here, the question last; see `history`.
    """

    def __init__(self, pieces: Iterator[str], messages: list[dict], stats: AnswerStats):
        self._pieces, self.messages, self.stats, self.text = pieces, messages, stats, ""

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    @property
    def history(self) -> list[dict]:
        """The chat with the answer so far: the `history` of the next question."""
        return [*self.messages, make_message("assistant", self.text)]

    def close(self) -> None:
        """Stops the generation and waits for its thread."""
        self._pieces.close()


class _TextPieces(BaseStreamer):
    """Hands on text as it is generated. transformers' own streamers hold each word back until the next one begins."""

    def __init__(self, tokenizer, queue: SimpleQueue, stats: AnswerStats, started: float, ends: list[str]):
        self.queue, self.stats, self.started = queue, stats, started
        self.text, self.in_prompt = AnswerText(tokenizer, tuple(ends)), True

    def put(self, value):
        if self.in_prompt:  # generate() hands over the prompt first
            self.in_prompt = False
            return
        if self.stats.seconds_to_first_token is None:
            self.stats.seconds_to_first_token = time.perf_counter() - self.started
        for token in value.flatten().tolist():
            self._emit(self.text.push(token))
        self.stats.new_tokens = len(self.text.tokens)

    def end(self):
        self._emit(self.text.push(None))

    def _emit(self, piece: str):
        if piece:
            self.queue.put(piece)


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def list_stop_strings(model: PreTrainedModel) -> list[str]:
    """What ends an answer of a model beside its end token, as its generation config says.

    transformers' own `stop_strings` make `generate` and the pipelines fail unless they are given the tokenizer as well.
    Checkpoints therefore keep theirs as `answer_stop_strings`, which `generate` ignores.
    """
    config, found = model.generation_config, []
    for strings in (getattr(config, "answer_stop_strings", None), config.stop_strings):
        found += [strings] if isinstance(strings, str) else strings or []
    return found


def decode_tokens(tokenizer, tokens, ends: list[str]) -> str:
    """The text of an answer without white space around it and without the stop string of `ends` that ended it."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    for end in ends:
        text = text.removesuffix(end).rstrip()
    return text


def _stream_pieces(
    model, tokenizer, arguments: dict, stats: AnswerStats, started: float, ends: list[str]
) -> Iterator[str]:
    """Runs generate() in a thread and yields its text; closing the generator ends the thread."""
    queue, stop, item = SimpleQueue(), Event(), ""
    criteria = [*(arguments.get("stopping_criteria") or []), _StopWhenSet(stop)]
    streamer = _TextPieces(tokenizer, queue, stats, started, ends)

    def generate():
        try:
            model.generate(**arguments | {"streamer": streamer, "stopping_criteria": criteria})
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = Thread(target=generate, name="convllava-generate", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
        stats.seconds = time.perf_counter() - started
        if item is not None:
            stats.finish_reason = "interrupted"
        else:
            tokens = model.generation_config.eos_token_id
            cut = stats.new_tokens >= arguments["generation_config"].max_new_tokens
            cut = cut and streamer.text.tokens[-1] not in (tokens if isinstance(tokens, list) else [tokens])
            cut = cut and not streamer.text.stopped
            stats.finish_reason = "length" if cut else "stop"


def make_message(
    role: str,
    text: str,
    images: Iterable[ImageSource] = (),
    original_rgb: bool = False,
    draft: GetSize | None = None,
) -> dict:
    """One message of a chat, images first.

    Args:
        role: `"user"`, `"assistant"` or `"system"`.
        text: what is said.
        images: what `load_image` takes; they are loaded here, if they are not yet.
        original_rgb, draft: see `load_image`.

    Returns:
        `{"role": ..., "content": [{"type": "image", "image": ...}, ..., {"type": "text", "text": ...}]}`.

    Raises:
        ImageError: an image cannot be used.
    """
    images = [load_image(image, original_rgb=original_rgb, draft=draft) for image in images]
    content = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    question: str,
    images: ImageSource | Iterable[ImageSource] = (),
    history: Iterable[dict] = (),
    max_new_tokens: int | None = None,
    stream: bool = False,
    max_image_tokens: int | None = None,
    temperature: float = 0.0,
    draft_photos: bool | None = None,
    **generation_kwargs,
) -> str | AnswerStream:
    """Answers a question about images, or about none.

    Args:
        model, processor: from `load`.
        question: the text of the question, without image placeholders.
        images: one image or several, as `load_image` takes them. They go before the question.
        history: the chat so far, for example a previous stream's `history`; its images are loaded as well.
        max_new_tokens: longest answer in tokens. Default: 512, or what the model's context leaves.
        stream: return the answer piece by piece.
        max_image_tokens: most tokens that one image may take; fewer are faster and see less. With
            `image_aspect_ratio="native"` this is the budget of each image; otherwise the square (or `size`) that the
            model was trained with shrinks to the largest that fits. Never enlarges.
        temperature: 0 takes the most likely token each time; above 0 samples.
        draft_photos: let the JPEG decoder shrink photos of at least twice the size that the model sees: faster, and
            not quite the same pixels. Default: what the image processor says, which is `False` unless it was set.
        generation_kwargs: more arguments of `generate()`, such as `top_p`, `num_beams` (not with `stream`).

    Returns:
        The answer without white space around it, or with `stream` an iterator of its pieces.

    Raises:
        ImageError: an image cannot be used.
        ValueError: an empty or undecodable question, an image placeholder in the text, a negative temperature, a budget
            that this processor does not support, or a prompt that leaves no room for `max_new_tokens`: nothing is ever
            cut off.
    """
    started = time.perf_counter()
    if not question.strip():
        raise ValueError("the question is empty.")
    if any("\ud800" <= character <= "\udfff" for character in question):  # how Python reads broken bytes
        raise ValueError("the question is not valid UTF-8 text.")
    if generation_kwargs.get("return_dict_in_generate") or generation_kwargs.get("num_return_sequences", 1) != 1:
        raise ValueError("one answer is given, as text: for num_return_sequences and dictionaries use generate().")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}; expected 0 or more.")
    images = [images] if isinstance(images, ImageSource | bytearray | memoryview) else images
    settings = {}
    if max_image_tokens is not None:
        settings = limit_image_tokens(processor.image_processor, max_image_tokens)
    load = {
        "original_rgb": getattr(processor.image_processor, "original_rgb", False),
        "draft": get_draft(processor.image_processor, draft_photos, **settings),
    }
    messages = [_load_history(message, **load) for message in history]
    messages.append(make_message("user", question, images, **load))
    inputs = prepare_inputs(processor, messages, **settings | choose_bytes(processor))
    stats = AnswerStats(
        prompt_tokens=inputs["input_ids"].shape[1],
        image_tokens=int((inputs["input_ids"] == processor.image_token_id).sum()),
    )
    more = generation_kwargs.pop("stop_strings", None) or []
    ends = [*list_stop_strings(model), *([more] if isinstance(more, str) else more)]
    config = GenerationConfig(
        stop_strings=ends or None,
        num_beams=1 if stream else None,  # the pieces of an answer are those of one beam
        max_new_tokens=_choose_new_tokens(model, stats, max_new_tokens),
        do_sample=temperature > 0,
        # Without sampling, generate() warns about any sampling settings of the checkpoint that are not neutral.
        **({"temperature": temperature} if temperature > 0 else {"temperature": 1.0, "top_p": 1.0, "top_k": 50}),
    )
    arguments = config.update(**generation_kwargs)  # what is left is no setting, such as logits_processor
    arguments |= {"generation_config": config, **move_inputs(processor, inputs, model)}
    if ends:
        arguments["tokenizer"] = processor.tokenizer
    if stream:
        pieces = _stream_pieces(model, processor.tokenizer, arguments, stats, started, ends)
        return AnswerStream(pieces, messages, stats)
    new_tokens = model.generate(**arguments)[0, stats.prompt_tokens :]  # (1, S + new) -> (new,)
    return decode_tokens(processor.tokenizer, new_tokens, ends)


def _load_history(message: dict, **load) -> dict:
    """A message with its images loaded; `content` may be a string or a list of parts, as for chat templates."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    parts = []
    for part in content:
        if part["type"] == "image":
            source = next((part[key] for key in ("image", "url", "path") if key in part), None)
            part = {"type": "image", "image": load_image(source, **load)}
        parts.append(part)
    return {**message, "content": parts}


def prepare_inputs(processor: ProcessorMixin, *chats: list[dict], **images_kwargs) -> BatchFeature:
    """Renders, tokenises and processes chats: a row for each, which ends with the cue for the answer.

    Args:
        processor: from `load`. Pads several rows on the side that its tokenizer says.
        chats: messages of `make_message`.
        images_kwargs: settings of the image processor, in the place of its own.

    Returns:
        `input_ids` and `attention_mask` `(B, S)`, and what the image processor gives, as tensors.

    Raises:
        ValueError: an image placeholder in a text.
    """
    for message in (message for chat in chats for message in chat):
        if any(processor.image_token in part.get("text", "") for part in message["content"]):
            raise ValueError(
                f"the text contains {processor.image_token!r}, which stands for an image; leave it out and pass images "
                "as images."
            )
    return processor.apply_chat_template(
        list(chats),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **({"images_kwargs": images_kwargs} if images_kwargs else {})},
    )


def choose_bytes(processor: ProcessorMixin) -> dict:
    """Settings of the image processor with which pictures go to the model's device as bytes: a quarter of what floats
    are to make and to copy. None where it cannot normalise bytes afterwards."""
    takes_bytes = hasattr(processor.image_processor, "normalize_bytes")
    return {"do_rescale": False, "do_normalize": False} if takes_bytes else {}


def move_pixels(processor: ProcessorMixin, pixel_values: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Prepared pixels on the model's device, in its dtype; bytes are normalised there."""
    pixel_values = pixel_values.to(model.device)
    if pixel_values.dtype == torch.uint8:
        pixel_values = processor.image_processor.normalize_bytes(pixel_values)
    return pixel_values.to(model.dtype)


def move_inputs(processor: ProcessorMixin, inputs, model: PreTrainedModel) -> dict:
    """The inputs on the model's device, in its dtype."""
    sizes = inputs.get("image_sizes")
    if choose_bytes(processor) and sizes is not None and len(sizes.unique(dim=0)) == 1:
        del inputs["image_sizes"]  # which the model would read from the device, and wait for it
    pixel_values = inputs.pop("pixel_values", None)
    inputs = inputs.to(model.device, model.dtype)
    if pixel_values is not None:
        inputs["pixel_values"] = move_pixels(processor, pixel_values, model)
    return inputs


def _choose_new_tokens(model: PreTrainedModel, stats: AnswerStats, max_new_tokens: int | None) -> int:
    """`max_new_tokens`, or the default for `None`; raises ValueError where the context has no room for it."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; expected 1 or more.")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return max_new_tokens or DEFAULT_NEW_TOKENS
    if stats.prompt_tokens + (max_new_tokens or 1) > context:
        answer = f"max_new_tokens={max_new_tokens}" if max_new_tokens else "an answer"
        raise ValueError(
            f"the prompt has {stats.prompt_tokens} tokens ({stats.image_tokens} of them for images), which leaves no "
            f"room for {answer}: the model takes {context} together. Lower max_image_tokens or max_new_tokens, pass "
            "fewer images, or shorten the text or the history."
        )
    return max_new_tokens or min(DEFAULT_NEW_TOKENS, context - stats.prompt_tokens)
