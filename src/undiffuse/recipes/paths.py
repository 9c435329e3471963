"""From the section `path` of a recipe to a path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from undiffuse.core.errors import RecipeError
from undiffuse.paths import PATHS, Path, Tabulated, geometric_levels
from undiffuse.recipes.schema import Settings
from undiffuse.recipes.tables import make, resolve


def betas(levels: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tabulated:
    """DDPM's chain with linear step variances (Ho et al. 2020, section 4)."""
    return Tabulated.from_betas(torch.linspace(first, last, levels, dtype=torch.float64))


def sigmas(levels: int = 232, smallest: float = 0.01, largest: float = 50.0) -> Tabulated:
    """NCSN's chain with geometric noise levels (Song and Ermon 2020, technique 2; 232 levels on CIFAR-10)."""
    return Tabulated.from_sigmas(geometric_levels(smallest, largest, levels))


def cosine_betas(levels: int = 1000, most: float = 0.999) -> Tabulated:
    """The cosine chain, its step variances cut at `most` (Nichol and Dhariwal 2021, eq. 17 and after)."""
    grid = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    signal = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
    return Tabulated.from_betas((1 - signal[1:] / signal[:-1]).clamp(max=most))


ALL_PATHS: dict[str, Callable[..., Path]] = {
    **PATHS,
    "tabulated-betas": betas,
    "tabulated-cosine": cosine_betas,
    "tabulated-sigmas": sigmas,
}


def check_path(tree: dict[str, Any]) -> None:
    """The section of a recipe that needs one, resolved in place.

    Raises:
        RecipeError: it is missing, has an unknown name or argument.
    """
    if tree["path"] is None:
        raise RecipeError("'path' is required but not given.")
    tree["path"] = resolve(ALL_PATHS, tree["path"], "path", "path")


def path(settings: Settings) -> Path:
    """The path.

    Raises:
        RecipeError: an energy has none.
    """
    if settings.path is None:
        raise RecipeError(f"recipe '{settings.name}' trains an energy, which has no path")
    return make(ALL_PATHS, settings.path, "path", "path")
