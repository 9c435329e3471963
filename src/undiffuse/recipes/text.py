"""Reading and writing the text of a recipe: YAML without surprises, and `a.b.c=value` overrides.

What is refused, because it would be silently wrong: a key given twice, an alias (its expansion has no bound), a
file larger than a recipe can be, a tag (only plain scalars, lists and mappings are known).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from undiffuse.core.errors import RecipeError

MAX_BYTES = 1 << 20  # the longest recipe of the library is 3 kB
Tree = dict[str, Any]

# YAML 1.1 takes `1e-3` for a string and `no` for false; recipes follow YAML 1.2 in both.
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(~|null|Null|NULL|)$")


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's scalars; refuses duplicate keys, aliases and non-string keys."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012  (replaces the inherited table)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise RecipeError(f"line {mark.line + 1}: an alias (*name) is not allowed in a recipe; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise RecipeError(f"line {line}: the key '{key_node.value}' is not a name")
            if key_node.value in seen:
                raise RecipeError(f"line {line}: the key '{key_node.value}' is given twice; keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))


def parse_yaml(text: str, origin: str) -> Any:
    """The value that `text` writes in YAML.

    Raises:
        RecipeError: not YAML, a duplicate key, an alias, a tag, nested beyond reason; names `origin` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin} is not a recipe: {_short(error)}") from None
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{origin} is not a recipe: {error}") from None


def _short(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{getattr(error, 'problem', None) or error}"


def read_tree(file: Path) -> Tree:
    """The mapping in a recipe file.

    Raises:
        RecipeError: missing, too large, not UTF-8, not YAML, or not a mapping.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{file} has {file.stat().st_size:,} bytes: a recipe has at most {MAX_BYTES:,}")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {file}: {error}") from None
    tree = parse_yaml(text, str(file))
    if not isinstance(tree, dict):
        raise RecipeError(f"{file} is not a recipe: expected sections such as 'data:' and 'training:' at the top")
    return tree


class _Dumper(yaml.SafeDumper):
    """Block style, short lists on one line, no aliases."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: _Dumper, items: list) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _represent_list)


def dump_tree(tree: Mapping[str, Any]) -> str:
    """YAML whose reading gives the same tree."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse_override(text: str) -> tuple[list[str], Any]:
    """`"a.b=value"` as (["a", "b"], value); the value is read as YAML.

    Raises:
        RecipeError: no `=`, or an empty key.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"'{text}' is not an override: write key=value, for example training.steps=500")
    return parts, parse_yaml(value, f"the value of {key.strip()}")


def apply_overrides(tree: Tree, overrides: Iterable[str] | Mapping[str, Any]) -> Tree:
    """A copy of `tree` with dotted keys set. A name that stands for a mapping grows into one: `net=unet` and then
    `net.channels=64` is `{name: unet, channels: 64}`.

    Raises:
        RecipeError: not `key=value`, or a dotted key that goes through a plain value.
    """
    if isinstance(overrides, str):
        raise RecipeError(f"overrides must be a list of 'key=value', got the string '{overrides}'")
    pairs = (
        [(key.split("."), value) for key, value in overrides.items()]
        if isinstance(overrides, Mapping)
        else [parse_override(text) for text in overrides]
    )
    tree = _copy(tree)
    for parts, value in pairs:
        _set(tree, parts, value)
    return tree


def merged(base: Tree, changes: Tree) -> Tree:
    """`base` with `changes`: mappings are merged key by key, everything else is replaced.

    A choice that takes another name, or another kind than is said, is replaced too, since the arguments of the old one
    are not those of the new: `{name: vp, beta_min: 0.1}` and `{name: ve}` make `{name: ve}`, but `{beta_max: 10}` adds
    to the first.
    """
    result = _copy(base)
    for key, value in changes.items():
        before = result.get(key)
        if isinstance(value, dict):
            before = {"name": before} if isinstance(before, str) else before
            if isinstance(before, dict) and _same_choice(before, value):
                value = merged(before, value)
        result[key] = _copy(value)
    return result


def _same_choice(before: Tree, value: Tree) -> bool:
    """Whether `value` adds to `before`. A kind that is not said is that of what is said beside it; a name is not."""
    kinds = [tree["kind"] for tree in (before, value) if "kind" in tree]
    return value.get("name", before.get("name")) == before.get("name") and kinds[:1] == kinds[-1:]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _set(tree: Tree, parts: list[str], value: Any) -> None:
    place: Tree = tree
    for depth, part in enumerate(parts[:-1]):
        inner: Any = place.get(part)
        if inner is None:
            inner = {}
        elif isinstance(inner, str):
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            raise RecipeError(
                f"'{'.'.join(parts)}' cannot be set: '{'.'.join(parts[: depth + 1])}' is the value {inner!r}"
            )
        place[part] = inner
        place = inner
    place[parts[-1]] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
