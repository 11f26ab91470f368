"""What a checkpoint's configuration asks to be built, bounded before anything is built.

`ConvLlavaConfig` tests its own parts. A configuration of another family brings them past it: timm fetches or unpickles
what some names and arguments point to, and a million layers never end, even without memory.
"""

import json
import re
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from ..model.configuration_convllava import MAX_LAYERS, MAX_WIDTH, find_timm_map
from .weight_maps import ConversionError


# Settings that say how many modules a model is made of, or how wide they are.
COUNT = re.compile(r"(\w*_)?(n?layers?|depths?|stages?|blocks?|experts?|repeats?)")
WIDTH = re.compile(r"(\w*_)?(hidden_sizes?|d_model)")
# A model that timm ships. Names of repositories and folders have a colon or a slash.
TIMM_NAME = re.compile(r"[\w.-]+")


def check_source(source: str | Path, revision: str | None = None) -> None:
    """Bounds what the configuration of a checkpoint asks for; to be called before a model is made of it.

    Args:
        source: folder, or Hub id. Of an adapter the base counts, as transformers loads that.
        revision: branch, tag or commit on the Hub.

    Raises:
        ConversionError: a part that timm would fetch or unpickle, or more and wider layers than any model has.
        OSError: no such checkpoint.
    """
    adapter = find_adapter_config_file(str(source), revision=revision)
    if adapter is not None and not (Path(source) / CONFIG_NAME).exists():
        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        source, revision = base or source, None
    # As transformers reads it: `configuration_files` in a config.json may name another file.
    settings, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    try:
        check_architecture(settings)
    except ValueError as error:
        raise ConversionError(f"the configuration of {source} is refused: {error}") from error


def check_architecture(settings: dict) -> None:
    """Bounds what a configuration asks for, in all of its parts.

    Args:
        settings: a `config.json`.

    Raises:
        ValueError: names the setting.
    """
    parts = [settings]
    while parts:  # nested as deep as JSON goes
        part = parts.pop()
        if isinstance(part, dict):
            _check_timm(part)
            for key, value in part.items():
                _check_numbers(str(key), value)
        nested = part.values() if isinstance(part, dict) else part
        parts += [value for value in nested if isinstance(value, dict | list)]


def _check_timm(part: dict) -> None:
    kind, arguments = part.get("model_type"), part.get("model_args") or {}
    # Some families take a part without a type for one of timm's.
    if kind == "timm_wrapper" or (kind is None and ("architecture" in part or arguments)):
        find_timm_map(part.get("architecture"), arguments)
        return
    for key in ("architecture", "backbone"):
        name = part.get(key)
        if isinstance(name, str) and not TIMM_NAME.fullmatch(name):
            raise ValueError(f"{key}={name!r}; expected the name of a model that timm ships.")
    if not isinstance(arguments, dict) or not all(isinstance(value, int | float) for value in arguments.values()):
        raise ValueError(f"model_args={arguments!r}; expected numbers and switches by name.")


def _check_numbers(key: str, value: object) -> None:
    values = value if isinstance(value, list) else [value]
    for pattern, limit in ((COUNT, MAX_LAYERS), (WIDTH, MAX_WIDTH)):
        if pattern.fullmatch(key) and any(isinstance(number, int | float) and number > limit for number in values):
            raise ValueError(f"{key} = {str(value)[:100]}; expected at most {limit}.")
    numbers = [number for number in values if isinstance(number, int)]
    if key.endswith("depths") and sum(numbers) > MAX_LAYERS:
        raise ValueError(f"{key} = {str(value)[:100]}, together {sum(numbers)}; expected at most {MAX_LAYERS}.")
