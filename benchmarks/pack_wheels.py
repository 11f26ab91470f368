"""Downloads the wheels that a machine with a GPU, without a network, lacks, and says whether they fit together.

    python benchmarks/pack_wheels.py                       # into build/wheels, and our own wheel beside them
    python benchmarks/pack_wheels.py --python 3.11 --extra bitsandbytes --megabytes 80

For an x86-64 Linux that carries torch, torchvision and an older transformers. pip downloads each package alone, for
that platform; then what the wheels ask for is looked up among them and in the list of what the machine has, and what is
in neither is an error. There, from the repository's root:

    python -m pip install --no-index --no-deps --upgrade --target build/site build/wheels/*.whl
    PYTHONPATH=build/site python benchmarks/gpu.py
"""

import argparse
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename


ROOT = Path(__file__).parents[1]
# glibc versions of wheels' names; pip takes them literally.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
MEGABYTES = 64
# transformers, what it and this package need newer than an image of its predecessor has, and trl with datasets.
PACKAGES = """
transformers tokenizers huggingface_hub safetensors hf-xet click regex accelerate peft timm protobuf sentencepiece
trl datasets dill multiprocess<0.70.20 xxhash
""".split()
# Small ones that pin what they need exactly, which is therefore left to pip; pytest runs the tests.
WITH_NEEDS = ["pydantic", "httpx2", "pytest"]
# What is taken to be there, in any version: what torch and an older transformers ask for. pyarrow, which is larger than
# all of the above, and pandas need not be: without them what imports datasets is skipped.
PRESENT = set(
    """
    filelock fsspec jinja2 numpy pandas pillow psutil pyarrow pyyaml torch torchvision tqdm triton typer
    """.split()
)


def download(packages: list[str], python: str, folder: Path) -> None:
    """Downloads each package without what it needs, so that none brings torch or numpy, but for `WITH_NEEDS`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, "--no-deps", *packages], check=True)
    subprocess.run([*command, *WITH_NEEDS], check=True)


def build_own_wheel(folder: Path) -> None:
    """Builds this package's wheel; it has no compiled part."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)


def read_requirements(wheel: Path) -> list[Requirement]:
    """What a wheel asks for, extras included as far as their markers say so."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]


def find_missing(folder: Path, python: str) -> list[str]:
    """What the wheels ask for and neither the folder nor `PRESENT` has; versions of `PRESENT` are taken on trust.

    Args:
        folder: of the wheels.
        python: version that they are for, such as `"3.12"`.
    """
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    environment |= {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    wheels = sorted(folder.glob("*.whl"))
    carried, missing = {}, []
    for wheel in wheels:
        name, found, *_ = parse_wheel_filename(wheel.name)
        if name in carried:
            missing.append(f"two versions of {name}: {carried[name]} and {found}; empty the folder")
        carried[name] = found
    for wheel in wheels:
        for need in read_requirements(wheel):
            name = canonicalize_name(need.name)
            if need.marker and not need.marker.evaluate(environment):
                continue
            if name in carried and not need.specifier.contains(carried[name], prereleases=True):
                missing.append(f"{wheel.name} needs {need}, but {carried[name]} is carried")
            elif name not in carried and name not in PRESENT:
                missing.append(f"{wheel.name} needs {need}")
    return missing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/wheels"))
    parser.add_argument("--python", default="3.12", help="version of Python on the machine")
    parser.add_argument("--extra", nargs="*", default=[], help="further packages, such as bitsandbytes")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="most that all wheels may have together")
    parser.add_argument("--no-own", action="store_true", help="leave this package out; run from its clone instead")
    options = parser.parse_args(arguments)

    options.folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(options.folder.glob("*.whl")):
        sys.exit(f"{options.folder} holds {len(found)} wheels; name an empty folder with --folder, or empty it")
    download([*PACKAGES, *options.extra], options.python, options.folder)
    if not options.no_own:
        build_own_wheel(options.folder)
    sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in sorted(options.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:7.2f} MB  {name}")
    print(f"{sum(sizes.values()):7.2f} MB  together")
    problems = find_missing(options.folder, options.python)
    if sum(sizes.values()) > options.megabytes:
        problems.append(f"{sum(sizes.values()):.0f} MB is more than --megabytes {options.megabytes:.0f}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
