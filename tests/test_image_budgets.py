"""Bounds on the tokens of an image; `test_inference` has them in answers, `test_training` in training."""

import pytest
from transformers import CLIPImageProcessor

from convllava_hf.images import limit_image_tokens, set_image_size
from convllava_hf.model.image_processing_convllava import ConvLlavaImageProcessor


@pytest.mark.parametrize(
    ("size", "budget", "cells"),
    [((3, 6), 18, (3, 6)), ((3, 6), 17, (2, 5)), ((6, 3), 8, (4, 2)), ((1, 9), 4, (1, 4)), ((9, 9), 35, (5, 5))],
)
def test_other_shapes_shrink_within_the_budget(size, budget, cells):
    image_processor = ConvLlavaImageProcessor(
        image_aspect_ratio="squash", size={"height": size[0] * 64, "width": size[1] * 64}
    )
    limited = limit_image_tokens(image_processor, budget)["size"]
    assert (limited["height"] // 64, limited["width"] // 64) == cells


@pytest.mark.parametrize("ratio", ["pad", "squash"])
def test_size_is_set(ratio):
    image_processor = ConvLlavaImageProcessor(image_aspect_ratio=ratio)
    set_image_size(image_processor, 128)
    assert image_processor.num_image_tokens(500, 300) == 4
    assert ConvLlavaImageProcessor(**image_processor.to_dict()).num_image_tokens(500, 300) == 4


def test_size_is_the_budget_of_native_images():
    image_processor = ConvLlavaImageProcessor(image_aspect_ratio="native", min_image_tokens=16, max_image_tokens=576)
    set_image_size(image_processor, 128)
    assert image_processor.num_image_tokens(1000, 1000) == 4


@pytest.mark.parametrize("side", [0, -64, 32, 100])
def test_size_that_cells_do_not_fill_is_refused(side):
    with pytest.raises(ValueError, match=rf"image_size={side}; .* 64"):
        set_image_size(ConvLlavaImageProcessor(), side)


def test_images_of_fixed_size_are_refused():
    with pytest.raises(ValueError, match="image_size=448 .*CLIPImageProcessor"):
        set_image_size(CLIPImageProcessor(), 448)
    with pytest.raises(ValueError, match="max_image_tokens=9 .*CLIPImageProcessor"):
        limit_image_tokens(CLIPImageProcessor(), 9)
