"""Results about a path, kept where the path is a value."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from operator import attrgetter
from typing import TypeVar

from undiffuse.paths.base import Path

T = TypeVar("T")
_FUNCTIONS = attrgetter("alpha", "sigma", "alpha_dot", "sigma_dot", "time_of", "time_of_angle")


def for_values(function: Callable[..., T]) -> Callable[..., T]:
    """The function of a path, its results kept for paths whose own class says that they are values (`Path.value`).

    Any other path may be another one at the next call. The class's functions are part of what is kept, too: they may be
    replaced.
    """

    @lru_cache(maxsize=256)
    def kept(functions: tuple[Callable, ...], path: Path, *rest: object) -> T:
        return function(path, *rest)

    @wraps(function)
    def found(path: Path, *rest: object) -> T:
        kind = type(path)
        value = vars(kind).get("value", False)
        return kept((kind, *_FUNCTIONS(kind)), path, *rest) if value else function(path, *rest)

    return found
