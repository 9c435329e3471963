"""The recipes that come with the library. Loads neither torch nor another room, so that listing them is quick."""

from __future__ import annotations

from pathlib import Path

from undiffuse.core.errors import RecipeError, nearest
from undiffuse.recipes.text import read_tree

FOLDER = Path(__file__).parent
GROUPS = {
    "Ready to run": FOLDER,
    "With published settings, at full size; what differs is in docs/score_sde.md": FOLDER / "published",
}
"""What a list of recipes is headed by, and the folder of those."""


def recipe_files() -> dict[str, Path]:
    """The library's recipes: name and file."""
    files = [file for folder in GROUPS.values() for file in sorted(folder.glob("*.yaml"), key=lambda file: file.stem)]
    return {file.stem: file for file in files}


def list_recipes(group: str | None = None) -> dict[str, str]:
    """The library's recipes, of one of `GROUPS` or all: name and one-line description."""
    return {
        name: str(read_tree(file).get("description", ""))
        for name, file in recipe_files().items()
        if group is None or file.parent == GROUPS[group]
    }


def find_recipe(name_or_file: str | Path) -> Path:
    """The file of a recipe: a name of the library's own, or the path of a YAML file.

    Raises:
        RecipeError: neither; offers the nearest name and lists all.
    """
    text = str(name_or_file)
    known = recipe_files()
    if isinstance(name_or_file, str) and text in known:
        return known[text]
    place = Path(name_or_file).expanduser()
    if place.is_dir():
        inside = place / "recipe.yaml"
        hint = f"; its recipe is {inside}" if inside.is_file() else ""
        raise RecipeError(f"'{text}' is a folder: expected the name of a recipe or a YAML file{hint}")
    if place.is_file() or place.suffix in (".yaml", ".yml") or len(place.parts) > 1:
        return place
    raise RecipeError(f"unknown recipe '{text}'.{nearest(text, known)} Known: {', '.join(known)}; or give a YAML file.")
