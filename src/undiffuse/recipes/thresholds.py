"""Estimates kept in the range of the data, in a recipe: the key `threshold` of `sampling` and `evaluation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from undiffuse.core.errors import RecipeError
from undiffuse.fields import Denoiser
from undiffuse.guidance import Clipped, DynamicThreshold
from undiffuse.paths import Linear
from undiffuse.recipes.arguments import complete
from undiffuse.recipes.correctors import NONE
from undiffuse.recipes.tables import known, make


def _no_threshold(denoiser: Denoiser) -> Denoiser:
    """What takes the recipe's threshold away, in `evaluation` and on the command line."""
    return denoiser


TABLE: dict[str, Callable[..., Denoiser]] = {NONE: _no_threshold, "clip": Clipped, "dynamic": DynamicThreshold}


class _Blank(Denoiser):
    """What a choice is tried on."""

    def forward(self, x_t: Tensor, t: Any, cond: Any = None) -> Tensor:
        return x_t


def resolve_threshold(choice: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A choice of threshold, checked, every default written out.

    Raises:
        RecipeError: an unknown name or argument (the nearest is offered), or a value out of range.
    """
    factory = known(TABLE, choice["name"], "threshold", where)
    given = {key: value for key, value in choice.items() if key != "name"}
    resolved = {"name": choice["name"], **complete(factory, given, where, left_out=("denoiser",))}
    bounded(_Blank(Linear()), resolved, where)
    return resolved


def bounded(denoiser: Denoiser, choice: Mapping[str, Any] | None, where: str = "sampling.threshold") -> Denoiser:
    """The denoiser with its estimates kept as a choice says; itself where there is none."""
    if choice is None:
        return denoiser
    return make({name: partial(factory, denoiser) for name, factory in TABLE.items()}, choice, "threshold", where)


def check_thresholds(tree: dict[str, Any]) -> None:
    """The thresholds of a denoiser's recipe, resolved in place; "none" in `sampling` is the same as no key."""
    for name in ("sampling", "evaluation"):
        choice = tree[name].get("threshold")
        if choice is not None:
            tree[name]["threshold"] = resolve_threshold(choice, f"{name}.threshold")
    if (tree["sampling"].get("threshold") or {}).get("name") == NONE:
        tree["sampling"]["threshold"] = None


def refuse_thresholds(tree: Mapping[str, Any]) -> None:
    """For an energy's recipe.

    Raises:
        RecipeError: it has a threshold.
    """
    for name in ("sampling", "evaluation"):
        if tree[name].get("threshold"):
            raise RecipeError(f"{name}.threshold: chains of an energy estimate no x_0 to be bounded; leave it out")
