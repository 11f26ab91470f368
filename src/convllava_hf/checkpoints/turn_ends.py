"""How a chat template ends an answer, and whether generation stops there."""

from dataclasses import dataclass
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from .reading import read_json


# Ends in text, as the first LLaVA has between turns and captions have behind them: no token stops there.
TEXT_ENDS = ("###", "")
ANSWER = "An answer."


@dataclass(frozen=True)
class TurnEnd:
    """What a template writes behind an answer, as a part of what is trained, without white space around it.

    Attributes:
        text: the end; empty if there is none.
        token_id: the end as one token that a tokenizer knows as such, not as a word.
        num_tokens: how many tokens the end takes.
    """

    text: str
    token_id: int | None
    num_tokens: int


def find_turn_end(tokenizer, template: str) -> TurnEnd:
    """Renders a chat, and looks at what follows the answer in the part that is trained.

    Args:
        tokenizer: of the model.
        template: a chat template with marks around answers.

    Raises:
        ValueError: the template marks no answer.
    """
    chat = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": ANSWER}]
    # Templates name tokens of the tokenizer, such as `bos_token`.
    texts, spans = render_jinja_template(
        [chat], chat_template=template, return_assistant_tokens_mask=True, **(tokenizer.special_tokens_map)
    )
    marked = [texts[0][start:end] for start, end in spans[0]]
    if not any(ANSWER in text for text in marked):
        raise ValueError(
            "the chat template marks no answer with {% generation %}, so training on answers alone would train nothing."
        )
    text = "".join(marked).partition(ANSWER)[2].strip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    last = ids[-1] if ids and ids[-1] in known and tokenizer.convert_ids_to_tokens(ids[-1]) == text else None
    return TurnEnd(text, last, len(ids))


def find_turn_problem(tokenizer, template: str, end_ids: list[int]) -> str | None:
    """Why answers of a model would not stop where its template ends them; `None` if they do.

    Args:
        tokenizer, template: see [`find_turn_end`].
        end_ids: where generation stops.
    """
    end = find_turn_end(tokenizer, template)
    if end.text in TEXT_ENDS:
        return None
    if end.token_id is None:
        return (
            f"the chat template ends an answer with {end.text!r}, which is no end token of the tokenizer but "
            f"{end.num_tokens} piece(s) of text, so that a model would never stop; expected one token"
        )
    if end.token_id not in end_ids:
        return (
            f"the chat template ends an answer with {end.text!r} (id {end.token_id}); generation stops at "
            f"{', '.join(map(str, end_ids)) or 'no token'}. Add the id to eos_token_id in generation_config.json"
        )
    return None


def read_end_ids(folder: Path) -> list[int]:
    """Where generation stops with a checkpoint: `eos_token_id` of its generation configuration, or of its own."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        settings = read_json(path) if path.is_file() else {}
        for part in (settings, settings.get("text_config") or {}):
            if (ids := part.get("eos_token_id")) is not None:
                return list(ids) if isinstance(ids, list) else [ids]
    return []
