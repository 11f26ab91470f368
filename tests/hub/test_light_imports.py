"""What `info`, `plan` and `doctor` load: a list of modules, since a time depends on the machine."""

import json
import subprocess
import sys

import pytest
from tiny_checkpoint import save_tiny_checkpoint


# Processes that import everything anew.
pytestmark = pytest.mark.slow

# Each takes a second or more, and tells nothing about a checkpoint.
HEAVY = ["peft", "trl", "datasets", "sklearn", "scipy", "pandas", "matplotlib", "gradio"]
MODELLING = ["timm", "transformers.models.timm_wrapper.modeling_timm_wrapper", "transformers.trainer"]

RUN = """
import json, sys
sys.argv = ["convllava", *sys.argv[1:]]
from convllava_hf.cli.app import app
try:
    app()
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


def list_modules(command: str, folder, *options: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", RUN, command, str(folder), *options], capture_output=True, text=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return set(modules)


def test_info_builds_no_model(tiny):
    modules = list_modules("info", tiny)
    ours = {name for name in modules if name.startswith("convllava_hf.")}
    assert not modules & {*HEAVY, *MODELLING}
    assert not ours & {"convllava_hf.model.modeling_convllava", "convllava_hf.training.run"}


def test_plan_loads_no_trainer(tiny):
    """scipy comes with the losses that transformers imports for every model."""
    modules = list_modules("plan", tiny, "--stage", "3")
    assert not (modules - {"scipy"}) & {*HEAVY, *MODELLING}
    assert {name for name in modules if name.startswith("convllava_hf.training.")} == {"convllava_hf.training.plans"}


def test_doctor_loads_the_classes_of_one_model(tiny):
    modules = list_modules("doctor", tiny)
    assert not (modules - {"scipy"}) & {*HEAVY, "timm", "transformers.models.timm_wrapper.modeling_timm_wrapper"}
    assert not {name for name in modules if name.startswith("transformers.models.llava.modeling")}
