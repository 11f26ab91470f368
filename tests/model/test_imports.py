"""What importing the package loads, and that its classes are found however a process comes upon them first."""

import json
import subprocess
import sys


HEAVY = ["torch", "torchvision", "transformers", "timm", "peft", "trl"]
FIRST = {
    "a class by its name on transformers": "import transformers; transformers.ConvLlavaForConditionalGeneration",
    "a class by its name, after asking whether transformers is there": "import importlib.util;"
    "importlib.util.find_spec('transformers'); import transformers; transformers.ConvLlavaModel",
    "a processor by its name": "from transformers.models.auto import processing_auto;"
    "assert processing_auto.processor_class_from_name('ConvLlavaProcessor')",
    "the module of the processor": "import convllava_hf.model.processing_convllava",
    "a model, with transformers imported before": "convllava_hf.ConvLlavaModel",
}
FIND = """
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoProcessor
from transformers.models.auto import image_processing_auto, processing_auto
from convllava_hf.model.configuration_convllava import ConvLlavaConfig
autos = AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
found = [auto._model_mapping[ConvLlavaConfig] for auto in autos]
found += [processing_auto.PROCESSOR_MAPPING[ConvLlavaConfig]]
found += image_processing_auto.IMAGE_PROCESSOR_MAPPING[ConvLlavaConfig].values()
found = [[cls.__name__, cls._auto_class] for cls in [ConvLlavaConfig, *found]]
"""


def run(code):
    """What Python code prints in a new process, each line read as JSON."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith(("[", "{"))]


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import json, sys, convllava_hf;"
    code += f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    assert run(code) == [[]]


def test_checking_the_images_of_a_dataset_loads_no_torch():
    """Each process of a build does it: with torch, it would hold four times the memory and start seconds later."""
    code = """
import io, json, sys
import convllava_hf.data.build
from PIL import Image
from convllava_hf.images import load_image
file = io.BytesIO()
Image.new("RGBA", (4, 4)).save(file, "PNG")
assert load_image(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)
print(json.dumps([name for name in ("torch", "torchvision", "datasets") if name in sys.modules]))
"""
    assert run(code) == [[]]


def test_the_first_look_at_a_class_registers_all_of_them():
    """Each way in a process of its own, forked from one that has imported nothing but what all of them need."""
    code = f"""
import json, os, scipy.optimize, sympy, sys, torch.distributed.fsdp, torch._dynamo, torchvision
assert "transformers" not in sys.modules
for way, first in {FIRST!r}.items():
    if os.fork():
        assert os.wait()[1] == 0, way
        continue
    if "before" in way:
        from transformers import AutoModel, AutoProcessor
    import convllava_hf
    exec(first)
    exec({FIND!r})
    print(json.dumps([way, found]), flush=True)
    os._exit(0)
"""
    expected = [
        ["ConvLlavaConfig", "AutoConfig"],
        ["ConvLlavaModel", "AutoModel"],
        ["ConvLlavaForConditionalGeneration", "AutoModelForImageTextToText"],
        ["ConvLlavaForConditionalGeneration", "AutoModelForImageTextToText"],
        ["ConvLlavaProcessor", "AutoProcessor"],
        ["ConvLlavaImageProcessor", "AutoImageProcessor"],
        ["ConvLlavaImageProcessorPil", "AutoImageProcessor"],
    ]
    assert run(code) == [[way, expected] for way in FIRST]
