"""`load_recipe`: a recipe by name or from a file, with overrides, checked in full."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from undiffuse.recipes.catalogue import find_recipe
from undiffuse.recipes.recipe import Recipe
from undiffuse.recipes.text import apply_overrides, read_tree


def load_recipe(name_or_file: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """A recipe with every value resolved.

    Args:
        name_or_file: "digits", or "my/recipe.yaml".
        overrides: `["training.steps=500", "model.net.width=64"]`, or a mapping of dotted keys; values are YAML.

    Raises:
        RecipeError: unknown recipe, key or name (the nearest is offered), or a value out of range.
    """
    file = find_recipe(name_or_file)
    tree = apply_overrides(read_tree(file), overrides)
    return Recipe.from_tree(tree, origin=f"recipe '{tree.get('name', file.stem)}'")
