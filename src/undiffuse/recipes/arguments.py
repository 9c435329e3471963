"""Checking the arguments of anything that has a signature, so that a recipe needs no second list of them."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import typing
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial
from typing import Any

import pydantic
from pydantic import ConfigDict

from undiffuse.core.errors import RecipeError

_INFINITE = (math.inf, -math.inf)
_RULES = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@lru_cache(maxsize=256)
def _model_of(factory: Callable, left_out: frozenset[str]) -> type[pydantic.BaseModel]:
    """A pydantic model with one field per argument of `factory`."""
    inner: Any = factory.func if isinstance(factory, partial) else factory
    target = inner.__init__ if inspect.isclass(inner) else inner
    try:
        hints = typing.get_type_hints(target)
    except (NameError, TypeError):
        hints = {}
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if name in left_out or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        fields[name] = (hints.get(name, Any), ... if required else parameter.default)
    # A field of a pydantic model may not shadow its methods: `copy`, `json`, ... get an alias.
    safe = {f"arg_{name}": (kind, pydantic.Field(default, alias=name)) for name, (kind, default) in fields.items()}
    return pydantic.create_model(f"Arguments_{inner.__name__}", __config__=_RULES, **safe)  # pyright: ignore


def argument_names(factory: Callable, left_out: Collection[str] = ()) -> list[str]:
    """Names a recipe may give to `factory`."""
    return [field.alias or "" for field in _model_of(factory, frozenset(left_out)).model_fields.values()]


def complete(
    factory: Callable,
    given: Mapping[str, Any],
    where: str,
    *,
    left_out: Collection[str] = (),
    later: Collection[str] = (),
) -> dict[str, Any]:
    """`given` checked against the signature of `factory`, with every default written out.

    Args:
        factory: a class or function.
        given: arguments by name, as YAML gives them.
        where: dotted key of the section, for messages.
        left_out: arguments that the library passes itself.
        later: arguments that may be missing here, because the data will say them; they stay missing.

    Raises:
        RecipeError: an unknown argument (names the nearest), a missing one, or a value of the wrong type.
    """
    known = argument_names(factory, left_out)
    for name in given:
        if name not in known:
            raise RecipeError(unknown_key(f"{where}.{name}", [f"{where}.{key}" for key in known]))
    model = _model_of(factory, frozenset(left_out) | (frozenset(later) - frozenset(given)))
    try:
        checked = model.model_validate_json(json.dumps(dict(given)))
    except pydantic.ValidationError as error:
        # Only the first part of a place is a key: a union adds the names of its members.
        # A recipe cannot write a function: that an argument may be one is not said.
        problems = [{**item, "loc": item["loc"][:1]} for item in error.errors() if item["type"] != "callable_type"]
        raise RecipeError(explain(problems, where)) from None
    values = json.loads(checked.model_dump_json(by_alias=True))
    # JSON has no infinity: a default of that value stays unwritten.
    unwritten = {name for name, value in checked.model_dump(by_alias=True).items() if value in _INFINITE}
    return {name: value for name, value in values.items() if name not in unwritten}


# What other projects call the same thing.
_ELSEWHERE = {
    "learning_rate": "training.lr",
    "batch_size": "training.batch",
    "epochs": "training.steps",
    "iterations": "training.steps",
    "ema_decay": "training.ema",
    "image_size": "data.size",
    "dataset": "data.source",
    "optim": "training.optimizer",
    "sampler": "sampling.solver",
    "schedule": "path",
}
_CLOSE = 0.6  # difflib's ratio from which a name is worth offering


def unknown_key(key: str, known: Collection[str]) -> str:
    """The message for a key that a recipe does not have: the nearest in its section, else the nearest anywhere."""
    section, _, leaf = key.rpartition(".")
    beside = sorted(name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section)
    near = difflib.get_close_matches(leaf, beside, n=1, cutoff=_CLOSE)
    found = f"{section}.{near[0]}".lstrip(".") if near else ""
    if not found:
        anywhere = {name.rpartition(".")[2]: name for name in known} | {
            name: place for name, place in _ELSEWHERE.items() if place in known
        }
        near = difflib.get_close_matches(leaf, anywhere, n=1, cutoff=_CLOSE)
        found = anywhere[near[0]] if near else ""
    hint = f" Did you mean '{found}'?" if found else ""
    listed = f" Known{f' in {section!r}' if section else ''}: {', '.join(beside)}." if beside else ""
    return f"unknown key '{key}'.{hint}{listed}"


def explain(problems: list[Any], where: str = "") -> str:
    """Pydantic's findings in one sentence each: the key, what was given, what is allowed."""
    lines = []
    for item in problems:
        key = ".".join([*([where] if where else []), *(str(part) for part in item["loc"])])
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if item["type"] == "missing":
            lines.append(f"'{key}' is required but not given")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {message}")
        else:
            lines.append(f"{key} = {_shown(item['input'])}: must be {message}")
    return "; ".join(dict.fromkeys(lines)) + "."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
