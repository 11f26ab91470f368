"""The code that travels with a checkpoint: which files are ours, and whether a folder names or holds any other."""

from pathlib import Path

from .reading import read_json


# The flat files that travel with every checkpoint as remote code.
HUB_FILES = (
    "configuration_convllava.py",
    "image_processing_convllava.py",
    "modeling_convllava.py",
    "pixels_convllava.py",
    "processing_convllava.py",
)
HUB_FOLDER = Path(__file__).parents[1] / "model"
# What an `auto_map` may name, as transformers writes it.
HUB_CLASSES = {
    "configuration_convllava.ConvLlavaConfig",
    "image_processing_convllava.ConvLlavaImageProcessor",
    "image_processing_convllava.ConvLlavaImageProcessorPil",
    "modeling_convllava.ConvLlavaForConditionalGeneration",
    "modeling_convllava.ConvLlavaModel",
    "processing_convllava.ConvLlavaProcessor",
}
# Files of a checkpoint in which `auto_map` names code.
CONFIGURATIONS = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def find_foreign_code(folder: Path) -> str | None:
    """Looks for entries in a checkpoint's configurations that name code other than this package's.

    Args:
        folder: of the checkpoint.

    Returns:
        What is wrong; `None` if `config.json` names the classes of this package, of a model of ours, and nothing in the
        folder names any others. `"repository--module.Class"` would run code of another repository.
    """
    for name in CONFIGURATIONS:
        content = read_json(folder / name) if (folder / name).exists() else {}
        for part in [content, *(value for value in content.values() if isinstance(value, dict))]:
            named = part.get("auto_map") or {}
            if not isinstance(named, dict):
                return f"{name} has an auto_map of the type {type(named).__name__}"
            for key, target in named.items():
                for reference in target if isinstance(target, list) else [target]:
                    if reference is not None and not (isinstance(reference, str) and reference in HUB_CLASSES):
                        return f"{name} names {reference!r} as its {key}, which is no class of convllava-hf"
        if name == "config.json" and content.get("model_type") == "convllava":
            missing = {"AutoConfig", "AutoModelForImageTextToText"} - set(content.get("auto_map") or {})
            if missing:
                return f"{name} has no auto_map for {' and '.join(sorted(missing))}, which trust_remote_code needs"
    return None


def list_code_files(folder: Path) -> dict[str, str]:
    """Compares the code files of a checkpoint with those of this package.

    Args:
        folder: of the checkpoint.

    Returns:
        File name -> `"same"`, `"modified"`, `"missing"` (of the files that a ConvLLaVA needs), or `"unknown"`.
    """
    states = {}
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    names = HUB_FILES if config.get("model_type") == "convllava" else ()
    for name in names:
        if not (folder / name).is_file():
            states[name] = "missing"
        else:
            same = (folder / name).read_bytes() == (HUB_FOLDER / name).read_bytes()
            states[name] = "same" if same else "modified"
    return states | {path.name: "unknown" for path in sorted(folder.glob("*.py")) if path.name not in names}
