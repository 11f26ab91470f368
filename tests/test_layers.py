"""The layers of the package: imports point down only, and heavy imports stay where they belong.

The imports are read with `ast`, those inside functions too, so nothing is imported to find out. A rule is a function of
one module's source that yields what it breaks; the last tests feed the rules sources that break them.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


PACKAGE = "convllava_hf"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

LAYERS = (
    ("configuration_convllava", "modeling_convllava", "image_processing_convllava", "processing_convllava"),
    (
        "weight_maps",
        "checkpoint_io",
        "sources",
        "llava_family",
        "metrics",
        "llava_rows",
        "data",
        "mixture_files",
        "data_page",
        "image_budgets",
        "image_columns",
        "image_loading",
        "template_files",
        "vocabulary",
        "plans",
        "sampling",
        "shipped_files",
        "model_cards",
    ),
    (
        "registration",
        "conversion",
        "deltas",
        "inference",
        "hub",
        "checkpoint_checks",
        "adapters",
        "vision_cache",
        "training_progress",
    ),
    ("training", "evaluation"),
    ("cli_options",),
    ("cli_data", "cli_deltas", "cli_hub", "cli_serving", "cli_training", "demo"),
    ("cli",),
    ("__init__",),
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
HUB_FILES = LAYERS[0]
COMMANDS = LAYERS[4] + LAYERS[5] + LAYERS[6]
# Modules of one layer do not import each other, but for the hub files, which travel together, and these pairs (importer
# first; CONTRIBUTING.md says why).
SIDEWAYS = {
    ("checkpoint_io", "weight_maps"),
    ("sources", "weight_maps"),
    ("sources", "checkpoint_io"),
    ("llava_family", "weight_maps"),
    ("llava_family", "checkpoint_io"),
    ("llava_family", "sources"),
    ("vocabulary", "weight_maps"),
    ("vocabulary", "sources"),
    ("template_files", "weight_maps"),
    ("conversion", "registration"),
    ("hub", "registration"),
    ("checkpoint_checks", "registration"),
    ("checkpoint_checks", "conversion"),
    ("checkpoint_checks", "hub"),
    ("data", "llava_rows"),
    ("data_page", "llava_rows"),
    ("sampling", "image_columns"),
    ("mixture_files", "data"),
    ("mixture_files", "shipped_files"),
}
# Checkpoints carry the hub files to places that have transformers and little else. numpy and huggingface_hub are
# requirements of transformers itself.
HUB_FILE_PACKAGES = {"torch", "torchvision", "PIL", "transformers", "numpy", "huggingface_hub"}
ONLY_IMPORTER = {"trl": "training", "gradio": "demo"}
# What a command line may load before it knows which command runs.
COMMAND_PACKAGES = {"typer", "click", "rich"}


class Import(NamedTuple):
    """One imported module: `module` by its absolute name, `names` what a `from` import takes from it."""

    module: str
    names: tuple[str, ...]
    line: int
    relative: bool
    deferred: bool  # inside a function or under TYPE_CHECKING, so it does not run when the module is imported

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


def read_imports(source: str) -> list[Import]:
    """All imports of a module of the (flat) package, wherever they stand.

    Args:
        source: the text of the module.

    Returns:
        One `Import` per imported module, in the order of the source.
    """
    found = []

    def visit(node: ast.AST, deferred: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, (), node.lineno, False, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # the package is flat: `.x` is convllava_hf.x
                module = f"{PACKAGE}.{module}".rstrip(".")
            names = tuple(alias.name for alias in node.names)
            found.append(Import(module, names, node.lineno, node.level > 0, deferred))
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, deferred)
            return
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def list_targets(imported: Import) -> list[str]:
    """The modules of the package that an import reaches; `__init__` stands for the package itself."""
    if imported.package != PACKAGE:
        return []
    if "." in imported.module:
        return [imported.module.split(".", 1)[1]]
    if not imported.names:
        return ["__init__"]
    # `from . import x`: a module, or a name that `__init__` defines. Any module may read the version.
    return [name if name in LAYER_OF else "__init__" for name in imported.names if name != "__version__"]


def check_direction(module: str, source: str) -> Iterator[str]:
    """Imports of the package point to a lower layer."""
    for imported in read_imports(source):
        for target in list_targets(imported):
            if target not in LAYER_OF:
                yield f"{module}:{imported.line} imports {target}, which is in no layer"
                continue
            sideways = (module in HUB_FILES and target in HUB_FILES) or (module, target) in SIDEWAYS
            if LAYER_OF[target] >= LAYER_OF[module] and not sideways:
                yield (
                    f"{module}:{imported.line} (layer {LAYER_OF[module]}) imports {target} (layer {LAYER_OF[target]}); "
                    "imports point to a lower layer"
                )


def check_owners(module: str, source: str) -> Iterator[str]:
    """trl and gradio have one importer each, and nobody imports with a star."""
    for imported in read_imports(source):
        owner = ONLY_IMPORTER.get(imported.package, module)
        if owner != module:
            yield f"{module}:{imported.line} imports {imported.package}; only {owner} does"
        if "*" in imported.names:
            yield f"{module}:{imported.line} imports * from {imported.module}; name what is needed"


def check_hub_file(module: str, source: str) -> Iterator[str]:
    """A hub file reaches only its fellows, by `from .module import X`, and the packages that every user has."""
    allowed = HUB_FILE_PACKAGES | sys.stdlib_module_names
    for imported in read_imports(source):
        if imported.package != PACKAGE:
            if imported.package not in allowed:
                yield f"{module}:{imported.line} imports {imported.package}; allowed: {sorted(HUB_FILE_PACKAGES)}"
        elif not imported.relative or imported.module.count(".") != 1 or imported.module.split(".")[1] not in HUB_FILES:
            yield f"{module}:{imported.line} imports {imported.module}; a hub file writes `from .hub_file import X`"


def check_command(module: str, source: str) -> Iterator[str]:
    """A command module loads only the standard library and the command line's own package when it is imported."""
    allowed = COMMAND_PACKAGES | sys.stdlib_module_names
    for imported in read_imports(source):
        if imported.deferred or imported.package in allowed:
            continue
        if list_targets(imported) and all(target in COMMANDS for target in list_targets(imported)):
            continue
        if imported.package == PACKAGE and set(imported.names) == {"__version__"}:
            continue
        yield f"{module}:{imported.line} imports {imported.module} at the top; import it inside the command"


