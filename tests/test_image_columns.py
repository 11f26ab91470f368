"""Images of rows: both columns, every shape of theirs, and what cannot be read."""

import io

import pytest
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from convllava_hf.images import decode_image, list_images, read_size, undecode_images


RED = Image.new("RGB", (5, 3), "red")


def get_sizes(dataset):
    rows = [list_images(row) for row in undecode_images(dataset)]
    assert all(isinstance(image, dict) for images in rows for image in images)
    assert [[decode_image(image).size[::-1] for image in images] for images in rows] == [
        [read_size(image) for image in images] for images in rows
    ]
    return [[read_size(image) for image in images] for images in rows]


@pytest.mark.parametrize(
    ("features", "rows", "sizes"),
    [
        ({"images": List(ImageFeature())}, [[RED, RED], []], [[(3, 5), (3, 5)], []]),
        ({"images": List(ImageFeature())}, [None, [RED]], [[], [(3, 5)]]),
        ({"images": ImageFeature()}, [RED, None], [[(3, 5)], []]),
        ({"image": ImageFeature()}, [RED, None], [[(3, 5)], []]),
        ({"image": List(ImageFeature())}, [[RED], []], [[(3, 5)], []]),
        ({"images": List(Value("null"))}, [[], []], [[], []]),
        ({"images": Value("null")}, [None, None], [[], []]),
        ({"text": Value("string")}, ["a", "b"], [[], []]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_shape_of_a_column(features, rows, sizes, streaming):
    ((name, _),) = features.items()
    dataset = Dataset.from_list([{name: row} for row in rows], features=Features(features))
    assert get_sizes(dataset.to_iterable_dataset() if streaming else dataset) == sizes


def test_streams_without_features():
    buffer = io.BytesIO()
    RED.save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    assert get_sizes(IterableDataset.from_generator(lambda: iter([{"images": [image]}, {"images": []}]))) == [
        [(3, 5)],
        [],
    ]


def test_joined_datasets_of_both_kinds():
    lists = Dataset.from_list([{"images": [RED, RED]}], features=Features({"images": List(ImageFeature())}))
    singles = Dataset.from_list([{"image": RED.resize((7, 4))}], features=Features({"image": ImageFeature()}))
    assert get_sizes(concatenate_datasets([singles, lists])) == [[(4, 7)], [(3, 5), (3, 5)]]


def test_columns_that_convert_stay_as_they_are():
    dataset = Dataset.from_list([{"image": RED}], features=Features({"image": ImageFeature(mode="L")}))
    (image,) = list_images(undecode_images(dataset)[0])
    assert image.mode == "L" and read_size(image) == (3, 5) and decode_image(image).mode == "RGB"


def test_other_columns_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'images' .*Value\('int64'\)"):
        undecode_images(Dataset.from_list([{"images": 3}]))


@pytest.mark.parametrize(
    ("image", "size_message", "message"),
    [
        ({"bytes": b"garbage", "path": None}, "cannot identify image file", "not an image"),
        ({"bytes": b"", "path": None}, "neither bytes nor a path", "neither bytes nor a path"),
        ({"bytes": None, "path": None}, "neither bytes nor a path", "neither bytes nor a path"),
        ({"bytes": None, "path": "gone.png"}, "gone.png", "gone.png"),
    ],
)
def test_what_cannot_be_read_is_a_value_error(image, size_message, message):
    with pytest.raises(ValueError, match=size_message):
        read_size(image)
    with pytest.raises(ValueError, match=message):
        decode_image(image)


def test_broken_exif_does_not_stop_training():
    buffer = io.BytesIO()
    RED.save(buffer, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff broken")
    assert decode_image({"bytes": buffer.getvalue(), "path": None}).size == RED.size
