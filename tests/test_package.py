"""What is installed: metadata, floors, public names, package data, and a command line that starts fast."""

import ast
import configparser
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]
NAME = "convllava-hf"
EXTRAS = {
    *("train", "demo", "eval", "serving", "ray", "onnx", "openvino", "executorch", "gguf", "flash-attn"),
    *("quantization", "docs", "dev"),
}
# Import names that differ from the names of their distributions.
DISTRIBUTION_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "google": "protobuf", "yaml": "pyyaml"}
# transformers requires these itself and fixes their versions better than we could.
THROUGH_TRANSFORMERS = {"numpy", "packaging", "pyyaml", "tokenizers"}
THROUGH_DATASETS = {"pyarrow"}
THROUGH_SCIKIT_LEARN = {"scipy"}
# What loads a plugin of ours, and is there when that runs; what pins an older transformers and runs apart from us.
HOSTS = {"lmms-eval", "llmcompressor"}
HEAVY = {"torch", "torchvision", "transformers", "datasets", "trl", "peft", "timm", "gradio", "numpy"}


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def parse_requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def read_requirements(setup_cfg: configparser.ConfigParser, *extras: str) -> dict[str, Requirement]:
    """The requirements of the package and the named extras, those of extras within extras included.

    Returns:
        Requirement by the name of its distribution. Our own name is resolved and left out.
    """
    found = {}
    texts = [setup_cfg["options"]["install_requires"]]
    texts += [setup_cfg["options.extras_require"][extra] for extra in extras]
    for requirement in parse_requirements("\n".join(texts)):
        if requirement.name == NAME:
            found |= read_requirements(setup_cfg, *requirement.extras)
        else:
            found[requirement.name] = requirement
    return found


def get_floor(requirement: Requirement) -> Version:
    (floor,) = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    return floor


def test_setup_cfg_states_what_is_promised(setup_cfg):
    assert setup_cfg["metadata"]["name"] == NAME
    assert setup_cfg["metadata"]["version"] == "0.1.0"
    assert setup_cfg["options"]["python_requires"] == ">=3.10"
    assert set(setup_cfg["options.extras_require"]) == EXTRAS
    required = read_requirements(setup_cfg)
    assert str(required["transformers"].specifier) == "<6,>=5.19"
    assert str(required["torch"].specifier) == ">=2.7"


def test_installed_metadata_is_that_of_setup_cfg(setup_cfg):
    import convllava_hf

    metadata = importlib.metadata.metadata(NAME)
    assert metadata["Version"] == setup_cfg["metadata"]["version"] == convllava_hf.__version__
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    installed = {str(Requirement(line)) for line in importlib.metadata.requires(NAME) if "extra ==" not in line}
    assert installed == {str(requirement) for requirement in read_requirements(setup_cfg).values()}, (
        "the installed package is not this checkout as it stands: run `make install`"
    )