def existing(modules: tuple[str, ...]) -> list[str]:
    return [module for module in modules if (SOURCE / f"{module}.py").is_file()]


MODULES = existing(tuple(LAYER_OF))


def test_sideways_pairs_are_of_one_layer_and_one_direction():
    for importer, target in SIDEWAYS:
        assert LAYER_OF[importer] == LAYER_OF[target]
        assert (target, importer) not in SIDEWAYS


def test_every_module_has_a_layer():
    found = {path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py")}
    assert found, f"no modules in {SOURCE}"
    assert found <= set(LAYER_OF), "a new module needs a place in LAYERS (and the package stays flat)"
    assert set(HUB_FILES) <= found


@pytest.mark.parametrize("rule", [check_direction, check_owners])
@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_to_the_layers(module, rule):
    assert not list(rule(module, (SOURCE / f"{module}.py").read_text()))


@pytest.mark.parametrize("module", existing(HUB_FILES))
def test_hub_files_import_what_every_user_has(module):
    assert not list(check_hub_file(module, (SOURCE / f"{module}.py").read_text()))


@pytest.mark.parametrize("module", existing(HUB_FILES))
def test_transformers_finds_exactly_the_real_imports_of_hub_files(module):
    """transformers reads relative imports by a regular expression: one in a docstring would be followed as well."""
    from transformers.dynamic_module_utils import get_relative_imports

    path = SOURCE / f"{module}.py"
    real = {imported.module.split(".")[1] for imported in read_imports(path.read_text()) if imported.relative}
    assert set(get_relative_imports(path)) == real


@pytest.mark.parametrize("module", existing(COMMANDS))
def test_commands_defer_their_heavy_imports(module):
    assert not list(check_command(module, (SOURCE / f"{module}.py").read_text()))


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (check_direction, "conversion", "from .training import train"),
        (check_direction, "conversion", "from convllava_hf.training import train"),
        (check_direction, "conversion", "import convllava_hf.training"),
        (check_direction, "conversion", "from . import training"),
        (check_direction, "conversion", "from .hub import push"),
        (check_direction, "data", "def f():\n    from .inference import answer"),
        (check_direction, "data", "import convllava_hf"),
        (check_direction, "data", "from convllava_hf import ConvLlavaConfig"),
        (check_direction, "data", "from .helpers import x"),
        (check_owners, "data", "def f():\n    import trl.trainer"),
        (check_owners, "cli", "def f():\n    import gradio as gr"),
        (check_owners, "data", "from .metrics import *"),
        (check_hub_file, "modeling_convllava", "import timm"),
        (check_hub_file, "modeling_convllava", "try:\n    import einops\nexcept ImportError:\n    pass"),
        (check_hub_file, "modeling_convllava", "from . import configuration_convllava"),
        (check_hub_file, "modeling_convllava", "from .weight_maps import X"),
        (check_hub_file, "modeling_convllava", "from convllava_hf.configuration_convllava import ConvLlavaConfig"),
        (check_command, "cli", "import torch"),
        (check_command, "cli", "from .conversion import convert_checkpoint"),
        (check_command, "cli", "class A:\n    import transformers"),
        (check_command, "cli", "if True:\n    from . import data"),
    ],
)
def test_rules_notice(rule, module, source):
    assert len(list(rule(module, source))) == 1


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (check_direction, "training", "from .data import build_dataset\nfrom . import inference, __version__"),
        (check_direction, "modeling_convllava", "from .configuration_convllava import ConvLlavaConfig"),
        (check_owners, "training", "from trl import SFTTrainer"),
        (check_hub_file, "modeling_convllava", "import math\nfrom .configuration_convllava import ConvLlavaConfig"),
        (check_command, "cli", "import typer\nfrom .demo import app\ndef run():\n    from .inference import answer"),
        (check_command, "cli", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_rules_let_pass(rule, module, source):
    assert not list(rule(module, source))
