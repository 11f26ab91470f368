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
        assert "features of 2 images" in cache.fill(rows, show_progress=False)
        assert path.read_bytes() == whole
    assert "features of 3 images" in cache.fill(rows, show_progress=False)


def test_a_flipped_bit_is_noticed_and_the_entry_removed(cache):
    key = store_one(cache)
    path = cache.get_path(key)
    whole = path.read_bytes()
    features, size = cache.load(key)
    features = features.clone()  # they are mapped from the file that is written over here
    assert features.ndim == 2 and len(size) == 2
    for place in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{key}.safetensors"):
            cache.load(key)
        assert not path.exists() and not cache.is_whole(key)
    path.write_bytes(whole)
    assert torch.equal(cache.load(key)[0], features)


def test_no_flipped_bit_is_taken_for_features_or_stays(cache):
    """Every bit of the header, and a few of the values: noticed, and the entry removed, or of no effect."""
    key = store_one(cache)
    path = cache.get_path(key)
    whole = path.read_bytes()
    features, size = cache.load(key)
    features = features.clone()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert whole.index(b"features") < header
    places = [*range(8 * header), *range(8 * header, 8 * len(whole), 997)]
    noticed = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.unlink(missing_ok=True)
        path.write_bytes(damaged)
        cache.is_whole(key)
        try:
            found = cache.load(key)
        except ValueError as error:
            assert str(path) in str(error) and not path.exists()
            noticed += 1
        else:  # blanks at the end of the header, for instance
            assert torch.equal(found[0], features) and found[1] == size, f"bit {place}"
    assert noticed > 0.95 * len(places)


@pytest.mark.parametrize("length", [0, 5, 30, -1])
def test_an_entry_that_was_cut_after_the_start_is_removed_when_it_is_read(cache, length):
    key = store_one(cache)
    path = cache.get_path(key)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{key}.safetensors"):
        cache.load(key)
    assert not path.exists()


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
