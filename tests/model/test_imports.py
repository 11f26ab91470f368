"""What importing the package loads, and that its classes are found however a process comes upon them first."""

import json
import subprocess
import sys

import pytest


# `PreTrainedModel` and what comes with it: several seconds on a slow machine.
HEAVY = ["transformers.modeling_utils", "transformers.image_utils", "torchvision", "timm", "peft", "trl", "datasets"]


def run(code):
    """What Python code prints in a new process, read as JSON."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_importing_the_package_loads_no_model_code():
    loaded = run(
        "import json, sys, convllava_hf; from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText;"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    assert loaded == []


FIRST = {
    "a class by its name on transformers": "import transformers; transformers.ConvLlavaForConditionalGeneration",
    "a configuration by its model type": "from transformers import AutoConfig; AutoConfig.for_model('convllava')",
    "the configuration of the package": "convllava_hf.ConvLlavaConfig",
    "the module of the model": "import convllava_hf.model.modeling_convllava",
    "the module of the processor": "import convllava_hf.model.processing_convllava",
    "the module of the image processor": "import convllava_hf.model.image_processing_convllava",
    "another import of transformers before": "convllava_hf.ConvLlavaModel",
}


@pytest.mark.parametrize("first", FIRST)
def test_the_first_look_at_a_class_registers_all_of_them(first):
    before = "from transformers import AutoModel, AutoProcessor;" if first.startswith("another") else ""
    code = f"""{before}import convllava_hf
{FIRST[first]}
import json
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoProcessor
from transformers.models.auto import image_processing_auto, processing_auto
from convllava_hf.model.configuration_convllava import ConvLlavaConfig
autos = AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
found = [auto._model_mapping[ConvLlavaConfig] for auto in autos]
found += [processing_auto.PROCESSOR_MAPPING[ConvLlavaConfig]]
found += image_processing_auto.IMAGE_PROCESSOR_MAPPING[ConvLlavaConfig].values()
print(json.dumps([[cls.__name__, cls._auto_class] for cls in [ConvLlavaConfig, *found]]))
"""
    assert run(code) == [
        ["ConvLlavaConfig", "AutoConfig"],
        ["ConvLlavaModel", "AutoModel"],
        ["ConvLlavaForConditionalGeneration", "AutoModelForImageTextToText"],
        ["ConvLlavaForConditionalGeneration", "AutoModelForImageTextToText"],
        ["ConvLlavaProcessor", "AutoProcessor"],
        ["ConvLlavaImageProcessor", "AutoImageProcessor"],
        ["ConvLlavaImageProcessorPil", "AutoImageProcessor"],
    ]
