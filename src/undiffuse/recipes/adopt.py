"""`adopt`: a run folder for a network that was trained elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import RunError
from undiffuse.nets import NETS
from undiffuse.recipes.recipe import Recipe
from undiffuse.recipes.run import Run, new_run_folder
from undiffuse.recipes.tables import make
from undiffuse.recipes.text import apply_overrides
from undiffuse.training import locked
from undiffuse.training.checkpoint import save_checkpoint
from undiffuse.training.files import disk_errors, replace_file, sync, temporary_name
from undiffuse.training.run_folder import InUseError
from undiffuse.training.state import restore_module


def adopt(
    name: str,
    model: Mapping[str, Any],
    path: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    folder: str | Path | None = None,
    origin: str = "imported",
    changes: Iterable[str] = (),
) -> Run:
    """Write a run folder that `load_run` opens: a recipe and one checkpoint, of step 0. It appears whole or not at all.

    Args:
        name: of the recipe.
        model: the recipe's section: net (with its name and shape), prediction, sigma_data.
        path: the recipe's section.
        weights: the network's state.
        folder: the run folder; None: `runs/NAME-YYYYmmdd-HHMMSS`.
        origin: what to say of the data that it was trained on.
        changes: `["data.source=parquet", "data.path=cifar10/"]`: values that replace the recipe's.

    Raises:
        RecipeError: a section that is wrong. RunError: the folder is not empty. CheckpointError: the weights are not
            those of the network.
    """
    net = model["net"]
    tree: dict[str, Any] = {
        "name": name,
        "description": f"{origin}, imported",
        "data": {"source": "folder", "path": None, "size": list(net["shape"][1:])},
        "path": dict(path),
        "model": dict(model),
        "facts": {
            "shape": list(net["shape"]),
            "num_classes": net.get("num_classes"),
            "image": True,
            "data": origin,
            "fingerprint": "imported",
        },
    }
    if path["name"] == "karras":
        tree["sampling"] = {"solver": "heun", "steps": 18, "grid": "karras"}
    recipe = Recipe.from_tree(apply_overrides(tree, changes), origin=f"the recipe of {origin}")
    place = new_run_folder(name) if folder is None else Path(folder).expanduser()
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise RunError(f"{place} exists and is not empty: give another run folder")
    if place.resolve() == Path.cwd():
        raise RunError("a run folder cannot take the place of the folder you are in: give another")
    with torch.device("meta"):  # no memory: names, shapes and types alone are compared
        empty = make(NETS, recipe.settings.model.net, "network", "model.net")
        restore_module(empty, {key: tensor.to("meta") for key, tensor in weights.items()}, place)
    state = {f"net.{key}": tensor for key, tensor in weights.items()}
    with disk_errors(f"{place}", "Nothing of it was left behind"), _whole_or_nothing(place) as filling:
        save_checkpoint(filling, 0, {"model": state}, {"imported": origin}, keep=1)
        replace_file(filling / "recipe.yaml", recipe.to_yaml().encode())
    return Run(place, recipe)


@contextmanager
def _whole_or_nothing(place: Path) -> Iterator[Path]:
    """A folder beside `place` to fill, which takes its place, empty or new, at the end of the block.

    Where what is written fails, it is removed with the folders that were made. Where the process is killed, it stays
    under its temporary name, and the next to fill that place begins with removing it.

    Raises:
        RunError: another process fills that place, or has filled it; or something could not be removed: says what.
    """
    target = place.resolve()
    temporary = temporary_name(target)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with locked(temporary), _removed_on_error(temporary):
            _empty(temporary)
            yield temporary
            sync(temporary)
            _rename(temporary, target, place)
            sync(target.parent)
    except InUseError:
        raise RunError(f"{place} is being filled by another process: give another run folder") from None
    except BaseException as error:
        for folder in made:
            with suppress(OSError):  # it has something of another's in it
                folder.rmdir()
        if temporary.exists():
            raise RunError(f"could not write {place}: {error}. Left behind, remove by hand: {temporary}") from error
        raise


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _rename(temporary: Path, target: Path, place: Path) -> None:
    """In one step, also over an empty folder, and over no other."""
    try:
        os.rename(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise RunError(f"{place} was filled by another process: give another run folder") from error


def _empty(folder: Path) -> None:
    """Remove what is in a folder but for its lock."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
