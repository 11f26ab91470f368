"""Small sources for conversion, and how tests change them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_timm(model, folder: Path, prefix: str = "", **config):
    folder.mkdir()
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    images = {"input_size": [3, 256, 256], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"architecture": "convnext_atto", "pretrained_cfg": images, **config}
    (folder / "config.json").write_text(json.dumps(config))


def edit_json(path: Path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def edit_weights(path: Path, edit):
    is_pickle = path.suffix == ".bin"
    content = torch.load(path, weights_only=True) if is_pickle else load_file(path)
    edit(content)
    torch.save(content, path) if is_pickle else save_file(content, path, {"format": "pt"})


def list_hidden(folder: Path) -> list[str]:
    """What a conversion works in, if it is left behind."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
