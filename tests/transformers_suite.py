"""transformers' own common test suites, of the version that is installed.

The wheel of transformers has no tests; its sdist has the mixins that every model of transformers passes. The sdist is
downloaded once, with pip and the index that pip is configured with, into `.cache/transformers-<version>` of this
repository, and the suites are imported from there under the package name `transformers_tests`. Where it cannot be had
(no network, no pip, a development version), `import_suite` skips the importing test module and says why.

The sdist lacks some modules that the suites import. Its suites of generation and export are only in a checkout:
`TRANSFORMERS_TESTS` names the folder `tests` of one, of about the installed version. Without it, empty classes stand in
for them. The pictures that the suites would download are drawn.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub.utils import WeakFileLock


PACKAGE = "transformers_tests"
SUITES = (
    "test_configuration_common",
    "test_image_processing_common",
    "test_modeling_common",
    "test_processing_common",
    "test_training_mixin",
)
# What only a checkout has: a module and the classes that are imported from it.
LEFT_OUT = (
    ("exporters.test_export", "ExportTesterMixin", "ExportGenerateTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
)
CHECKOUT = os.environ.get("TRANSFORMERS_TESTS")
DOWNLOAD_SECONDS = 120


class SuiteUnavailable(Exception):
    """The sdist of the installed transformers could not be downloaded; the message says why."""


def download_suites(folder: Path) -> None:
    """Downloads the sdist of the installed transformers and puts its suites into `folder` as a package.

    Raises:
        SuiteUnavailable: pip is missing, failed, or took longer than `DOWNLOAD_SECONDS`.
    """
    release = version("transformers")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # pip prepares the metadata of what it downloads, which takes it a few seconds more than the download.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "0"]
        command += ["--no-deps", "--no-binary", "transformers", "--dest", scratch, f"transformers=={release}"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SuiteUnavailable(f"pip took longer than {DOWNLOAD_SECONDS} seconds") from error
        sdists = sorted(Path(scratch).glob("transformers-*.tar.gz"))
        if result.returncode or not sdists:
            raise SuiteUnavailable((result.stderr.strip() or "pip found no sdist").splitlines()[-1])
        package = Path(scratch) / "complete" / PACKAGE
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        with tarfile.open(sdists[0]) as archive:
            for suite in SUITES:
                source = archive.extractfile(f"transformers-{release}/tests/{suite}.py")
                (package / f"{suite}.py").write_bytes(source.read())
        package.parent.rename(folder)  # the folder appears complete or not at all


@lru_cache(maxsize=1)
def get_suites() -> Path:
    """The folder that the package of suites is in; downloads it if need be, once for all processes of a test run.

    Raises:
        SuiteUnavailable: see `download_suites`; in this process or in another one of the same test run.
    """
    folder = Path(__file__).parents[1] / ".cache" / f"transformers-{version('transformers')}"
    if not folder.exists():
        # `conftest.py` gives each test run a Hugging Face home of its own.
        run = Path(os.environ["HF_HOME"])
        failure = run / "transformers-suite-unavailable.txt"
        with WeakFileLock(run / "transformers-suite.lock"):
            if failure.exists():
                raise SuiteUnavailable(failure.read_text(encoding="utf-8"))
            if not folder.exists():
                try:
                    download_suites(folder)
                except SuiteUnavailable as error:
                    failure.write_text(str(error), encoding="utf-8")
                    raise
    return folder


def draw_picture(url: str) -> str:
    """Path of a picture that stands in for the one at `url`: smooth colours, an edge and some noise.

    Other media get a path where nothing is; the suites ask for them on import and only use them for models that take
    video or audio.
    """
    import numpy as np
    from PIL import Image

    path = Path(os.environ["HF_HOME"]) / f"{os.getpid()}-{Path(url).name}"
    if path.suffix in (".png", ".jpg") and not path.exists():
        rows, columns = np.mgrid[0:240, 0:320]
        pixels = np.stack([rows, columns * 0.75, 120 + 100 * (columns > rows)], axis=-1)  # (240, 320, 3)
        pixels += np.random.default_rng(0).normal(0, 4, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return str(path)


def supply_module(name: str, **attributes) -> None:
    """Puts a module with the given attributes where an import of `name` finds it."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def import_suite(name: str) -> ModuleType:
    """Imports one of `SUITES` or `LEFT_OUT`, or skips the test module that calls this if the suites cannot be had."""
    try:
        folder = get_suites()
    except SuiteUnavailable as error:
        pytest.skip(
            f"the sdist of transformers {version('transformers')} could not be downloaded: {error}",
            allow_module_level=True,
        )
    if PACKAGE not in sys.modules:
        sys.path.insert(0, str(folder))
        if CHECKOUT:
            sys.modules["tests"] = importlib.import_module(PACKAGE)  # some suites import others by this name
            sys.modules["tests"].__path__.append(CHECKOUT)
        else:
            for suite, *mixins in LEFT_OUT:
                supply_module(f"{PACKAGE}.{suite}", **{mixin: type(mixin, (), {}) for mixin in mixins})
        supply_module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
        supply_module("fetch_hub_objects_for_ci", url_to_local_path=draw_picture)
    return importlib.import_module(f"{PACKAGE}.{name}")
