"""Training sees the pixels that answering sees, whichever way the checkpoint makes images RGB."""

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import build_tokenizer

from convllava_hf import ConvLlavaImageProcessor, ConvLlavaProcessor, load_image
from convllava_hf.training.collator import ConvLlavaCollator


@pytest.mark.parametrize("original_rgb", [False, True])
def test_the_batch_holds_the_pixels_that_answers_see(original_rgb, tmp_path):
    hidden = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    hidden.paste((255, 0, 0, 255), (0, 0, 32, 64))
    hidden.save(path := tmp_path / "hidden.png")
    image_processor = ConvLlavaImageProcessor(size={"height": 64, "width": 64}, original_rgb=original_rgb)
    collator = ConvLlavaCollator(processor=ConvLlavaProcessor(image_processor, build_tokenizer()))
    (image,) = collator._prepare_images({"images": [{"bytes": None, "path": str(path)}]})["images"]
    assert np.array_equal(image, load_image(path, original_rgb=original_rgb))
    assert image.getpixel((63, 63)) == ((0, 0, 0) if original_rgb else (255, 255, 255))
