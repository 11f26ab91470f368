"""Answers many chats at a time: batches by arrival, features of images kept for the next question.

A batch is one call of `generate()` over the embeddings of its chats, padded on the left. What differs between chats
(length, sampling, stop strings, schemas, clients that left) is decided row by row, so a chat gets in a batch the answer
that it gets alone.

Notation: `B` rows, `S` tokens of the longest prompt, `N` tokens of an image, `D` width of the language model.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Lock, Thread
from traceback import format_tb

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from ..inference.answer import list_stop_strings, move_pixels
from ..inference.answer_text import AnswerText
from .prompts import ImageInput, Prompt
from .requests import RequestError


logger = logging.get_logger(__name__)

TOWER_BATCH = 8  # images that run through the tower together
PIECE_SECONDS = 0.02  # a client gets pieces no faster: each costs a write and a read, and nobody reads as fast
STOPPED = "the server is shutting down"


@dataclass
class Settings:
    """How one chat is answered. The fields are those of a request; `temperature=0` takes the most likely token."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    matcher: object | None = None


@dataclass
class Event:
    """What a chat hears of its answer: a piece of text, and at the end why it ended.

    Args:
        text: the next piece, possibly empty.
        finish_reason: `"stop"` or `"length"` with the last event.
        new_tokens: generated so far, the end token included.
        error: why there will be no more.
    """

    text: str = ""
    finish_reason: str | None = None
    new_tokens: int = 0
    error: Exception | None = None


class FeatureCache:
    """Projected features of the images seen last, within a number of bytes. Safe to use from several threads.

    Args:
        max_bytes: of all entries together; 0 keeps none.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._entries, self._lock = OrderedDict(), Lock()

    def get(self, key: str) -> torch.Tensor | None:
        """The features `(N, D)` under a key, or `None`."""
        with self._lock:
            features = self._entries.get(key)
            if features is None:
                self.misses += 1
            else:
                self.hits += 1
                self._entries.move_to_end(key)
            return features

    def put(self, key: str, features: torch.Tensor) -> None:
        """Remembers features `(N, D)`; what was used longest ago makes room."""
        with self._lock:
            if key in self._entries or features.nbytes > self.max_bytes:
                return
            self._entries[key] = features
            self.num_bytes += features.nbytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._entries.popitem(last=False)[1].nbytes


@dataclass(eq=False)
class Job:
    """One chat in the engine.

    Args:
        prompt: what the model reads.
        settings: how it is answered.
        deliver: called from the engine's thread with each `Event`; must return at once.
    """

    prompt: Prompt
    settings: Settings
    deliver: Callable[[Event], None]
    cancelled: bool = False
    done: bool = False

    def start(self, tokenizer, end_ids: set[int], ends: list[str]) -> None:
        """Makes ready for the first token."""
        settings = self.settings
        self.end_ids, self.text = end_ids, AnswerText(tokenizer, (*settings.stop, *ends))
        self.held, self.delivered = "", 0.0
        self.generator, self.warpers = None, None
        if settings.temperature > 0:
            self.generator = torch.Generator()
            self.generator.seed() if settings.seed is None else self.generator.manual_seed(settings.seed)
            warpers = [TemperatureLogitsWarper(float(settings.temperature))]
            warpers += [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
            warpers += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
            self.warpers = LogitsProcessorList(warpers)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(V,)` of which the highest is the next token."""
        if self.done:
            return scores
        if self.settings.matcher is not None:
            scores = self.settings.matcher.mask(scores)
        if self.generator is None:
            return scores
        # Of the largest score 0 is left: no temperature, however small, makes it infinite.
        warped = self.warpers(None, (scores - scores.max())[None].double().cpu())
        token = torch.multinomial(warped.softmax(-1), 1, generator=self.generator).item()
        chosen = torch.full_like(scores, -torch.inf)
        chosen[token] = 0
        return chosen

    def push(self, token: int) -> None:
        """Takes the next token and delivers what it adds; sets `done` after the last one."""
        if self.done:
            return
        if self.cancelled:
            self.finish("stop")
            return
        if self.settings.matcher is not None:
            self.settings.matcher.accept(token)
        self.held += self.text.push(token)
        if token in self.end_ids or self.text.stopped:
            self.finish("stop")
        elif len(self.text.tokens) >= self.settings.max_new_tokens:
            self.finish("length")
        elif self.held and (now := time.monotonic()) - self.delivered >= PIECE_SECONDS:
            self.deliver(Event(self.held, new_tokens=len(self.text.tokens)))
            self.held, self.delivered = "", now

    def finish(self, reason: str) -> None:
        """Delivers the last event."""
        self.done = True
        self.deliver(Event(self.held + self.text.push(None), reason, len(self.text.tokens)))

    def fail(self, error: Exception) -> None:
        """Ends with an error."""
        if not self.done:
            self.done = True
            self.deliver(Event(error=error))


