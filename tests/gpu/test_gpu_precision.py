"""Logits, features and gradients on an accelerator, in the dtypes that people use, against float32 on the CPU."""

import pytest


pytestmark = pytest.mark.gpu

# Largest difference, in standard deviations of the reference: half precision keeps 11 bits, bfloat16 keeps 8.
BOUNDS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 3e-1}


def measure(found, expected) -> float:
    """Largest difference, in units of what is expected."""
    return ((found.float().cpu() - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_logits_agree_with_float32_on_the_cpu(load_model, get_logits, batch, put, dtype):
    import torch

    expected = get_logits(load_model("cpu"), batch)
    found = get_logits(load_model(dtype=getattr(torch, dtype)), put(batch, dtype=getattr(torch, dtype)))
    assert measure(found, expected) < BOUNDS[dtype]
    # A picture of its own for each row: rows that are exchanged must not pass.
    assert measure(found.flip(0), expected) > 1


@pytest.mark.parametrize("dtype", BOUNDS)
def test_features_agree_with_float32_on_the_cpu(load_model, batch, put, dtype):
    import torch

    with torch.no_grad():
        expected = load_model("cpu").get_image_features(batch["pixel_values"]).pooler_output
        model = load_model(dtype=getattr(torch, dtype))
        found = model.get_image_features(put(batch)["pixel_values"]).pooler_output
    assert found[0].dtype == getattr(torch, dtype)
    assert measure(torch.cat(found), torch.cat(expected)) < BOUNDS[dtype]
    assert measure(torch.cat(found[::-1]), torch.cat(expected)) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_agree_with_float32_on_the_cpu(load_model, batch, put, dtype):
    import torch

    expected, model = load_model("cpu"), load_model(dtype=getattr(torch, dtype))
    expected(**batch).loss.backward()
    model(**put(batch, dtype=getattr(torch, dtype))).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        found, wanted = ours.grad.float().cpu().flatten(), theirs.grad.flatten()
        if wanted.norm() > 1e-6:
            likeness = torch.nn.functional.cosine_similarity(found, wanted, dim=0)
            assert likeness > (0.9999 if dtype == "float32" else 0.97), name


def test_the_tower_gives_the_same_in_both_memory_layouts(load_model, batch, put):
    import torch

    pixels = put(batch)["pixel_values"]
    with torch.no_grad():
        expected = load_model("cpu").model.vision_tower(batch["pixel_values"]).last_hidden_state
        tower = load_model().model.vision_tower.to(memory_format=torch.channels_last)
        found = tower(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state
    assert measure(found, expected) < BOUNDS["float32"]


def test_recomputation_gives_the_same_gradients(load_model, batch, put):

    model, gradients = load_model().train(), []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**put(batch), use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):  # kernels that add in any order differ in the last digits
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
