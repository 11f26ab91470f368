"""A page that shows rows of a dataset as a checkpoint sees them: images, prompt, and which tokens carry loss."""

import html
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from ..images import decode_image, encode_thumbnail
from ..tokens import count_image_tokens, list_parts, place_images
from .build import REPORT
from .check import list_splits
from .report import describe_bad_row


THUMBNAIL = 360  # pixels
LARGEST_VIEW = 768  # of a processed picture on the page
WINDOW = 6  # tokens that are decoded together to find the text of the last of them
STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2.2rem 0 .5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
.counts { color: #555; font-weight: normal; margin-left: .6rem; }
figure { display: inline-block; margin: 0 .8rem .8rem 0; vertical-align: top; }
figcaption { color: #555; font-size: .8rem; }
img { max-width: 22rem; max-height: 22rem; min-width: 8rem; border: 1px solid #ddd; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.6 ui-monospace, monospace; margin: 0; }
.text span { border-radius: 2px; box-shadow: inset -1px 0 #0002; }
.loss { background: #b9e6c0; } .none { background: #eee; } .image { background: #c9d8f5; padding: 0 .3rem; }
.role { color: #555; } .bad { color: #a11; }
"""


def read_rows(
    folder: str | Path, count: int, seed: int = 0, numbers: list[int] | None = None, split: str | None = None
) -> list[tuple[str, int, dict]]:
    """Draws rows of a built dataset, or takes the ones that are asked for, without reading the others.

    Args:
        folder: of the parquet files.
        count: number of rows to draw; all, where there are fewer.
        seed: of the choice.
        numbers: rows to take instead, as `convllava data check` and `load_dataset(folder)[split]` number them.
        split: "train" or "test"; default: the first that is there.

    Returns:
        Split, number of the row in it, and the row with undecoded images.

    Raises:
        FileNotFoundError: there is no parquet file, or no such split.
        ValueError: a number beyond the last row.
    """
    splits = {path.name: files for path, files in list_splits(folder).items()}
    split = next(iter(splits)) if split is None else split
    if split not in splits:
        raise FileNotFoundError(f"{folder} has no split {split!r}; it has {', '.join(splits)}.")
    starts, total = [], 0
    for file in splits[split]:
        starts.append(total)
        total += pq.read_metadata(file).num_rows
    if numbers is None:
        numbers = sorted(random.Random(seed).sample(range(total), min(count, total)))
    elif beyond := [number for number in numbers if not 0 <= number < total]:
        raise ValueError(f"there is no row {beyond[0]} in {split}: it has {total:,} rows, counted from 0.")
    found = {}
    for file, start in zip(splits[split], starts, strict=True):
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            if wanted := {number for number in numbers if start <= number < stop}:
                columns = [name for name in ("messages", "images", "id") if name in parquet.schema_arrow.names]
                table = parquet.read_row_group(group, columns=columns)
                for number in wanted:
                    row = table.slice(number - start, 1).to_pylist()[0]
                    found[number] = {**row, "messages": list_parts(row["messages"], len(row["images"] or []))}
            start = stop
    return [(split, number, found[number]) for number in numbers]


def render_page(
    rows: list[tuple[str, int, dict]], title: str, processor=None, skipped: list[dict] = (), num_skipped: int = 0
) -> str:
    """Renders rows as an HTML page that needs no other file.

    Args:
        rows: of `read_rows`.
        title: of the page.
        processor: of a checkpoint; its template and tokenizer tell what carries loss, and images are also shown as its
            model sees them. Without it only the conversation is shown.
        skipped: entries of a report about rows that were left out.
        num_skipped: how many there are in all.

    Returns:
        The page.

    Raises:
        ValueError: an image cannot be read.
    """
    legend = (
        '<span class="loss">carries loss</span> <span class="none">does not</span> <span class="image">image</span>. '
        "A line at the right edge ends a token. Beside each image: what the model sees, a cell for every token."
        if processor
        else "The conversations alone: which tokens carry loss depends on a checkpoint (--model)."
    )
    body = [f"<h1>{html.escape(title)}</h1><p class='text'>{legend}</p>"]
    for split, number, row in rows:
        try:
            original_rgb = getattr(getattr(processor, "image_processor", None), "original_rgb", False)
            images = [decode_image(image, original_rgb) for image in row["images"] or []]
        except ValueError as error:
            raise ValueError(f"{split}, row {number}: {error}; see `convllava data check`.") from error
        text, counts = render_tokens(row, images, processor) if processor else (render_messages(row), "")
        name = "" if row.get("id") is None else f" (id {row['id']})"
        heading = html.escape(f"{split}, row {number}{name}")
        body.append(f"<h2>{heading}<span class='counts'>{counts}</span></h2>")
        for index, image in enumerate(images, 1):
            caption = f"image {index}: {image.width} x {image.height} pixels"
            body.append(render_image(image, caption, THUMBNAIL))
            if processor:
                body.append(render_image(*draw_cells(image, processor), LARGEST_VIEW))
        body.append(f"<p class='text'>{text}</p>")
    if skipped:
        body.append(f"<h2>{num_skipped:,} rows were left out<span class='counts'>{len(skipped)} shown</span></h2>")
    for bad in skipped:
        body.append(f"<p class='bad'>{html.escape(describe_bad_row(bad))}</p>")
        body.append(f"<p class='text'>{html.escape(bad.get('text', ''))}</p>")
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def render_image(image: Image.Image, caption: str, largest: int) -> str:
    picture = f"<img alt='{caption}' src='{encode_thumbnail(image, largest)}'>"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def draw_cells(image: Image.Image, processor) -> tuple[Image.Image, str]:
    """The picture that a model gets of an image, with a line around what each token stands for, and a caption."""
    image_processor = processor.image_processor
    pixels = image_processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0].float()  # (3, H, W)
    if image_processor.do_normalize:
        mean, std = (
            pixels.new_tensor(values).view(-1, 1, 1)
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        pixels = pixels * std + mean
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    seen = Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
    (tokens,) = count_image_tokens([(image.height, image.width)], processor)
    cell = math.isqrt(seen.width * seen.height // tokens)
    caption = f"the model sees {seen.width} x {seen.height} in {tokens} tokens"
    if cell * cell * tokens == seen.width * seen.height and seen.width % cell == seen.height % cell == 0:
        draw = ImageDraw.Draw(seen)
        for x in range(cell, seen.width, cell):
            draw.line([(x, 0), (x, seen.height)], "white")
        for y in range(cell, seen.height, cell):
            draw.line([(0, y), (seen.width, y)], "white")
    return seen, caption


def render_messages(row: dict) -> str:
    lines = []
    for message in row["messages"]:
        text = "".join(
            '<span class="image">image</span>\n' if part["type"] == "image" else html.escape(part["text"] or "")
            for part in message["content"]
        )
        lines.append(f'<span class="role">{html.escape(message["role"])}</span>\n{text}')
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
    encoded = processor.apply_chat_template(
        [place_images(row["messages"], images)],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
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


def write_page(
    folder: str | Path,
    output: str | Path,
    count: int = 20,
    seed: int = 0,
    processor=None,
    numbers: list[int] | None = None,
    split: str | None = None,
) -> tuple[int, int]:
    """Writes a page with rows of a dataset, and with rows that its build left out; arguments as above.

    Returns:
        Number of rows on it, and of those that were left out.
    """
    rows = read_rows(folder, count, seed, numbers, split)
    report = Path(folder) / REPORT
    skipped = json.loads(report.read_text(encoding="utf-8"))["bad_rows"] if report.is_file() else []
    title = f"{len(rows)} rows of {Path(folder).resolve().name}"
    output = Path(output)
    temporary = output.with_name(output.name + ".tmp")
    page = render_page(rows, title, processor, skipped[:count], len(skipped))
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, output)
    return len(rows), len(skipped[:count])
