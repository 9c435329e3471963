"""`load_recipe`: a recipe by name or from a file, with what it extends and with overrides, checked in full."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from undiffuse.core.errors import RecipeError
from undiffuse.recipes.catalogue import find_recipe
from undiffuse.recipes.recipe import Recipe
from undiffuse.recipes.text import Tree, apply_overrides, merged, read_tree

EXTENDS = "extends"
# What a recipe says of itself and of its data is not handed down,
_OWN = ("name", "description", "facts")
# nor, to one of another kind of model, what means something else there.
_OF_KIND = ("model", "objective", "sampling", "evaluation")


def load_recipe(name_or_file: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """A recipe with every value resolved.

    A file may say `extends: NAME`, the name of a library's recipe or a file beside it: then what it does not say is as
    there, all but `name` and `description`. See `undiffuse.recipes.text.merged`. Where its `model.kind` is another, it
    takes `data`, `path`, `training` and `seed` from there, and nothing of `model`, `objective`, `sampling` and
    `evaluation`.

    Args:
        name_or_file: "digits", or "my/recipe.yaml".
        overrides: `["training.steps=500", "model.net.width=64"]`, or a mapping of dotted keys; values are YAML.

    Raises:
        RecipeError: unknown recipe, key or name (the nearest is offered), or a value out of range; recipes that extend
            one another in a circle.
    """
    file = find_recipe(name_or_file)
    tree = apply_overrides(_whole(file), overrides)
    if EXTENDS in tree:
        raise RecipeError(f"'{EXTENDS}' can be written in a recipe's file, not on top of one")
    return Recipe.from_tree(tree, origin=f"recipe '{tree.get('name', file.stem)}'")


def _whole(file: Path, above: tuple[Path, ...] = ()) -> Tree:
    """A file's tree with all that it extends; `above` are the files that lead to it."""
    tree = read_tree(file)
    if EXTENDS not in tree:
        return tree
    named = tree.pop(EXTENDS)
    if not isinstance(named, str):
        raise RecipeError(f"{file}: {EXTENDS} = {named!r}: expected the name of a recipe, or a file")
    is_file = named.endswith((".yaml", ".yml"))
    try:
        other = find_recipe(file.parent / named if is_file else named)
        chain = (*above, file.resolve())
        if other.resolve() in chain:
            circle = " -> ".join(place.stem for place in (*chain, other))
            raise RecipeError(f"goes in a circle: {circle}")
        base = _whole(other, chain)
    except RecipeError as error:
        raise RecipeError(f"{file.name}, {EXTENDS} '{named}': {error}") from None
    left = _OWN if _kind(tree, _kind(base)) == _kind(base) else (*_OWN, *_OF_KIND)
    return merged({key: value for key, value in base.items() if key not in left}, tree)


def _kind(tree: Tree, usual: Any = "denoiser") -> Any:
    """What a tree's model says that it is, else `usual`."""
    model = tree.get("model")
    return model.get("kind", usual) if isinstance(model, dict) else usual
