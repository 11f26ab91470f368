"""Rows of LLaVA-format JSON: read one by one, made into messages, checked, cut.

A row is `{"image": name or list of names, "conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt",
"value": ...}]}`; without `image` it is text only. ShareGPT4V, ALLaVA, LLaVA-Pretrain, LLaVA-Instruct, the mix of 665K,
LLaVAR, Vision-Flan and TinyLLaVA all have this form. Rows are counted from 0, as in Python.

Notation: `H, W` pixels.

Source of the handling of turns and images: haotian-liu/LLaVA and alibaba/conv-llava, `llava/train/train.py`
(`preprocess_multimodal`, `preprocess_v1`); SALT-NLP/LLaVAR keeps images where they stand.
"""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..tokens import tokenize_row


IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
LEADING_IMAGES = re.compile(f"(?:{IMAGE}\n)*")
BEGIN = 2**12  # bytes that tell a list from lines
BLOCK = 2**20  # bytes of a list that are read at once
LONGEST_ROW = 64 * 2**20  # characters or bytes; what has no end after so many is no row
BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]', re.DOTALL)
EXCERPT = 500  # characters of a bad row that are kept to show it


class BadRow(ValueError):
    """A row that cannot be trained on.

    Args:
        kind: one of "malformed row", "unknown role", "turn order", "empty answer", "image count", "missing image",
            "undecodable image", "row too long", "unusable row".
        error: what is wrong with which value.
    """

    def __init__(self, kind: str, error: str):
        super().__init__(f"{kind}: {error}")
        self.kind, self.error = kind, error


