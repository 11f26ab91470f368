"""How a vocabulary grows: a placeholder for images and a pad token, and rows for them in the tables.

Notation: `R` rows of the original tables, `V` rows of the new ones, `D` width of the language model.

Source of the original behaviour: alibaba/conv-llava, `llava/train/train.py` (`smart_tokenizer_and_embedding_resize`:
new rows are the mean of the old ones).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checkpoints.weight_maps import ConversionError
from .sources import LanguageModel


PAD_TOKEN = "<pad>"
# Matrix products of such sizes are fast, and the table can be divided between devices.
VOCABULARY_MULTIPLE = 64
# Rows that are summed at a time, in float64.
ROWS_AT_ONCE = 2048
# What the formats without a family need, whatever the tokenizer: they are added where they are missing.
CHAT_TOKENS = dict.fromkeys(("chatml", "chatml_direct", "mpt"), ("<|im_start|>", "<|im_end|>"))


@dataclass
class Vocabulary:
    """How tables of `R` rows grow to `V`.

    Attributes:
        tensors: the tables, new names; the first is that of the input embeddings.
        num_words: rows of the original that hold words.
        added: new token -> id.
        rows_before, rows_after: `R` and `V`.
        rows_kept: rows that keep their values, unless they are of a new token.
    """

    tensors: tuple[str, ...]
    num_words: int
    added: dict[str, int]
    rows_before: int
    rows_after: int
    rows_kept: int

    @property
    def new_rows(self) -> list[int]:
        """Rows that get values of their own: those of new tokens and those behind the ones that are kept."""
        return sorted({*self.added.values(), *range(self.rows_kept, self.rows_after)})


def add_tokens(language: LanguageModel) -> Vocabulary:
    """Gives the tokenizer a placeholder and a pad token of their own, and says how the tables grow."""
    source, tokenizer = language.source, language.tokenizer
    if language.embeddings not in source.targets:
        raise ConversionError(f"{source.name} has no input embeddings ({language.embeddings!r}). Get it again.")
    name = source.targets[language.embeddings]
    known = tokenizer.get_vocab().keys() - language.added_tokens
    rows, num_words = source.tensors[name].shape[0], count_ids(tokenizer) - len(language.added_tokens)
    if num_words > rows:
        raise ConversionError(
            f"the tokenizer of {source.name} has {num_words} ids and its embeddings {name!r} have {rows} rows; "
            "expected a row for each token. The tokenizer is not of this model: get both again."
        )
    _add_special_tokens(tokenizer, [language.image_token])
    # Where padding is the unknown word or the end of a text, these would be ignored where they are meant.
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.unk_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokens = (*language.added_tokens, language.image_token, tokenizer.pad_token)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    added = {token: number for token, number in ids.items() if token not in known}
    language.tokenizer = language.finish_tokenizer(tokenizer)
    # The LLaVA family's loader cuts the tables to the tokenizer's words. ConvLLaVA's has a row for each row of before.
    kept = num_words if language.cut_vocabulary else rows
    rows_after = -(-max(kept, count_ids(tokenizer)) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    tables = (language.embeddings, f"{language.head}.weight", f"{language.head}.bias")
    return Vocabulary(tables, num_words, added, rows, rows_after, kept)


def add_chat_tokens(language: LanguageModel, chat_template: str) -> None:
    """Gives the tokenizer the tokens of a chat template that can be added to any; the model gets their rows later."""
    tokenizer = language.tokenizer
    words = tokenizer.get_vocab()
    missing = [token for token in CHAT_TOKENS.get(chat_template, ()) if token not in words]
    if missing:
        _add_special_tokens(tokenizer, missing)
        language.added_tokens = tuple(missing)


def _add_special_tokens(tokenizer, tokens: list[str]):
    """Adds tokens to those that have no name of their own, which transformers would replace."""
    named = {str(token) for token in tokenizer.special_tokens_map.values()}
    others = [token for token in tokenizer.extra_special_tokens if str(token) not in named]
    tokenizer.add_special_tokens({"additional_special_tokens": [*others, *tokens]})


def list_end_ids(language: LanguageModel) -> list[int]:
    """Where generation stops: what the language model's configuration says, and the end of a text of its tokenizer."""
    ends = language.config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    # Configurations of the first LLaMA conversions name other ids than their tokenizers have.
    if language.tokenizer.eos_token_id not in (None, *ends):
        ends.append(language.tokenizer.eos_token_id)
    return ends


def count_ids(tokenizer) -> int:
    """How many rows the ids of a tokenizer take: one more than its highest id, since some leave ids out."""
    return max(tokenizer.get_vocab().values()) + 1


def extend_rows(
    rows: torch.Tensor, num_rows: int, new_rows: Sequence[int], num_words: int, distinct: bool
) -> torch.Tensor:
    """Resizes a table of the vocabulary and fills rows from the words that are there, without random numbers.

    Args:
        rows: `(R, D)` weights, or `(R,)` biases.
        num_rows: `V`.
        new_rows: rows to fill; the others keep their values.
        num_words: how many rows, from the first, the means are taken over.
        distinct: the k-th of n new rows is the mean of every n-th word from the k-th on. Input embeddings need rows
            that differ, or a placeholder could not be told from padding. Otherwise every new row is the mean of all
            words: in the output layer this makes a new token's score the mean score.

    Returns:
        `(V, D)` or `(V,)`, in the same dtype. Means are taken in float64.
    """
    if not new_rows:
        return rows
    table = rows.new_empty((num_rows, *rows.shape[1:]))
    table[: len(rows)] = rows[:num_rows]
    step = min(len(new_rows), num_words) if distinct else 1
    sums = torch.zeros((step, *rows.shape[1:]), dtype=torch.float64)
    block = step * max(1, ROWS_AT_ONCE // max(1, step))
    for start in range(0, num_words, block):
        words = rows[start : min(start + block, num_words)].double()
        for offset in range(min(step, len(words))):
            sums[offset] += words[offset::step].sum(0)
    for number, row in enumerate(new_rows):
        offset = number % step
        table[row] = (sums[offset] / len(range(offset, num_words, step))).to(rows.dtype)
    return table
