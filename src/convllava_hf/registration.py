"""Registration with transformers: the Auto classes, and what stock tools look up by name.

Importing `convllava_hf` calls `register()` once.
"""

import importlib.abc
import importlib.util
import sys

from transformers import (
    AutoConfig,
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


PEFT_CONSTANTS = "peft.utils.constants"
# What PEFT adapts where a LoraConfig names no modules: as in Llama, and so in nothing of the tower and the projector.
PEFT_TARGETS = ["q_proj", "v_proj"]


class PeftTargets(importlib.abc.MetaPathFinder):
    """Tells PEFT which modules to adapt by default, once it is imported: importing it here would take seconds."""

    def find_spec(self, name, path=None, target=None):
        if name != PEFT_CONSTANTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_add(module):
            execute(module)
            add_peft_targets(module)

        spec.loader.exec_module = execute_and_add
        return spec


def add_peft_targets(constants) -> None:
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["convllava"] = PEFT_TARGETS


def register() -> None:
    """Makes transformers, its pipelines and its server find the classes of this package by model type and by name.

    Safe to call more than once. Saved checkpoints carry the code files and an `auto_map`, so that
    `trust_remote_code=True` loads them where this package is not installed.
    """
    AutoConfig.register("convllava", ConvLlavaConfig, exist_ok=True)
    AutoModel.register(ConvLlavaConfig, ConvLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(ConvLlavaConfig, ConvLlavaForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(ConvLlavaConfig, ConvLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(ConvLlavaConfig, ConvLlavaProcessor, exist_ok=True)
    AutoImageProcessor.register(
        ConvLlavaConfig,
        image_processor_classes={"torchvision": ConvLlavaImageProcessor, "pil": ConvLlavaImageProcessorPil},
        exist_ok=True,
    )
    # Pipelines and `transformers serve` look names up in these tables and on the transformers module itself.
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

    if PEFT_CONSTANTS in sys.modules:
        add_peft_targets(sys.modules[PEFT_CONSTANTS])
    elif not any(isinstance(finder, PeftTargets) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftTargets())
