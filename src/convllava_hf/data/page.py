"""A page that shows rows of a dataset as a checkpoint sees them: images, prompt, and which tokens carry loss."""

import base64
import html
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from ..images import decode_image
from .rows import list_parts


THUMBNAIL = 360  # pixels
WINDOW = 6  # tokens that are decoded together to find the text of the last of them
STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2.2rem 0 .5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
.counts { color: #555; font-weight: normal; margin-left: .6rem; }
figure { display: inline-block; margin: 0 .8rem .8rem 0; vertical-align: top; }
figcaption { color: #555; font-size: .8rem; }
img { max-width: 22rem; max-height: 22rem; border: 1px solid #ddd; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.6 ui-monospace, monospace; margin: 0; }
.text span { border-radius: 2px; box-shadow: inset -1px 0 #0002; }
.loss { background: #b9e6c0; } .none { background: #eee; } .image { background: #c9d8f5; padding: 0 .3rem; }
.role { color: #555; }
"""


def read_rows(folder: str | Path, count: int, seed: int = 0) -> list[tuple[str, int, dict]]:
    """Draws rows of a built dataset without reading the others.

    Args:
        folder: of the parquet files.
        count: number of rows; all, where there are fewer.
        seed: of the choice.

    Returns:
        File name, number of the row in it, and the row with undecoded images.

    Raises:
        FileNotFoundError: there is no parquet file.
    """
    files = sorted(Path(folder).glob("**/*.parquet"))
    if not files:
        raise FileNotFoundError(f"no parquet file in {folder}; expected a folder that `convllava data build` made.")
    ends, total = [], 0
    for file in files:
        total += pq.read_metadata(file).num_rows
        ends.append(total)
    rows, chosen = [], sorted(random.Random(seed).sample(range(total), min(count, total)))
    for file, end in zip(files, ends, strict=True):
        parquet = pq.ParquetFile(file)
        start = end - parquet.metadata.num_rows
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            numbers = [number for number in chosen if start <= number < stop]
            if numbers:
                table = parquet.read_row_group(group, columns=["messages", "images"])
                first = end - parquet.metadata.num_rows
                for number in numbers:
                    row = table.slice(number - start, 1).to_pylist()[0]
                    messages = list_parts(row["messages"], len(row["images"] or []))
                    rows.append((file.name, number - first, {**row, "messages": messages}))
            start = stop
    return rows


def render_page(rows: list[tuple[str, int, dict]], title: str, processor=None) -> str:
    """Renders rows as an HTML page that needs no other file.

    Args:
        rows: of `read_rows`.
        title: of the page.
        processor: of a checkpoint; its template and tokenizer tell what carries loss. Without it only the conversation
            is shown.

    Returns:
        The page.

    Raises:
        ValueError: an image cannot be read.
    """
    legend = (
        '<span class="loss">carries loss</span> <span class="none">does not</span> <span class="image">image</span>. '
        "A line at the right edge ends a token."
        if processor
        else "The conversations alone: which tokens carry loss depends on a checkpoint (--model)."
    )
    body = [f"<h1>{html.escape(title)}</h1><p class='text'>{legend}</p>"]
    for file, number, row in rows:
        try:
            images = [decode_image(image) for image in row["images"] or []]
        except ValueError as error:
            raise ValueError(f"{file}, row {number}: {error}; see `convllava data check`.") from error
        text, counts = render_tokens(row, images, processor) if processor else (render_messages(row), "")
        body.append(f"<h2>{html.escape(file)}, row {number}<span class='counts'>{counts}</span></h2>")
        body += [render_image(image, index) for index, image in enumerate(images, 1)]
        body.append(f"<p class='text'>{text}</p>")
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def render_image(image: Image.Image, number: int) -> str:
    caption = f"image {number}: {image.width} x {image.height} pixels"
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    picture = f"<img alt='image {number}' src='data:image/jpeg;base64,{data}'>"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def render_messages(row: dict) -> str:
    lines = []
    for message in row["messages"]:
        text = "".join(
            '<span class="image">image</span>\n' if part["type"] == "image" else html.escape(part["text"] or "")
            for part in message["content"]
        )
        lines.append(f'<span class="role">{message["role"]}</span>\n{text}')
    return "\n\n".join(lines)


def render_tokens(row: dict, images: list[Image.Image], processor) -> tuple[str, str]:
    """The prompt of a row with every token in its colour, and its numbers of tokens."""
    ids, trained = encode_row(row, images, processor)
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    spans, start, number = [], 0, 0
    while start < len(ids):
        end = start + 1
        while end < len(ids) and (trained[end], ids[end] == image_id) == (trained[start], ids[start] == image_id):
            end += 1
        if ids[start] == image_id:
            number += 1
            spans.append(f'<span class="image">{end - start} image tokens</span>')
        else:
            kind = "loss" if trained[start] else "none"
            texts = split_tokens(ids, start, end, processor.tokenizer)
            spans += [f'<span class="{kind}">{html.escape(text)}</span>' for text in texts]
        start = end
    return "".join(spans), f"{len(ids)} tokens, {sum(trained)} of them carry loss"


def encode_row(row: dict, images: list[Image.Image], processor) -> tuple[list[int], list[int]]:
    """Token ids of a row, and 1 where a token carries loss, by the call that training makes."""
    left = iter(images)
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(left)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in row["messages"]
    ]
    encoded = processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    return encoded["input_ids"][0].tolist(), encoded["assistant_masks"][0].tolist()


def split_tokens(ids: list[int], start: int, stop: int, tokenizer) -> Iterator[str]:
    """Texts of the tokens `ids[start:stop]`; tokens that are parts of one character stay together."""
    for end in range(start + 1, stop + 1):
        before = ids[max(0, start - WINDOW) : start]
        text = tokenizer.decode(before + ids[start:end])[len(tokenizer.decode(before)) :]
        if text.endswith("\ufffd") and end < stop and end - start < WINDOW:
            continue
        yield text
        start = end


def write_page(folder: str | Path, output: str | Path, count: int = 20, seed: int = 0, processor=None) -> int:
    """Writes a page with rows of a dataset; arguments as above.

    Returns:
        Number of rows on it.
    """
    rows = read_rows(folder, count, seed)
    title = f"{len(rows)} rows of {Path(folder).resolve().name}"
    output = Path(output)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(render_page(rows, title, processor), encoding="utf-8")
    os.replace(temporary, output)
    return len(rows)
