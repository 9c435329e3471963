"""Results about a path, kept where the path is a value."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from operator import attrgetter
from typing import TypeVar

from undiffuse.paths.base import Path

T = TypeVar("T")
_FUNCTIONS = attrgetter(
    "alpha", "sigma", "alpha_dot", "sigma_dot", "time_of", "time_of_angle", "input_scale", "noise_label"
)


def is_value(path: Path) -> bool:
    """Whether the path's own class says so (`Path.value`). Any other may be another path at the next call."""
    return vars(type(path)).get("value", False)


def for_values(function: Callable[..., T]) -> Callable[..., T]:
    """The function of a path, its results kept for paths that are values.

    The class's functions are part of what is kept, too: they may be replaced.
    """

    @lru_cache(maxsize=256)
    def kept(functions: tuple[Callable, ...], path: Path, *rest: object) -> T:
        return function(path, *rest)

    @wraps(function)
    def found(path: Path, *rest: object) -> T:
        kind = type(path)
        return kept((kind, *_FUNCTIONS(kind)), path, *rest) if is_value(path) else function(path, *rest)

    return found
