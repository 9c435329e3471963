"""Floor 5: known choices on every axis, and the runs made with them. Rooms below are imported at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "adopt": "adopt",
    "Recipe": "recipe",
    "Run": "run",
    "Sampler": "generate",
    "find_run": "run",
    "list_recipes": "catalogue",
    "load_recipe": "load",
    "load_run": "run",
    "train": "launch",
}

__all__ = ["Recipe", "Run", "Sampler", "adopt", "find_run", "list_recipes", "load_recipe", "load_run", "train"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'undiffuse.recipes' has no attribute '{name}'")
    return getattr(importlib.import_module(f"undiffuse.recipes.{_HOME[name]}"), name)


if TYPE_CHECKING:
    from undiffuse.recipes.adopt import adopt
    from undiffuse.recipes.catalogue import list_recipes
    from undiffuse.recipes.generate import Sampler
    from undiffuse.recipes.launch import train
    from undiffuse.recipes.load import load_recipe
    from undiffuse.recipes.recipe import Recipe
    from undiffuse.recipes.run import Run, find_run, load_run
