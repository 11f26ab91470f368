"""How many tokens an image may take: settings of an image processor that bound or replace its size.

Sizes are in pixels; a token stands for a square cell of `downsampling_factor` pixels a side.
"""

import math


def limit_image_tokens(image_processor, max_image_tokens: int) -> dict:
    """Settings of the image processor under which no image takes more than `max_image_tokens`.

    `native` has such a budget. `pad` and `squash` keep the preprocessing that the model was trained with, at the
    largest size of the same shape that fits.

    Args:
        image_processor: of a checkpoint of ours; stays as it is.
        max_image_tokens: most tokens of an image.

    Returns:
        Keyword arguments for a call of the image processor.

    Raises:
        ValueError: fewer than one token, or an image processor whose images have a fixed number of tokens.
    """
    if max_image_tokens < 1:
        raise ValueError(f"max_image_tokens={max_image_tokens}; expected 1 or more.")
    _check_that_sizes_vary(image_processor, f"max_image_tokens={max_image_tokens}")
    factor, size = image_processor.downsampling_factor, image_processor.size
    rows, columns = size["height"] // factor, size["width"] // factor
    if image_processor.image_aspect_ratio == "native":
        budget = min(max_image_tokens, image_processor.max_image_tokens or rows * columns)
        return {"max_image_tokens": budget, "min_image_tokens": min(image_processor.min_image_tokens, budget)}
    scale = min(1.0, math.sqrt(max_image_tokens / (rows * columns)))
    shorter = max(1, math.floor(min(rows, columns) * scale + 1e-9))
    longer = min(math.floor(max(rows, columns) * scale + 1e-9), max_image_tokens // shorter)
    rows, columns = (shorter, longer) if rows <= columns else (longer, shorter)
    return {"size": {"height": rows * factor, "width": columns * factor}}


def set_image_size(image_processor, side: int) -> None:
    """Sets the square that images are padded or squashed to; for `native` that square is the budget.

    Args:
        image_processor: of a checkpoint of ours; is changed.
        side: of the square.

    Raises:
        ValueError: not a multiple of the cell's side, or an image processor whose images have a fixed size.
    """
    _check_that_sizes_vary(image_processor, f"image_size={side}")
    factor = image_processor.downsampling_factor
    if side < factor or side % factor:
        raise ValueError(f"image_size={side}; expected a multiple of {factor}, the side of a token's cell in pixels.")
    image_processor.size = type(image_processor.size)(height=side, width=side)
    if image_processor.image_aspect_ratio == "native":
        image_processor.max_image_tokens = None
        image_processor.min_image_tokens = min(image_processor.min_image_tokens, (side // factor) ** 2)


def _check_that_sizes_vary(image_processor, setting: str):
    if not hasattr(image_processor, "num_image_tokens"):
        raise ValueError(
            f"{setting} is not supported by {type(image_processor).__name__}: its images have a fixed number of "
            "tokens. Leave it out, or take a checkpoint with a convolutional tower."
        )
