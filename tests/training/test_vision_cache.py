"""Stored features: what is damaged is noticed, and nothing of another tower is taken for this one's."""

import copy
import io

import pytest
import torch
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import make_png, make_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from convllava_hf.images import undecode_images
from convllava_hf.training.vision_cache import VisionCache, hash_image


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval().requires_grad_(False)
    return model, AutoProcessor.from_pretrained(folder).image_processor


@pytest.fixture
def cache(parts, tmp_path):
    return VisionCache(tmp_path / "features", *parts, torch.float32)


def store_one(cache):
    content = make_png(50, 40, 0)
    key = hash_image({"bytes": content, "path": None})
    cache.store(key, Image.open(io.BytesIO(content)))
    return key


def test_entries_that_were_cut_short_are_computed_anew(cache):
    rows = undecode_images(make_rows(3))
    assert "features of 0 images are in" in cache.fill(rows, show_progress=False)
    path = sorted(cache.folder.rglob("*.safetensors"))[1]
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "features of 2 images are in" in cache.fill(rows, show_progress=False)
        assert path.read_bytes() == whole
    assert "features of 3 images are in" in cache.fill(rows, show_progress=False)


def test_a_flipped_bit_is_noticed_and_the_entry_removed(cache):
    key = store_one(cache)
    path = cache.get_path(key)
    whole = path.read_bytes()
    features, size = cache.load(key)
    features = features.clone()  # they are mapped from the file that is written over here
    assert features.ndim == 2 and len(size) == 2
    for place in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{key}.safetensors was damaged .* start again to compute it"):
            cache.load(key)
        assert not path.exists() and not cache.is_whole(key)
    path.write_bytes(whole)
    assert torch.equal(cache.load(key)[0], features)


def test_another_configuration_of_the_tower_is_another_cache(cache, parts, tmp_path):
    """Equal weights do not make equal features: the activation is in the configuration alone."""
    model, image_processor = parts
    model = copy.deepcopy(model)
    assert VisionCache(tmp_path / "features", model, image_processor, torch.float32).folder == cache.folder
    model.config.vision_config.hidden_act = "relu"
    assert VisionCache(tmp_path / "features", model, image_processor, torch.float32).folder != cache.folder
    model.config.vision_config.hidden_act = parts[0].config.vision_config.hidden_act
    with torch.no_grad():
        next(model.base_model.vision_tower.parameters()).add_(1e-3)
    assert VisionCache(tmp_path / "features", model, image_processor, torch.float32).folder != cache.folder
