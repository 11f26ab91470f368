"""ConvLLaVA, native to Hugging Face: high-resolution images in few visual tokens.

Importing this package tells transformers' Auto classes of its own. Names load on first use.
"""

import importlib
import logging
from importlib.metadata import version

from .registration import announce


__version__ = version("convllava_hf")

_HOMES = {
    "ConvLlavaConfig": "model.configuration_convllava",
    "ConvLlavaForConditionalGeneration": "model.modeling_convllava",
    "ConvLlavaImageProcessor": "model.image_processing_convllava",
    "ConvLlavaImageProcessorPil": "model.image_processing_convllava",
    "ConvLlavaModel": "model.modeling_convllava",
    "ConvLlavaProcessor": "model.processing_convllava",
    "ImageError": "images",
    "answer": "inference.answer",
    "load": "inference.load",
    "load_image": "images",
    "make_message": "inference.answer",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name].startswith("model."):
        importlib.import_module(".model.modeling_convllava", __name__)  # which registers the classes
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])


# Where bitsandbytes or torchao is installed, peft and transformers import it, also where nothing is quantised: the one
# asks for a package of faster kernels, the other uses a function that torch calls old.
for _name in ("bitsandbytes.backends.cpu.ops", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

announce()
