"""The rooms of the package: folders import downward only, files inside a folder too, heavy imports keep theirs.

The imports are read with `ast`, those inside functions too, so nothing is imported to find out. A rule is a function of
one module's source that yields what it breaks; the last tests feed the rules sources that break them.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest


PACKAGE = "convllava_hf"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# From the ground up; CONTRIBUTING.md has a sentence for each. A room is a folder, or a file beside the folders. Rooms
# of one floor do not import each other.
FLOORS = (
    ("model",),
    ("images", "shipped", "checkpoints"),
    ("registration", "inference"),
    ("conversion", "data", "training"),
    ("hub",),
    ("evaluation", "serving", "export"),
    ("cli",),
    ("__init__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Checkpoints carry the hub files to places that have transformers and little else. numpy and huggingface_hub are
# requirements of transformers itself.
HUB_FILE_PACKAGES = {"torch", "torchvision", "PIL", "transformers", "numpy", "huggingface_hub"}
ONLY_IMPORTER = {"trl": "training", "gradio": "serving.demo"}
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


def read_imports(module: str, source: str) -> list[Import]:
    """All imports of a module, wherever they stand.

    Args:
        module: its name inside the package, such as `"conversion.sources"`.
        source: its text.

    Returns:
        One `Import` per imported module, in the order of the source.
    """
    found = []
    folder = [PACKAGE, *module.split(".")[:-1]]

    def visit(node: ast.AST, deferred: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, (), node.lineno, False, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                target = ".".join([*folder[: len(folder) + 1 - node.level], target]).rstrip(".")
            names = tuple(alias.name for alias in node.names)
            found.append(Import(target, names, node.lineno, node.level > 0, deferred))
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
    inside = imported.module.partition(".")[2]
    if inside in MODULES:
        return [inside]
    # `from ..room import x`: modules of the room, or names of its `__init__`, which has none but the package's own.
    prefix = f"{inside}." if inside else ""
    names = [f"{prefix}{name}" for name in imported.names if name != "__version__"]
    if not imported.names:
        return [inside or "__init__"]
    return [name if name in MODULES or name in FLOOR_OF else inside or "__init__" for name in names]


def find_room(module: str) -> str:
    return module.partition(".")[0]


def check_direction(module: str, source: str) -> Iterator[str]:
    """Imports of the package lead to a lower floor, or stay in the room."""
    for imported in read_imports(module, source):
        for target in list_targets(imported):
            here, there = find_room(module), find_room(target)
            if there not in FLOOR_OF:
                yield f"{module}:{imported.line} imports {target}, which is in no room"
            elif here != there and FLOOR_OF[there] >= FLOOR_OF[here]:
                yield (
                    f"{module}:{imported.line} (floor {FLOOR_OF[here]}) imports {target} (floor {FLOOR_OF[there]}); "
                    "imports lead to a lower floor"
                )


def find_circle(sources: dict[str, str]) -> list[str]:
    """Modules of one room that import each other in a circle; none, if its files import downward only."""
    arrows = {
        module: {target for imported in read_imports(module, source) for target in list_targets(imported)} - {module}
        for module, source in sources.items()
    }
    arrows = {module: targets & sources.keys() for module, targets in arrows.items()}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def check_owners(module: str, source: str) -> Iterator[str]:
    """Some packages have one room that imports them, and nobody imports with a star."""
    for imported in read_imports(module, source):
        owner = ONLY_IMPORTER.get(imported.package)
        if owner and find_room(module) != owner and module != owner:
            yield f"{module}:{imported.line} imports {imported.package}; only {owner} does"
        if "*" in imported.names:
            yield f"{module}:{imported.line} imports * from {imported.module}; name what is needed"


def check_hub_file(module: str, source: str) -> Iterator[str]:
    """A hub file reaches only its fellows, by `from .module import X`, and the packages that every user has."""
    allowed = HUB_FILE_PACKAGES | sys.stdlib_module_names
    for imported in read_imports(module, source):
        if imported.package != PACKAGE:
            if imported.package not in allowed:
                yield f"{module}:{imported.line} imports {imported.package}; allowed: {sorted(HUB_FILE_PACKAGES)}"
        elif not imported.relative or imported.module.removeprefix(f"{PACKAGE}.") not in HUB_FILES:
            yield f"{module}:{imported.line} imports {imported.module}; a hub file writes `from .hub_file import X`"


def check_command(module: str, source: str) -> Iterator[str]:
    """A command module loads only the standard library and the command line's own packages when it is imported."""
    allowed = COMMAND_PACKAGES | sys.stdlib_module_names
    for imported in read_imports(module, source):
        if imported.deferred or imported.package in allowed:
            continue
        if imported.package == PACKAGE and all(find_room(target) == "cli" for target in list_targets(imported)):
            continue
        yield f"{module}:{imported.line} imports {imported.module} at the top; import it inside the command"


MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent == SOURCE
}
SOURCES = {module: path.read_text() for module, path in MODULES.items()}
HUB_FILES = [module for module in MODULES if find_room(module) == "model"]
COMMANDS = [module for module in MODULES if find_room(module) == "cli"]


def test_every_module_is_in_a_room():
    assert HUB_FILES and COMMANDS
    assert {find_room(module) for module in MODULES} == set(FLOOR_OF), "a new room needs a floor, and a floor its rooms"
    assert all(module.count(".") <= 1 for module in MODULES), "rooms have no rooms inside"


def test_the_order_of_the_rooms_is_the_documented_one():
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [text.index(f"\n| `{room}` |") for rooms in FLOORS[:-1] for room in rooms]
    assert places == sorted(places), "CONTRIBUTING.md lists the rooms from the ground up"


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_folders_load_nothing_by_themselves(path):
    """What a module needs is in that module: importing one file of a room does not import the others."""
    assert [type(node) for node in ast.parse(path.read_text()).body] == [ast.Expr]


@pytest.mark.parametrize("rule", [check_direction, check_owners])
@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_to_the_floors(module, rule):
    assert not list(rule(module, SOURCES[module]))


@pytest.mark.parametrize("room", sorted({find_room(module) for module in MODULES}))
def test_files_of_a_room_import_downward_only(room):
    assert not find_circle({module: source for module, source in SOURCES.items() if find_room(module) == room})


@pytest.mark.parametrize("module", HUB_FILES)
def test_hub_files_import_what_every_user_has(module):
    assert not list(check_hub_file(module, SOURCES[module]))


@pytest.mark.parametrize("module", HUB_FILES)
def test_transformers_finds_exactly_the_real_imports_of_hub_files(module):
    """transformers reads relative imports by a regular expression: one in a docstring would be followed as well."""
    from transformers.dynamic_module_utils import get_relative_imports

    real = {imported.module.split(".")[-1] for imported in read_imports(module, SOURCES[module]) if imported.relative}
    assert set(get_relative_imports(MODULES[module])) == real


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_defer_their_heavy_imports(module):
    assert not list(check_command(module, SOURCES[module]))


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (check_direction, "conversion.convert", "from ..training.trainer import train"),
        (check_direction, "conversion.convert", "from convllava_hf.training.trainer import train"),
        (check_direction, "conversion.convert", "import convllava_hf.training.trainer"),
        (check_direction, "conversion.convert", "from .. import training"),
        (check_direction, "conversion.convert", "from ..training import trainer"),
        (check_direction, "conversion.convert", "from ..hub.push import push"),
        (check_direction, "data.build", "def f():\n    from ..hub.push import push"),
        (check_direction, "images", "from .shipped import find_file"),
        (check_direction, "data.build", "import convllava_hf"),
        (check_direction, "data.build", "from convllava_hf import ConvLlavaConfig"),
        (check_direction, "data.build", "from ..helpers import x"),
        (check_owners, "data.build", "def f():\n    import trl.trainer"),
        (check_owners, "data.build", "from .rows import *"),
        (check_hub_file, "model.modeling_convllava", "import timm"),
        (check_hub_file, "model.modeling_convllava", "try:\n    import einops\nexcept ImportError:\n    pass"),
        (check_hub_file, "model.modeling_convllava", "from . import configuration_convllava"),
        (check_hub_file, "model.modeling_convllava", "from .weight_maps import X"),
        (check_hub_file, "model.modeling_convllava", "from ..images import X"),
        (check_hub_file, "model.modeling_convllava", "from convllava_hf.model.configuration_convllava import X"),
        (check_command, "cli.app", "import torch"),
        (check_command, "cli.app", "from ..conversion.convert import convert_checkpoint"),
        (check_command, "cli.app", "class A:\n    import transformers"),
        (check_command, "cli.app", "if True:\n    from ..data import build"),
    ],
)
def test_rules_notice(rule, module, source):
    assert len(list(rule(module, source))) == 1


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (check_direction, "hub.push", "from ..data.build import build_dataset\nfrom .. import images, __version__"),
        (check_direction, "hub.push", "from .client import HubError"),
        (check_direction, "model.modeling_convllava", "from .configuration_convllava import ConvLlavaConfig"),
        (check_owners, "training.trainer", "from trl import SFTTrainer"),
        (
            check_hub_file,
            "model.modeling_convllava",
            "import math\nfrom .configuration_convllava import X",
        ),
        (
            check_command,
            "cli.app",
            "import typer\nfrom .data import app\ndef run():\n    from ..hub.push import push",
        ),
        (check_command, "cli.app", "from .. import __version__"),
        (check_command, "cli.app", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_rules_let_pass(rule, module, source):
    assert not list(rule(module, source))


def test_circles_are_noticed():
    circle = {"hub.pull": "from .push import x", "hub.push": "def f():\n    from .client import y"}
    assert not find_circle(circle)
    assert set(find_circle({**circle, "hub.client": "from . import pull"})) == set(circle) | {"hub.client"}
