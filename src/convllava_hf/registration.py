"""Registration with transformers: the Auto classes, and what stock tools look up by name.

Importing `convllava_hf` calls `announce()`, which only tells transformers where to look. Whoever looks, or imports a
model or processor, has `register()` called: those need `PreTrainedModel`, whose import takes longer than torch's.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


PEFT_CONSTANTS = "peft.utils.constants"
# What PEFT adapts where a LoraConfig names no modules: as in Llama, and so in nothing of the tower and the projector.
PEFT_TARGETS = ["q_proj", "v_proj"]
# Where transformers looks for the classes of a model type.
LOOKED_UP = "transformers.models.convllava"
# What it looks up by name on its own module: processors as their files call them, models for its server.
CLASSES = {
    "modeling_convllava": ("ConvLlavaModel", "ConvLlavaForConditionalGeneration"),
    "image_processing_convllava": ("ConvLlavaImageProcessor", "ConvLlavaImageProcessorPil"),
    "processing_convllava": ("ConvLlavaProcessor",),
}


class AfterImport(importlib.abc.MetaPathFinder):
    """Does something once a module has been imported, without importing it.

    Args:
        name: of the module.
        action: called with the module.
    """

    def __init__(self, name: str, action: Callable):
        self.name, self.action = name, action

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_act(module):
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_and_act
        return spec


def add_peft_targets(constants) -> None:
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["convllava"] = PEFT_TARGETS


def announce() -> None:
    """Tells transformers where the classes of this package are, and imports none of them.

    Safe to call more than once.
    """
    package = sys.modules[__package__]
    if sys.modules.get(LOOKED_UP) is package:
        return
    sys.modules[LOOKED_UP] = package
    CONFIG_MAPPING_NAMES["convllava"] = "ConvLlavaConfig"
    for module, names in CLASSES.items():
        transformers._class_to_module.update(dict.fromkeys(names, LOOKED_UP.removeprefix("transformers.")))
        sys.meta_path.insert(0, AfterImport(f"{__package__}.model.{module}", lambda _: register()))
    if PEFT_CONSTANTS in sys.modules:
        add_peft_targets(sys.modules[PEFT_CONSTANTS])
    else:
        sys.meta_path.insert(0, AfterImport(PEFT_CONSTANTS, add_peft_targets))


def register() -> None:
    """Makes transformers, its pipelines and its server find the classes of this package by model type and by name.

    Safe to call more than once. Saved checkpoints carry the code files and an `auto_map`, so that
    `trust_remote_code=True` loads them where this package is not installed.
    """
    announce()
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
    # Pipelines look names up in these tables.
    name = ConvLlavaForConditionalGeneration.__name__
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["convllava"] = name
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["convllava"] = name

    ConvLlavaConfig.register_for_auto_class()
    ConvLlavaModel.register_for_auto_class("AutoModel")
    ConvLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    ConvLlavaProcessor.register_for_auto_class()
    for image_processor in (ConvLlavaImageProcessor, ConvLlavaImageProcessorPil):
        image_processor.register_for_auto_class()