@contextmanager
def blame_row() -> Iterator[None]:
    """Makes a `BadRow` of every exception but those of the machine: no row can stop what is done with the others."""
    try:
        yield
    except (BadRow, MemoryError):
        raise
    except Exception as error:
        raise BadRow("unusable row", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


class RowText(NamedTuple):
    """A row of a JSON file: its text, the line that it begins at (from 1), and the bytes that were read so far.

    Bytes that are no UTF-8 are lone surrogates in the text, which JSON itself has only behind escapes.
    """

    text: str
    line: int
    size: int


def parse_row(text: str):
    """What a row's text says.

    Raises:
        BadRow: "malformed row": it is no JSON, or no UTF-8.
    """
    try:
        text.encode()
        return json.loads(text)
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        raise BadRow("malformed row", f"is not UTF-8 near {near!a}") from None
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        raise BadRow("malformed row", f"no valid JSON near {near!a}: {error.msg}") from None


def iterate_json(path: str | Path) -> Iterator[RowText]:
    """The rows of a JSON list, or of one JSON object per line, as text, in constant memory.

    A row whose brackets close is a row, however its values look to Python: numbers of any length, any depth. With one
    object per line, a line that is no JSON is a row as well, see `parse_row`; in a list nobody knows where it ends.

    Args:
        path: of the file, UTF-8.

    Raises:
        ValueError: the file is no such JSON, or ends early; names the row and its line.
    """
    with open(path, "rb") as file:
        begin = file.read(BEGIN).decode("utf-8-sig", "surrogateescape").lstrip()[:20]
        file.seek(0)
        if begin.startswith("["):
            yield from _iterate_list(path, file)
        elif begin.startswith("{"):
            yield from _iterate_lines(path, file)
        elif "\udc80" <= begin[:1] <= "\udcff":
            raise ValueError(f"{path}: is not UTF-8 at its beginning; convert the file.")
        else:
            raise ValueError(f"{path}: begins with {begin!r}; expected a JSON list, or one JSON object per line.")


def _iterate_lines(path: str | Path, file: BinaryIO) -> Iterator[RowText]:
    for line, content in enumerate(iter(partial(file.readline, LONGEST_ROW), b""), 1):
        if len(content) == LONGEST_ROW:
            raise ValueError(f"{path}, line {line}: does not end within {LONGEST_ROW:,} bytes; is it JSON Lines?")
        text = content.decode("utf-8-sig" if line == 1 else "utf-8", "surrogateescape").strip()
        if text == "{":
            problem = "an object goes over several lines; expected one per line, or a JSON list"
            raise ValueError(f"{path}, line {line}: {problem}.")
        if text:
            yield RowText(text, line, file.tell())


def _iterate_list(path: str | Path, file: BinaryIO) -> Iterator[RowText]:
    # Only the ends of the rows are wanted here, so numbers need not become numbers.
    scan = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    blank = re.compile(r"\s*").match
    buffer, position, row, line, size, ended = "", 0, 0, 1, 0, False

    def read_more() -> None:
        nonlocal buffer, position, size, ended
        # Rows that are longer than a block double what is read, or they would be scanned over and over.
        block = file.read(max(BLOCK, len(buffer) - position))
        size, ended = size + len(block), not block
        buffer, position = buffer[position:] + decode(block, ended), 0

    def move_to(end: int) -> None:
        nonlocal position, line
        line += buffer.count("\n", position, end)
        position = end

    def skip_blank() -> str:
        while True:
            move_to(blank(buffer, position).end())
            if position < len(buffer) or ended:
                return buffer[position : position + 1]
            read_more()

    skip_blank()
    position += 1  # the bracket that opens the list
    delimiter = skip_blank()
    position += delimiter == "]"
    while delimiter != "]":
        skip_blank()
        while True:
            try:
                try:
                    _, end = scan(buffer, position)
                except RecursionError:
                    end = _find_end(buffer, position)
                if end < len(buffer) or ended:  # else a number might go on
                    break
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated string")
                if ended or not is_cut or len(buffer) - position > LONGEST_ROW:
                    what = "the file ends inside of it; is it complete?" if ended and is_cut else error.msg
                    near = buffer[max(position, error.pos - 20) : error.pos + 20]
                    near_line = line + buffer.count("\n", position, error.pos)
                    raise ValueError(
                        f"{path}, row {row} (line {near_line}): no valid JSON near {near!r}: {what}"
                    ) from error
            read_more()
        text = buffer[position:end]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad_line = line + text.count("\n", 0, error.start)
            near = text[max(0, error.start - 20) : error.end + 20]
            raise ValueError(
                f"{path}, row {row} (line {bad_line}): is not UTF-8 near {near!a}; convert the file."
            ) from None
        yield RowText(text, line, size)
        move_to(end)
        row += 1
        delimiter = skip_blank()
        position += 1
        if delimiter not in ("]", ","):
            what = f"found {delimiter!r}" if delimiter else "the file ends; is it complete?"
            raise ValueError(f"{path}, after row {row - 1} (line {line}): expected ',' or ']', but {what}")
    if skip_blank():
        raise ValueError(f"{path}: goes on after the end of the list, with {buffer[position : position + 20]!r}.")


def _find_end(text: str, start: int) -> int:
    """Where the brackets that open at `start` are closed; for rows too deep for Python's parser."""
    depth = 0
    for match in BRACKETS.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise json.JSONDecodeError("Unterminated string or brackets", text, len(text))


def convert_row(row: dict, image_placement: str = "front") -> tuple[list[dict], list[str], bool]:
    """Makes messages of a row in LLaVA's form.

    Args:
        row: `conversations`, and `image` where it has any.
        image_placement: see `Source`.

    Returns:
        `messages`, whose content is a list of `{"type": "image", "text": None}` and `{"type": "text", "text": ...}`;
        names of the images in reading order; whether a first turn of the assistant was dropped, as the original does.

    Raises:
        BadRow: "malformed row" or "unknown role".
    """
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise BadRow("malformed row", f"expected an object with a list `conversations`, got {json.dumps(row)[:80]}")
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRow("malformed row", f"image={str(names)[:80]!r}; expected a name or a list of names")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRow("malformed row", f"turn {number} is {str(turn)[:80]!r}; expected `from` and a text `value`")
        role = ROLES.get(turn.get("from")) if isinstance(turn.get("from"), str) else None
        if role is None:
            raise BadRow("unknown role", f"{turn.get('from')!r} in turn {number}; expected human, gpt or system")
        try:
            turn["value"].encode()
        except UnicodeEncodeError:
            raise BadRow("malformed row", f"half a character (a lone surrogate) in turn {number}") from None
        messages.append({"role": role, "content": split_content(turn["value"], image_placement)})
    dropped = messages[0]["role"] == "assistant" and len(messages) > 1
    return messages[dropped:], names, dropped


def split_content(value: str, image_placement: str = "front") -> list[dict]:
    """Splits the text of a turn at its images, so that our chat templates render it as it was.

    They write an image before the first text as `<image>` and a line break, and a later one as `<image>`; an empty text
    therefore stands in front of images that no line break follows.
    """
    if IMAGE not in value:
        return [{"type": "text", "text": value}]
    if image_placement == "front" and value.count(IMAGE) == 1:
        value = f"{IMAGE}\n{value.replace(IMAGE, '').strip()}".strip()
    leading = LEADING_IMAGES.match(value).end()
    image = {"type": "image", "text": None}
    parts = [image] * (leading // len(IMAGE + "\n"))
    first, *rest = value[leading:].split(IMAGE)
    if first or rest:
        parts = [*parts, {"type": "text", "text": first}]
    for text in rest:
        parts += [image, {"type": "text", "text": text}] if text else [image]
    return parts


def check_messages(messages: list[dict], num_images: int) -> None:
    """Checks roles, order, answers and the number of images of a conversation.

    Raises:
        BadRow: "unknown role", "turn order", "empty answer" or "image count".
    """
    roles = [message["role"] for message in messages]
    if unknown := set(roles) - set(ROLES.values()):
        raise BadRow("unknown role", f"{sorted(unknown)[0]!r}; expected user, assistant or system")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) % 2 or not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow("turn order", f"{' '.join(roles)[:80]}; expected user and assistant in turn, the assistant last")
    placeholders = 0
    for number, message in enumerate(messages):
        parts = message["content"]
        found = sum(part["type"] == "image" for part in parts)
        if message["role"] == "assistant":
            if found:
                raise BadRow("image count", f"{IMAGE} in an answer (message {number}); expected it in questions alone")
            if not "".join(part["text"] or "" for part in parts).strip():
                raise BadRow("empty answer", f"message {number} is empty")
        placeholders += found
    if placeholders != num_images:
        raise BadRow("image count", f"{num_images} images, but {IMAGE} stands {placeholders} times in the text")


def cut_messages(
    messages: list[dict], sizes: list[tuple[int, int]], processor, max_length: int | None, long_rows: str = "error"
) -> tuple[list[dict], int]:
    """Cuts a conversation to a number of tokens by whole rounds from its end, so that no image is ever cut.

    Args:
        messages: of one row.
        sizes: `(H, W)` of its images in pixels.
        processor: of the checkpoint to train.
        max_length: most tokens; `None` for any number.
        long_rows: "cut", or "error" for rows that are too long.

    Returns:
        The messages that stay, and their tokens; the images of rounds that go, go with them.

    Raises:
        BadRow: "row too long": the first round alone is, or `long_rows` is "error".
    """
    while (length := len(tokenize_row(messages, sizes, processor))) > (max_length or length):
        rounds = sum(message["role"] == "assistant" for message in messages)
        if rounds == 1 or long_rows == "error":
            which = "its first round has" if long_rows == "cut" else "has"
            raise BadRow("row too long", f"{which} {length} tokens, {len(sizes)} images included; at most {max_length}")
        messages = messages[:-2]
        sizes = sizes[: count_images(messages)]
    return messages, length


def count_images(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])
