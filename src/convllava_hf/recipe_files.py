"""The recipes that the package brings: config files of `trl sft`."""

from importlib.resources import files
from pathlib import Path


RECIPES = Path(str(files(__package__).joinpath("recipes")))


def list_recipes() -> list[str]:
    """Names of the recipes, in order of the alphabet."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe.

    Args:
        name: of a recipe of the package, or the path of any YAML file.

    Raises:
        FileNotFoundError: neither.
    """
    for candidate in (Path(name), RECIPES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no recipe {str(name)!r}; expected a YAML file or one of: {', '.join(list_recipes())}.")
