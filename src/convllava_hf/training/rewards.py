"""Rewards that can be verified, for `trl grpo` and `trl rloo`, which take them by their dotted paths."""

from .sample_answers import is_exact


def match_solution(completions: list, solution: list[str], **_) -> list[float]:
    """1 for an answer that equals the solution, white space aside, and else 0.

    Args:
        completions: answers, as texts or as conversations of one message each.
        solution: the column of the data that holds the right answers.
    """
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return [float(is_exact(text, right)) for text, right in zip(texts, solution, strict=True)]