def test_each_version_is_written_once(setup_cfg):
    texts = [setup_cfg["options"]["install_requires"], *dict(setup_cfg["options.extras_require"]).values()]
    specifiers = {}
    for requirement in parse_requirements("\n".join(texts)):
        if requirement.name != NAME:
            specifiers.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert all(len(found) == 1 for found in specifiers.values()), specifiers
    for requirement in parse_requirements("\n".join(texts)):
        assert requirement.name == NAME or get_floor(requirement), f"{requirement} has no floor"

    # pyproject.toml is read before setup.cfg, so this one version stands in both.
    (build,) = re.findall(r'^requires = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert Requirement(build) == read_requirements(setup_cfg, "dev")["setuptools"]

    makefile = (ROOT / "Makefile").read_text()
    assert "--resolution lowest-direct" in makefile, "the floor environment takes its versions from setup.cfg"
    assert not re.search(r"[a-z]\s*(==|>=|~=)\s*\d", makefile), "no version of a requirement belongs into the Makefile"


def test_installed_versions_are_supported(setup_cfg):
    """In the floor environment, each requirement is at its floor; elsewhere, each is in the supported range."""
    for requirement in read_requirements(setup_cfg, "dev").values():
        installed = Version(Version(importlib.metadata.version(requirement.name)).public)  # without +cpu or +cu126
        assert requirement.specifier.contains(installed), f"{requirement.name} {installed} is not {requirement}"
        if os.environ.get("CONVLLAVA_HF_FLOOR"):
            assert installed == get_floor(requirement), f"{requirement.name} {installed} is not at its floor"


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("src", EXTRAS - {"dev"}),
        ("tests", EXTRAS),
        ("examples", {"dev", "ray"}),
        ("benchmarks", EXTRAS),
    ],
)
def test_every_import_is_declared(setup_cfg, folder, extras):
    declared = {name.lower() for name in read_requirements(setup_cfg, *extras)} | THROUGH_TRANSFORMERS | HOSTS
    if "datasets" in declared:
        declared |= THROUGH_DATASETS
    if "scikit-learn" in declared:
        declared |= THROUGH_SCIKIT_LEARN
    paths = [path for path in (ROOT / folder).rglob("*.py") if "reference" not in path.parts]
    shared = paths + list((ROOT / "examples" / "quickstart").glob("*.py"))  # a benchmark uses the quickstart's pages
    own = {"convllava_hf", "conftest", *(path.stem for path in shared), *(path.parent.name for path in paths)}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for package in {module.split(".")[0] for module in modules} - own - sys.stdlib_module_names:
                distribution = DISTRIBUTION_OF.get(package, package).replace("_", "-").lower()
                assert distribution in {name.replace("_", "-") for name in declared}, (
                    f"{path.relative_to(ROOT)}:{node.lineno} imports {package}, which setup.cfg does not declare"
                )


@pytest.mark.slow
def test_a_wheel_asks_in_a_bare_environment(tmp_path):
    """`make dist`, then a new environment that has the requirements and, by pip, the wheel; a minute of importing."""
    from tiny_checkpoint import save_tiny_checkpoint

    project = tmp_path / "project"
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", project / "src", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md", "Makefile"):
        shutil.copy(ROOT / name, project)
    subprocess.run(["make", "dist", f"PY={sys.executable}"], cwd=project, check=True, capture_output=True, timeout=300)
    (wheel,) = (project / "dist").glob("*.whl")
    assert list((project / "dist").glob("*.tar.gz"))

    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", str(bare)], check=True, timeout=300)
    install = [str(bare / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    (packages,) = bare.glob("lib/python*/site-packages")
    requirements = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "requirements.pth").write_text("\n".join(requirements))
    model, empty = save_tiny_checkpoint(tmp_path / "model"), tmp_path / "empty"
    empty.mkdir()
    command = [bare / "bin" / "convllava", "ask", "What is it?", "--model", model, "--max-new-tokens", "3", "--json"]
    environment = {**os.environ, "HOME": str(empty), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=empty, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"new_tokens": 3' in done.stdout
    where = [str(bare / "bin" / "python"), "-c", "import convllava_hf; print(convllava_hf.__file__)"]
    done = subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(str(packages))


def test_public_names_exist():
    import convllava_hf

    assert convllava_hf.__all__
    assert len(set(convllava_hf.__all__)) == len(convllava_hf.__all__)
    for name in convllava_hf.__all__:
        assert getattr(convllava_hf, name) is not None
    assert set(convllava_hf.__all__) <= set(dir(convllava_hf))


def test_console_script_points_at_the_command_line():
    (script,) = [
        entry for entry in importlib.metadata.entry_points(group="console_scripts") if entry.name == "convllava"
    ]
    assert script.value == "convllava_hf.cli.app:app"
    module, attribute = script.value.split(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_help_loads_nothing_heavy():
    """Does what the installed script does, in a process that then tells what it loaded."""
    program = f"""
import sys
sys.argv = ["convllava", "--help"]
from convllava_hf.cli.app import app
try:
    app()
finally:
    print("LOADED", *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr.splitlines()[-1] == "LOADED", f"`convllava --help` imported {done.stderr.splitlines()[-1]}"


def test_wheel_holds_the_package_data(tmp_path):
    """Builds the wheel as pip would, from a copy, so that the checkout stays clean; needs no network."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, project)
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=project, check=True, capture_output=True, timeout=120
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    expected = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "convllava_hf").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {path for path in packed if ".dist-info/" not in path} == expected
    assert any(path.endswith("LICENSE") for path in packed)
