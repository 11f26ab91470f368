"""Answers on an accelerator: those of the CPU, and those of eager decoding when decoding is compiled."""

import pytest


pytestmark = pytest.mark.gpu

TOKENS = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16}


@pytest.fixture(autouse=True)
def supported(device):
    """`generate` of transformers below the floor does not repeat images by rows."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19):
        pytest.skip(f"transformers {transformers.__version__} is older than 5.19")


def test_tokens_are_those_of_the_cpu(load_model, batch, put):
    del batch["labels"]
    expected = load_model("cpu").generate(**batch, **TOKENS)
    assert load_model().generate(**put(batch), **TOKENS).tolist() == expected.tolist()
    batch["pixel_values"] = -batch["pixel_values"]
    assert load_model().generate(**put(batch), **TOKENS).tolist() != expected.tolist()


def test_compiled_decode_gives_eager_tokens(device, load_model, batch, put):
    """A static cache makes `generate` compile the decoding step on an accelerator."""
    import torch

    del batch["labels"]
    model = load_model()
    expected = model.generate(**put(batch), **TOKENS)
    torch._dynamo.utils.counters.clear()
    found = model.generate(**put(batch), **TOKENS, cache_implementation="static")
    assert found.tolist() == expected.tolist()
    if device.type == "cuda":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "eager was compared with itself"


def test_compiled_tower_gives_eager_features(load_model, batch, put):
    import torch

    tower, pixels = load_model().model.vision_tower, put(batch)["pixel_values"]
    with torch.no_grad():
        expected = tower(pixels).last_hidden_state
        found = torch.compile(tower)(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_images_prepared_on_the_device_give_the_pixels_of_the_cpu(device, checkpoint, photo):
    import torch
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(checkpoint)
    expected = processor(photo, return_tensors="pt")["pixel_values"]
    found = processor(photo, return_tensors="pt", device=device)["pixel_values"]
    assert found.device.type == device.type
    # A step of 8 bits is 0.015 after normalising; the CPU resizes in 8 bits, an accelerator may round otherwise.
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0.05)
