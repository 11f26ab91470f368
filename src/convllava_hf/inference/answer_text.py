"""Text out of tokens, as they are generated."""


class AnswerText:
    """Puts tokens together to text, up to a stop string, and releases only what later tokens cannot change.

    White space around the answer is dropped. Half a character waits for its other tokens, and the beginning of a stop
    string for its end.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer and do not belong to it.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.tokens, self._prefix, self._read, self._text, self._sent = [], 0, 0, "", 0

    def _decode(self, tokens) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token: int | None) -> str:
        """Takes a token, or `None` for the end, and returns the text that is safe to show after it."""
        if token is not None:
            self.tokens.append(token)
        # Decoding starts at a token before the new ones: whether a piece begins with a space depends on it.
        old = self._decode(self.tokens[self._prefix : self._read])
        new = self._decode(self.tokens[self._prefix :])
        if token is None or not new.endswith("\N{REPLACEMENT CHARACTER}"):
            self._text += new[len(old) :]
            if not self._sent:
                self._text = self._text.lstrip()
            self._prefix, self._read = self._read, len(self.tokens)
        ends = [at for at in (self._text.find(stop, self._sent) for stop in self.stop) if at >= 0]
        if ends:
            self.stopped = True
            self._text = self._text[: min(ends)]
        safe = len(self._text.rstrip())
        if not self.stopped and token is not None:
            for stop in self.stop:
                held = next((n for n in range(len(stop) - 1, 0, -1) if self._text.endswith(stop[:n])), 0)
                safe = min(safe, len(self._text[: len(self._text) - held].rstrip()))
        piece = self._text[self._sent : safe]
        self._sent = max(self._sent, safe)
        return piece
