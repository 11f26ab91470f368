"""Structured output: answers that follow a JSON schema, with xgrammar."""

import importlib.util
import threading

import torch

from .requests import RequestError


class GrammarCompiler:
    """Compiles schemas for one model.

    Args:
        tokenizer: of the model.
        vocab_size: rows of its output layer.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer, vocab_size: int, end_ids: set[int]):
        self.tokenizer, self.vocab_size, self.end_ids = tokenizer, vocab_size, end_ids
        self._compiler, self._lock = None, threading.Lock()

    def compile(self, schema: str) -> "Matcher":
        """A matcher for one answer.

        Args:
            schema: JSON schema as text, checked by `requests.check_schema`.

        Raises:
            RequestError: xgrammar is not installed, or does not take the schema.
        """
        if importlib.util.find_spec("xgrammar") is None:
            raise RequestError("response_format needs xgrammar on the server: pip install 'convllava-hf[serving]'")
        import xgrammar

        with self._lock:
            if self._compiler is None:
                information = xgrammar.TokenizerInfo.from_huggingface(
                    self.tokenizer, vocab_size=self.vocab_size, stop_token_ids=sorted(self.end_ids) or None
                )
                self._compiler = xgrammar.GrammarCompiler(information, max_threads=1, cache_limit_bytes=64 * 2**20)
            try:
                compiled = self._compiler.compile_json_schema(schema, any_whitespace=False)
            except RuntimeError:  # its errors have no other common base
                raise RequestError("the JSON schema is not one that xgrammar takes") from None
        return Matcher(xgrammar.GrammarMatcher(compiled), xgrammar.allocate_token_bitmask(1, self.vocab_size))


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher, bitmask: torch.Tensor):
        self._matcher, self._bitmask = matcher, bitmask

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(V,)` with -inf where a token would break the grammar."""
        if self._matcher.is_terminated():
            return scores
        self._matcher.fill_next_token_bitmask(self._bitmask)
        words = self._bitmask[0].to(scores.device)  # (ceil(V / 32),), 32 tokens per number
        bits = (words[:, None] >> torch.arange(32, device=scores.device)) & 1
        return scores.masked_fill(bits.flatten()[: len(scores)] == 0, -torch.inf)

    def accept(self, token: int) -> None:
        """Moves on by one token."""
        if not self._matcher.is_terminated():
            self._matcher.accept_token(token)