class _ChooseByRow(LogitsProcessor):
    def __init__(self, jobs: list[Job]):
        self.jobs = jobs

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for row, job in enumerate(self.jobs):
            if job.generator is not None or job.settings.matcher is not None:
                scores[row] = job.choose(scores[row])
        return scores


class _StopByRow(StoppingCriteria):
    def __init__(self, jobs: list[Job]):
        self.jobs = jobs

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        for job, token in zip(self.jobs, input_ids[:, -1].tolist(), strict=True):
            job.push(token)
        return torch.tensor([job.done for job in self.jobs], device=input_ids.device)


class Engine:
    """Runs a model in a thread of its own.

    Args:
        model, processor: from `inference.load.load`.
        max_batch: most chats in a batch.
        batch_seconds: how long a batch waits for the clients whose answers have just ended, as they often ask again,
            and for chats that are being prepared; for these also a tenth of the time that the last batch took. One
            client alone never waits.
        max_queue: most chats that wait.
        cache_bytes: for features of images.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        max_batch: int = 8,
        batch_seconds: float = 0.05,
        max_queue: int = 64,
        cache_bytes: int = 512 * 2**20,
    ):
        self.model, self.processor = model, processor
        self.max_batch, self.batch_seconds, self.max_queue = max_batch, batch_seconds, max_queue
        self.cache = FeatureCache(cache_bytes)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.stop_strings = list_stop_strings(model)
        ends = model.generation_config.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends]) - {None}
        self.batch_sizes: Callable[[int], None] = lambda size: None  # told the size of each batch
        self._waiting, self._expected, self._closed, self._changed = deque(), 0, False, Condition()
        self._running: list[Job] = []
        # Of the last batch: how many clients there were at the same time, its end, its seconds.
        self._clients, self._ended, self._took = 0, 0.0, 0.0
        self._thread = Thread(target=self._run, name="convllava-engine", daemon=True)
        self._thread.start()

    # ---- from the threads of clients

    @property
    def waiting(self) -> int:
        """Chats that are being prepared or wait for a batch."""
        return self._expected + len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @contextmanager
    def expect_chat(self) -> Iterator[None]:
        """Keeps a place for a chat that is prepared and submitted inside the block.

        Raises:
            RequestError: 429 when too many wait, 503 when the engine has stopped.
        """
        with self._changed:
            if not self.alive:
                raise RequestError(STOPPED, status=503, kind="server_error")
            if self.waiting >= self.max_queue:
                raise RequestError("too many requests are waiting; try again", status=429, kind="rate_limit_error")
            self._expected += 1
            self._clients = max(self._clients, self.waiting + sum(not job.done for job in self._running))
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify_all()

    def submit(self, *jobs: Job) -> None:
        """Hands over chats; those of one call can share a batch."""
        with self._changed:
            self._waiting.extend(jobs)
            if self._closed:
                self._refuse_waiting()
            self._changed.notify_all()

    def _refuse_waiting(self) -> None:
        while self._waiting:
            self._waiting.popleft().fail(RequestError(STOPPED, status=503, kind="server_error"))

    def cancel(self, job: Job) -> None:
        """Nobody waits for this answer any more: it ends after the current token, or is never begun."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify_all()

    def close(self) -> None:
        """Stops after the current token; chats that wait fail with 503."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.cancelled = True
            self._changed.notify_all()
        self._thread.join()

    def choose_length(self, prompt: Prompt, wanted: int | None, limit: int) -> int:
        """The longest answer in tokens: what was asked for, within the server's limit and the model's context.

        Raises:
            RequestError: the prompt leaves no room for one token.
        """
        room = limit if self.context is None else min(limit, self.context - len(prompt.input_ids))
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt.input_ids)} tokens ({prompt.image_tokens} of them for images); the model "
                f"takes {self.context} together with the answer. Send fewer or smaller images, or a shorter text."
            )
        return min(wanted or room, room)

    # ---- in the engine's thread

    def _run(self) -> None:
        while (jobs := self._collect()) is not None:
            started = time.monotonic()
            try:
                self._answer(jobs)
            except Exception as error:
                # Without the message, which may quote what a client sent.
                logger.error(f"a batch failed: {type(error).__name__}\n{''.join(format_tb(error.__traceback__))}")
                for job in jobs:
                    job.fail(error)
            finally:
                self._ended = time.monotonic()
                self._took = self._ended - started
                self._running = []
        self._refuse_waiting()

    def _collect(self) -> list[Job] | None:
        """The next batch: the chat that waits longest, and others with prompts of similar length; `None` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            # Without this, clients that ask again and again would split into groups that wait for each other.
            expected = min(self._clients, self.max_batch)
            left = self._ended + self.batch_seconds - time.monotonic()
            self._changed.wait_for(lambda: self.waiting >= expected or self._closed, max(left, 0))
            self._changed.wait_for(
                lambda: not self._expected or len(self._waiting) >= self.max_batch or self._closed,
                max(self.batch_seconds, self._took / 10),
            )
            if not self._waiting:  # its client left meanwhile
                return []
            length = len(self._waiting[0].prompt.input_ids)
            # Rows are padded to the longest: a page of 576 tokens beside a greeting would cost both the page.
            similar = [job for job in self._waiting if abs(len(job.prompt.input_ids) - length) <= max(64, length // 2)]
            self._running = similar[: self.max_batch]
            self._clients = self.waiting
            for job in self._running:
                self._waiting.remove(job)
            return self._running

    def _answer(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.cancelled]
        if not jobs:
            return
        try:
            self._generate(jobs)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            logger.warning(f"out of memory with a batch of {len(jobs)}")
            error = RequestError("the server ran out of memory for this request", status=503, kind="server_error")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            for job in jobs:
                if len(jobs) == 1 or job.text.tokens:
                    job.fail(error)
                elif not job.done:
                    self._answer([job])

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> None:
        self.batch_sizes(len(jobs))
        for job in jobs:
            job.start(self.processor.tokenizer, self.end_ids, self.stop_strings)
        self._encode_images(jobs)
        inputs_embeds, attention_mask = self._embed(jobs)
        config = GenerationConfig(
            max_new_tokens=max(job.settings.max_new_tokens for job in jobs),
            num_beams=1,
            do_sample=False,
            # Without sampling, generate() warns about any sampling settings of the checkpoint that are not neutral.
            temperature=1.0,
            top_p=1.0,
            top_k=50,
        )
        self.model.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            generation_config=config,
            tokenizer=self.processor.tokenizer,  # for checkpoints that have stop strings of transformers' own
            logits_processor=LogitsProcessorList([_ChooseByRow(jobs)]),
            stopping_criteria=StoppingCriteriaList([_StopByRow(jobs)]),
        )
        for job in jobs:
            if not job.done:
                job.finish("length")

    def _encode_images(self, jobs: list[Job]) -> None:
        """Gives every image of the batch its features; images of one size run through the tower together."""
        groups: dict[tuple, dict[str, list[ImageInput]]] = {}
        for image in (image for job in jobs for image in job.prompt.images):
            if image.features is None:
                shape = tuple(image.pixel_values.shape)
                groups.setdefault(shape, {}).setdefault(image.key, []).append(image)
        for group in groups.values():
            keys = list(group)
            for chunk in (keys[start : start + TOWER_BATCH] for start in range(0, len(keys), TOWER_BATCH)):
                pixel_values = torch.cat([group[key][0].pixel_values for key in chunk])  # (I, C, H, W)
                pixel_values = move_pixels(self.processor, pixel_values, self.model)
                encoded = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
                for key, features in zip(chunk, encoded, strict=True):
                    features = features.clone()  # (N, D), not a view that would keep its whole group in memory
                    self.cache.put(key, features)
                    for image in group[key]:
                        image.features, image.pixel_values = features, None

    def _embed(self, jobs: list[Job]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(B, S, D)` with the features in the places of their placeholders, and the mask `(B, S)`."""
        embeddings = self.model.get_input_embeddings()
        longest = max(len(job.prompt.input_ids) for job in jobs)
        rows, mask = [], torch.zeros(len(jobs), longest, dtype=torch.long, device=self.model.device)
        for row, job in enumerate(jobs):
            input_ids = job.prompt.input_ids.to(self.model.device)
            embeds = embeddings(input_ids)  # (s, D)
            if job.prompt.images:
                features = torch.cat([image.features for image in job.prompt.images]).to(embeds)
                embeds = embeds.masked_scatter((input_ids == self.processor.image_token_id)[:, None], features)
            rows.append(torch.nn.functional.pad(embeds, (0, 0, longest - len(input_ids), 0)))  # (S, D)
            mask[row, longest - len(input_ids) :] = 1
        return torch.stack(rows), mask
