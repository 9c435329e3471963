"""From a name in a recipe to what a table has under it, with its arguments checked by signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from undiffuse.core.errors import ArgumentError, RecipeError, choose
from undiffuse.recipes.arguments import argument_names, complete

T = TypeVar("T")


def known(table: Mapping[str, T], name: str, what: str, where: str) -> T:
    """`table[name]`.

    Raises:
        RecipeError: no such name; says at which key, and offers the nearest.
    """
    try:
        return choose(name, table, what)
    except ArgumentError as error:
        raise RecipeError(f"{where}: {error}") from None


def resolve(
    table: Mapping[str, Callable],
    choice: Mapping[str, Any],
    what: str,
    where: str,
    *,
    shared: Mapping[str, Any] | None = None,
    later: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A choice with its name and arguments checked and every default written out.

    Args:
        shared: values that other sections hold; taken where the choice has such an argument and does not give it.
        later: arguments that may be missing, because the data will say them.
    """
    factory = known(table, choice["name"], what, where)
    given = {key: value for key, value in choice.items() if key != "name"}
    names = argument_names(factory)
    given = {key: value for key, value in (shared or {}).items() if key in names} | given
    return {"name": choice["name"], **complete(factory, given, where, later=later)}


def make(table: Mapping[str, Callable], choice: Mapping[str, Any], what: str, where: str) -> Any:
    """The object a choice stands for.

    Raises:
        RecipeError: unknown name or argument, or a value that its constructor refuses.
    """
    factory = known(table, choice["name"], what, where)
    try:
        return factory(**{key: value for key, value in choice.items() if key != "name"})
    except RecipeError:
        raise
    except ArgumentError as error:
        raise RecipeError(f"{where}: {error}") from None
