"""Every kernel of attention gives the logits of eager attention."""

import importlib.util

import pytest


pytestmark = pytest.mark.gpu

BOUNDS = {"float32": 1e-3, "bfloat16": 3e-1}


def check_kernel(name: str, device) -> None:
    """Skips where a kernel is not installed or does not run on the device."""
    if name.startswith("flash") and (importlib.util.find_spec("flash_attn") is None or device.type != "cuda"):
        pytest.skip("needs the package flash-attn and a CUDA device")


@pytest.fixture
def run(load_model, get_logits):
    """Logits of the model with a kernel of attention."""

    def run_with(attention: str, batch: dict, dtype):
        model = load_model(dtype=dtype, attn_implementation=attention)
        assert model.model.language_model.config._attn_implementation == attention
        return get_logits(model, batch)

    return run_with


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("sdpa", "float32"), ("sdpa", "bfloat16"), ("flash_attention_2", "bfloat16"), ("flex_attention", "float32")],
)
def test_attention_agrees_with_eager(device, run, batch, put, attention, dtype, padded):
    import torch

    check_kernel(attention, device)
    if padded:  # on the left, as for generation
        batch["input_ids"][0] = torch.cat([torch.zeros(5, dtype=torch.long), batch["input_ids"][0, :-5]])
        batch["attention_mask"][0, :5] = 0
    kept = batch["attention_mask"].bool().to(device)
    batch = put(batch, dtype=getattr(torch, dtype))
    expected = run("eager", batch, getattr(torch, dtype))[kept]
    found = run(attention, batch, getattr(torch, dtype))[kept]
    assert (found - expected).abs().max() / expected.std() < BOUNDS[dtype]


@pytest.mark.parametrize("kernel", ["MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION"])
def test_kernels_of_sdpa_agree(run, batch, put, kernel):
    """torch picks one by itself; each that can be picked gives the same."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch = put(batch, dtype=torch.bfloat16)
    expected = run("eager", batch, torch.bfloat16)
    try:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            found = run("sdpa", batch, torch.bfloat16)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            pytest.skip(f"{kernel} does not run here: {error}")
        raise
    assert (found - expected).abs().max() / expected.std() < BOUNDS["bfloat16"]
