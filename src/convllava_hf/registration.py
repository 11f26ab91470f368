"""Registration with transformers: the Auto classes, and what stock tools look up by name.

Importing `convllava_hf` calls `announce()`, which imports nothing: it has our names put into transformers' tables once
those are imported. Whoever looks a name up, or imports a model or processor, has `register()` called, which imports
`PreTrainedModel`: that takes longer than torch.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType


# What PEFT adapts where a LoraConfig names no modules: as in Llama, and so in nothing of the tower and the projector.
PEFT_TARGETS = ["q_proj", "v_proj"]
# Where transformers looks for the classes of a model type.
LOOKED_UP = "transformers.models.convllava"
# Tables of names: module -> table, entries. The first is that of `transformers.ConvLlava...`.
TABLES = {
    "transformers": (
        "_class_to_module",
        dict.fromkeys(("ConvLlavaModel", "ConvLlavaForConditionalGeneration"), LOOKED_UP.removeprefix("transformers.")),
    ),
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING_NAMES", {"convllava": "ConvLlavaConfig"}),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING_NAMES", {"convllava": "ConvLlavaProcessor"}),
    "transformers.models.auto.image_processing_auto": (
        "IMAGE_PROCESSOR_MAPPING_NAMES",
        {"convllava": {"torchvision": "ConvLlavaImageProcessor", "pil": "ConvLlavaImageProcessorPil"}},
    ),
    "peft.utils.constants": ("TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {"convllava": PEFT_TARGETS}),
}
# Whoever imports one of these has all classes registered.
MODULES = ("modeling_convllava", "image_processing_convllava", "processing_convllava")


class AfterImport(importlib.abc.MetaPathFinder):
    """Does something once a module has been imported, without importing it.

    Args:
        name: of the module.
        action: called with the module.
    """

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name, self.action, self.asks = name, action, False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.asks:
            return None
        self.asks = True
        try:
            spec = importlib.util.find_spec(name)  # of the other finders
        finally:
            self.asks = False
        if spec is None:
            return None
        execute = spec.loader.exec_module

        # Who only asks whether a module is there does not come this far.
        def execute_and_act(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.action(sys.modules[name])  # transformers puts another object into its place

        spec.loader.exec_module = execute_and_act
        return spec


def act_after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls `action` with a module: at once if it has been imported, else when it will have been."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, AfterImport(name, action))


def announce() -> None:
    """Tells transformers and PEFT where the classes of this package are, and imports none of them."""
    sys.modules[LOOKED_UP] = sys.modules[__package__]
    for name, (table, entries) in TABLES.items():
        act_after_import(name, partial(add_entries, table, entries))
    for name in MODULES:
        act_after_import(f"{__package__}.model.{name}", lambda module: register())


def add_entries(table: str, entries: dict[str, str | dict | list], module: ModuleType) -> None:
    getattr(module, table).update(entries)


def register() -> None:
    """Makes transformers, its pipelines and its server find the classes of this package by model type and by name.

    Safe to call more than once. Saved checkpoints carry the code files and an `auto_map`, so that
    `trust_remote_code=True` loads them where this package is not installed.
    """
    from transformers import (
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.models.auto import modeling_auto

    from .model.configuration_convllava import ConvLlavaConfig
    from .model.image_processing_convllava import ConvLlavaImageProcessor, ConvLlavaImageProcessorPil
    from .model.modeling_convllava import ConvLlavaForConditionalGeneration, ConvLlavaModel
    from .model.processing_convllava import ConvLlavaProcessor

    AutoModel.register(ConvLlavaConfig, ConvLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(ConvLlavaConfig, ConvLlavaForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(ConvLlavaConfig, ConvLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(ConvLlavaConfig, ConvLlavaProcessor, exist_ok=True)
    AutoImageProcessor.register(
        ConvLlavaConfig,
        image_processor_classes={"torchvision": ConvLlavaImageProcessor, "pil": ConvLlavaImageProcessorPil},
        exist_ok=True,
    )
    # Pipelines and `transformers serve` look names up in these tables and on the transformers module itself, of which
    # `processing_utils` makes another object.
    name = ConvLlavaForConditionalGeneration.__name__
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["convllava"] = name
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["convllava"] = name
    setattr(sys.modules["transformers"], name, ConvLlavaForConditionalGeneration)

    ConvLlavaConfig.register_for_auto_class()
    ConvLlavaModel.register_for_auto_class("AutoModel")
    ConvLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    ConvLlavaProcessor.register_for_auto_class()
    for image_processor in (ConvLlavaImageProcessor, ConvLlavaImageProcessorPil):
        image_processor.register_for_auto_class()
