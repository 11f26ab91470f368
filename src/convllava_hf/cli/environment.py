"""`convllava env`: what a bug report needs to say about a machine."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import typer

from .options import JsonOption, print_report, report_errors


PACKAGES = (
    *("convllava-hf", "torch", "torchvision", "transformers", "trl", "peft", "accelerate", "datasets", "timm"),
    *("huggingface-hub", "tokenizers", "safetensors", "pillow", "bitsandbytes", "torchao", "deepspeed", "flash-attn"),
)
# Settings that change what happens. Paths and tokens are left out: reports are public.
VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def add_environment_command(app: typer.Typer) -> None:
    """Adds the command of this module to the command line."""
    app.command("env")(environment)


def environment(as_json: JsonOption = False):
    """Print versions, processor and devices, for a bug report.

    \b
    Example:
      convllava env
    """
    with report_errors():
        described = describe_environment()
        width = max(map(len, described))
        print_report(as_json, described, "\n".join(f"{name:{width}}  {value}" for name, value in described.items()))


def describe_environment() -> dict[str, str]:
    """Name -> what is there, in words; nothing that tells who or where."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    try:
        found |= _describe_devices()
    except (ImportError, OSError) as error:  # a broken torch is what some reports are about
        found["devices"] = f"torch cannot be imported: {error}"
    found |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {**found, "virtual environment": "yes" if sys.prefix != sys.base_prefix else "no"}


def _describe_devices() -> dict[str, str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    cpu = f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}, bfloat16 {'fast' if fast else 'slow'}"
    devices = {"processor": cpu}
    if torch.cuda.is_available():
        devices["CUDA"] = str(torch.version.cuda)
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
    elif torch.accelerator.is_available():
        devices["accelerator"] = str(torch.accelerator.current_accelerator())
    else:
        devices["GPU"] = "none"
    return devices
