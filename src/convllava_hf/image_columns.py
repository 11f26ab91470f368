"""The images of a dataset's rows: a list of them in the column `images`, or one in the column `image`, as in TRL.

A dataset may have both columns, as where two kinds are joined; in a row with an `image` that one counts.
"""

import io

from datasets import Dataset, Image, IterableDataset, LargeList, List
from PIL import Image as PILImage


COLUMNS = ("images", "image")


def undecode_images(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows with images as `{"bytes", "path"}`: to read headers, take hashes, or name the row that fails.

    Columns that convert their images on decoding (`Image(mode=...)`) stay as they are.

    Args:
        dataset: with any of the columns, or none.

    Raises:
        ValueError: a column that holds something else.
    """
    for column in COLUMNS:
        if column not in (dataset.column_names or []):
            continue
        feature = (dataset.features or {}).get(column)
        is_list = isinstance(feature, (List, LargeList))
        if getattr(feature.feature if is_list else feature, "mode", None):
            continue
        is_list = is_list or (column == "images" and not isinstance(feature, Image))
        undecoded = Image(decode=False)
        try:
            dataset = dataset.cast_column(column, List(undecoded) if is_list else undecoded)
        except Exception as error:  # those of arrow and of datasets have no common base
            raise ValueError(f"the column {column!r} holds {feature}; expected images or lists of them.") from error
    return dataset


def list_images(row: dict) -> list:
    """The images of a row, decoded or not; empty where it has none."""
    found = row["image"] if row.get("image") is not None else row.get("images")
    found = found if isinstance(found, (list, tuple)) else [found]
    return [image for image in found if image is not None]


def read_size(image: dict | PILImage.Image) -> tuple[int, int]:
    """Height and width in pixels, of an undecoded image from its first bytes.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(image, PILImage.Image):
        return image.height, image.width
    try:
        with PILImage.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
            return opened.height, opened.width
    except Exception as error:  # Pillow raises whatever a broken file makes its decoders stumble over
        raise ValueError(_say_why(image, error)) from error


def decode_image(image: dict | PILImage.Image) -> PILImage.Image:
    """The image, upright, as `datasets` decodes it.

    Raises:
        ValueError: it cannot be read.
    """
    if not isinstance(image, dict):
        return image
    try:
        return Image().decode_example(image)
    except Exception as error:  # see above
        raise ValueError(_say_why(image, error)) from error


def _say_why(image: dict, error: Exception) -> str:
    if not image["bytes"] and not image["path"]:
        return "it has neither bytes nor a path"
    return f"{error or type(error).__name__}"
