"""`undiffuse recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console
from undiffuse.core.errors import ArgumentError, nearest


def recipes(
    action: Annotated[str, typer.Argument(metavar="list|show", help="What to do.")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="For show: a recipe or a file.")] = None,
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="For show: overrides.")] = None,
    as_written: Annotated[bool, typer.Option("--as-written", help="For show: the file, comments and all.")] = False,
    json: options.Json = False,
) -> None:
    """List the recipes, or show one with every value resolved.

    \b
    Examples:
      undiffuse recipes
      undiffuse recipes show digits
      undiffuse recipes show digits --as-written
      undiffuse recipes show cifar10 training.batch=256
    """
    out = Console(json)
    if action == "list":
        from undiffuse.recipes.catalogue import GROUPS, list_recipes

        groups = {heading: list_recipes(heading) for heading in GROUPS}
        if not json:
            for place, (heading, found) in enumerate(groups.items()):
                width = max(len(known) for known in found)
                out.say(f"{chr(10) if place else ''}{heading}:")
                for known, text in found.items():
                    out.say(f"{known:<{width}}  {text}")
        out.result({name: text for found in groups.values() for name, text in found.items()})
    elif action == "show":
        _show(name, changes or [], as_written, out)
    else:
        raise ArgumentError(f"recipes {action}: expected list or show.{nearest(action, ['list', 'show'])}")


def _show(name: str | None, changes: list[str], as_written: bool, out: Console) -> None:
    if name is None:
        raise ArgumentError("recipes show: give the name of a recipe, for example: undiffuse recipes show digits")
    if as_written:
        from undiffuse.recipes.catalogue import find_recipe

        text = find_recipe(name).read_text(encoding="utf-8")
        out.say(text.rstrip())
        out.result({"name": name, "text": text})
        return
    from undiffuse.recipes import load_recipe

    recipe = load_recipe(name, changes)
    if not out.as_json:
        out.say(recipe.to_yaml().rstrip())
    out.result(recipe.to_dict())
