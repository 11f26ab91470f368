"""What `info`, `plan` and `doctor` load: a list of modules, since a time depends on the machine."""

import json
import os
import subprocess
import sys

import pytest


# Each takes a second or more, and tells nothing about a checkpoint.
HEAVY = {"peft", "trl", "datasets", "sklearn", "pandas", "matplotlib", "gradio", "timm"}
# What building a model takes; torchvision comes with transformers' configuration of Llama.
MODELLING = {"torchvision", "scipy", "transformers.modeling_utils", "convllava_hf.model.modeling_convllava"}

RUN = """
import json, sys
from convllava_hf.cli.app import app
for command in json.loads(sys.argv[1]):
    try:
        app(command)
    except SystemExit as stop:
        print(json.dumps([stop.code, sorted(sys.modules)]))
"""


def list_modules(*commands: list[str]) -> list[set[str]]:
    """What is loaded after each command, in a process of their own."""
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(commands)], capture_output=True, text=True)
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[0, ")]
    assert len(ends) == len(commands) and "rope" not in done.stderr, done.stderr[-3000:]
    return [set(modules) for _, modules in ends]


@pytest.mark.skipif(
    os.environ.get("CONVLLAVA_HF_FLOOR") == "1", reason="transformers 5.19 imports torchvision and sklearn by itself"
)
def test_info_and_plan_build_no_model(copy):
    """Of rotary embeddings as older versions of transformers wrote them neither warns."""
    config = json.loads((copy / "config.json").read_text())
    del config["text_config"]["rope_parameters"]
    config["text_config"] |= {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (copy / "config.json").write_text(json.dumps(config))
    after_info, after_plan = list_modules(["info", str(copy)], ["plan", str(copy), "--stage", "3"])
    assert "torch" in after_info
    assert not after_plan & (HEAVY | MODELLING), after_plan & (HEAVY | MODELLING)
    trainers = {name for name in after_plan if name.startswith("convllava_hf.training.")}
    assert trainers == {"convllava_hf.training.plans"}


@pytest.mark.slow  # imports what it builds
def test_doctor_loads_the_classes_of_one_model(checkpoint):
    (modules,) = list_modules(["doctor", str(checkpoint)])
    assert MODELLING <= modules and not modules & HEAVY
    assert not {name for name in modules if name.startswith("transformers.models.llava.modeling")}
    assert "transformers.models.timm_wrapper.modeling_timm_wrapper" not in modules
