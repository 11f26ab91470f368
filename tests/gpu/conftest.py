"""What the tests with the mark `gpu` share: the device, and a tiny model. Without CUDA each of them is skipped.

`CONVLLAVA_HF_GPU_TESTS_DEVICE=cpu` runs those on the CPU that can run there, which shows that they work, not what they
claim.
"""

import os

import pytest


@pytest.fixture
def device():
    """The accelerator; float32 is computed in float32 there, for comparisons with the CPU."""
    import torch

    name = os.environ.get("CONVLLAVA_HF_GPU_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if name == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(name)


@pytest.fixture
def checkpoint(device, tmp_path):
    """A tiny checkpoint with everything that belongs to it; random weights in float32."""
    from tiny_checkpoint import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path / "tiny")


@pytest.fixture
def load_model(device, checkpoint):
    """Loads the checkpoint; keyword arguments are those of `from_pretrained`."""
    from convllava_hf import ConvLlavaForConditionalGeneration

    def load(place=device, **kwargs):
        return ConvLlavaForConditionalGeneration.from_pretrained(checkpoint, **kwargs).to(place).eval()

    return load


@pytest.fixture
def batch(device):
    """Two rows of one picture (4 tokens) and text, without padding, and labels; on the CPU."""
    import torch

    torch.manual_seed(1)
    ids = torch.randint(10, 200, (2, 24))
    ids[:, 2:6] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 128, 128),
        "labels": ids.masked_fill(ids == 1, -100),
    }


@pytest.fixture
def put(device):
    """Moves a batch to the device."""

    def move(values: dict, **kwargs) -> dict:
        return {key: value.to(device, **(kwargs if value.is_floating_point() else {})) for key, value in values.items()}

    return move


@pytest.fixture
def get_logits():
    """Scores of a model in float32, without those of ids that only round the vocabulary up: they are -1000, and would
    make every difference look small."""
    import torch

    def get(model, batch: dict):
        with torch.no_grad():
            return model(**batch).logits.float()[..., : -model.config.vocab_padding]

    return get
