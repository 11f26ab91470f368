"""ConvLLaVA, native to Hugging Face: high-resolution images in few visual tokens.

Importing this package registers its classes with transformers' Auto classes. Names load on first use.
"""

import importlib
import sys
from importlib.metadata import version
from pathlib import Path


__version__ = version("convllava_hf")

_HOMES = {
    "ConvLlavaConfig": "configuration_convllava",
    "ConvLlavaForConditionalGeneration": "modeling_convllava",
    "ConvLlavaImageProcessor": "image_processing_convllava",
    "ConvLlavaImageProcessorPil": "image_processing_convllava",
    "ConvLlavaModel": "modeling_convllava",
    "ConvLlavaProcessor": "processing_convllava",
    "ImageError": "image_loading",
    "answer": "inference",
    "load": "inference",
    "load_image": "image_loading",
    "make_message": "inference",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])


# The command line registers inside its commands, so that `convllava --help` answers before torch has loaded.
if Path(sys.argv[0] if sys.argv else "").name not in ("convllava", "convllava.exe"):
    from .registration import register

    register()
