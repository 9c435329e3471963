"""Errors that say what was given, what was expected and what to do.

Every error that a user can cause derives from `UndiffuseError` and carries the exit code of the command line.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


class UndiffuseError(Exception):
    """Root of all errors raised on purpose. `exit_code` is what the command returns for it."""

    exit_code = 1


class ArgumentError(UndiffuseError, ValueError):
    """A wrong argument: value, shape, time or name."""

    exit_code = 2


class RecipeError(ArgumentError):
    """A recipe that does not exist, has an unknown key, or a value out of range."""


class DataError(UndiffuseError, ValueError):
    """Data that is missing, unreadable or of the wrong shape; names the file and the row."""

    exit_code = 3


class RunError(UndiffuseError):
    """A run folder that cannot be used: missing, locked, or made by another recipe."""

    exit_code = 4


class CheckpointError(RunError):
    """A checkpoint that is absent, truncated, altered, or of a format that could run code."""


class TrainingError(UndiffuseError):
    """Training cannot go on: a non-finite loss (what it stopped on has been saved), or an energy that diverges."""

    exit_code = 5


class SamplingError(UndiffuseError, ArithmeticError):
    """A sample became infinite or NaN; names the first step where it did."""

    exit_code = 5


class MissingExtraError(UndiffuseError, ImportError):
    """An optional dependency is absent; names the extra that brings it."""

    exit_code = 6


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'heun'?"`, or the empty string where nothing known is close to `name`."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def choose(name: str, table: Mapping[str, T], what: str) -> T:
    """`table[name]`, or an `ArgumentError` that offers the nearest name and lists all."""
    if name in table:
        return table[name]
    raise ArgumentError(f"unknown {what} '{name}'.{nearest(name, table)} Known: {', '.join(sorted(table))}.")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs the package '{module.split('.')[0]}': pip install 'undiffuse[{extra}]'"
        ) from error
