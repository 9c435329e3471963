"""undiffuse: the theory of diffusion models as one algebra of path, field, objective, solver and recipe.

    import undiffuse as ud

Time runs from data (t = 0) to noise. A `Denoiser` returns `E[x_0 | x_t]`; noise, score and velocity follow from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The names a user types, by the room they live in. Rooms are imported at first use, so that `import undiffuse`
# costs little more than `import torch`.
_ROOMS: dict[str, tuple[str, ...]] = {
    "undiffuse.core.errors": ("UndiffuseError",),
    "undiffuse.core.random": ("Streams",),
    "undiffuse.paths": (
        "VE", "VP", "Cosine", "Karras", "Linear", "Path", "SubVP", "Tabulated", "Trig", "change_of_path",
    ),
    "undiffuse.fields": ("Denoiser", "NetworkDenoiser", "on_path"),
    "undiffuse.objectives": ("Denoising",),
    "undiffuse.oracles": ("Empirical", "Gaussian", "GaussianMixture", "exact_flow"),
    "undiffuse.solvers": ("make_grid", "sample"),
    "undiffuse.recipes": ("Recipe", "Run", "load_recipe", "load_run", "train"),
}  # fmt: skip
_MODULES = {
    "predictions": "undiffuse.fields.prediction",
    "data": "undiffuse.data",
    "metrics": "undiffuse.metrics",
    "nets": "undiffuse.nets",
    "solvers": "undiffuse.solvers",
}
_HOME = {name: module for module, names in _ROOMS.items() for name in names}

__all__ = [
    "VE",
    "VP",
    "Cosine",
    "Denoiser",
    "Denoising",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "Karras",
    "Linear",
    "NetworkDenoiser",
    "Path",
    "Recipe",
    "Run",
    "Streams",
    "SubVP",
    "Tabulated",
    "Trig",
    "UndiffuseError",
    "__version__",
    "change_of_path",
    "data",
    "exact_flow",
    "load_recipe",
    "load_run",
    "make_grid",
    "metrics",
    "nets",
    "on_path",
    "predictions",
    "sample",
    "solvers",
    "train",
]


def __getattr__(name: str):
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'undiffuse' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from undiffuse import data, metrics, nets, solvers
    from undiffuse.core.errors import UndiffuseError
    from undiffuse.core.random import Streams
    from undiffuse.fields import Denoiser, NetworkDenoiser, on_path
    from undiffuse.fields import prediction as predictions
    from undiffuse.objectives import Denoising
    from undiffuse.oracles import Empirical, Gaussian, GaussianMixture, exact_flow
    from undiffuse.paths import VE, VP, Cosine, Karras, Linear, Path, SubVP, Tabulated, Trig, change_of_path
    from undiffuse.recipes import Recipe, Run, load_recipe, load_run, train
    from undiffuse.solvers import make_grid, sample
