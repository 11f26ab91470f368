"""Folders of PEFT adapters: what they say about themselves, without PEFT."""

from dataclasses import dataclass
from pathlib import Path

from .reading import WEIGHT_FILES, read_json
from .weight_maps import ConversionError


ADAPTER_CONFIG = "adapter_config.json"
# A file that holds no code comes first.
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter.

    Attributes:
        folder: of the adapter.
        settings: its `adapter_config.json`.
        weights: its weight file.
        base: Hub id or folder of the base model, if it names one.
        method: such as `"LORA"`.
    """

    folder: Path
    settings: dict
    weights: Path
    base: str | None
    method: str

    @property
    def is_convllava(self) -> bool:
        """Whether it was trained on a ConvLLaVA, by the class that PEFT noted."""
        noted = self.settings.get("auto_mapping")
        return isinstance(noted, dict) and str(noted.get("base_model_class")).startswith("ConvLlava")

    def describe(self) -> str:
        """Method and size, in words."""
        sizes = [f"{key} {self.settings[key]}" for key in ("r", "lora_alpha") if self.settings.get(key) is not None]
        return ", ".join([self.method, *sizes])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no weights of a whole model beside it."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in WEIGHT_FILES)


def read_adapter(folder: Path) -> Adapter:
    """Reads what an adapter says about itself.

    Raises:
        ConversionError: it is no folder of an adapter, or its files are missing or damaged.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConversionError(f"{folder} has no {ADAPTER_CONFIG}; expected the folder of a PEFT adapter.")
    settings = read_json(folder / ADAPTER_CONFIG)
    base, method = settings.get("base_model_name_or_path"), settings.get("peft_type")
    if not isinstance(base, str | None) or not isinstance(method, str):
        raise ConversionError(
            f"{folder / ADAPTER_CONFIG} has base_model_name_or_path = {base!r} and peft_type = {method!r}; expected "
            "names, as PEFT writes them. Get the file again."
        )
    weights = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ConversionError(f"{folder} has no weights; expected one of {', '.join(ADAPTER_WEIGHTS)}. Get it again.")
    return Adapter(folder, settings, weights, base or None, method)
