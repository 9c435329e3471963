"""Predictor and corrector in a recipe: the keys `corrector` and `denoise` of `sampling` and `evaluation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from undiffuse.core.errors import RecipeError
from undiffuse.recipes.schema import SamplingSection
from undiffuse.recipes.tables import make, resolve
from undiffuse.recipes.tuned import TABLE as ALL_SOLVERS
from undiffuse.solvers import CORRECTORS, OWN, Corrector

NONE = "none"


def _no_corrector() -> None:
    """What takes the recipe's corrector away, in `evaluation` and on the command line."""


TABLE: dict[str, Callable[..., Corrector | None]] = {NONE: _no_corrector, **CORRECTORS}


def resolve_corrector(choice: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A choice of corrector, checked, every default written out.

    Raises:
        RecipeError: an unknown name or argument (the nearest is offered), or a value out of range.
    """
    resolved = resolve(TABLE, choice, "corrector", where)
    make(TABLE, resolved, "corrector", where)
    return resolved


def corrector(choice: Mapping[str, Any] | None) -> Corrector | None:
    """The corrector that a choice stands for; None where there is none."""
    return None if choice is None else make(TABLE, choice, "corrector", "sampling.corrector")


def overlaid(section: SamplingSection, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """What layers of choices change in a recipe's `sampling`, later ones above earlier ones; None says nothing.

    Corrector and grid belong to their solver: one of another name comes without the corrector of the one that it
    replaces, and on its own grid, unless its layer says otherwise, or it predicts nothing ("stay") and leaves all to
    the corrector.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        said = {key: value for key, value in layer.items() if value is not None}
        before, solver = found.get("solver", section.solver), said.get("solver", found.get("solver", section.solver))
        own = {"corrector": {"name": NONE}, "grid": OWN}
        theirs = [key for key in own if found.get(key, getattr(section, key)) is not None]
        if theirs and solver["name"] != before["name"] and _predicts(solver):
            found |= {key: own[key] for key in theirs}
        found |= said
    return found


def _predicts(solver: Mapping[str, Any]) -> bool:
    return make(ALL_SOLVERS, solver, "solver", "sampling.solver").evals_per_step > 0


def check_correctors(tree: dict[str, Any]) -> None:
    """The correctors of a denoiser's recipe, resolved in place; "none" in `sampling` is the same as no key."""
    for name in ("sampling", "evaluation"):
        choice = tree[name].get("corrector")
        if choice is not None:
            tree[name]["corrector"] = resolve_corrector(choice, f"{name}.corrector")
    if (tree["sampling"].get("corrector") or {}).get("name") == NONE:
        tree["sampling"]["corrector"] = None


def refuse_correctors(tree: Mapping[str, Any]) -> None:
    """For an energy's recipe.

    Raises:
        RecipeError: it has a corrector or a last denoising step.
    """
    for name in ("sampling", "evaluation"):
        for key in ("corrector", "denoise"):
            if tree[name].get(key):
                raise RecipeError(
                    f"{name}.{key}: chains of an energy follow no path to be corrected or denoised; leave it out"
                )


def said(
    choice: Mapping[str, Any],
    correction: Mapping[str, Any] | None = None,
    denoise: bool = False,
    threshold: Mapping[str, Any] | None = None,
) -> str:
    """A sampler in words: `reverse-diffusion + langevin(snr=0.16, steps=1, rule=score), denoised`."""
    parts = [_called(part) for part in (choice, correction) if part is not None and part["name"] != NONE]
    bounds = f", threshold {_called(threshold)}" if threshold is not None else ""
    return " + ".join(parts) + (", denoised" if denoise else "") + bounds


def _called(choice: Mapping[str, Any]) -> str:
    given = [f"{key}={value}" for key, value in choice.items() if key != "name" and value is not None]
    return choice["name"] + (f"({', '.join(given)})" if given else "")
