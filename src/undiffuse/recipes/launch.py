"""`train`: from a recipe to a run folder."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from undiffuse.core.errors import RecipeError, RunError
from undiffuse.data import Loader
from undiffuse.recipes.chains import EnergySampler, sampler_of
from undiffuse.recipes.datasets import check_levels, dequantiser
from undiffuse.recipes.devices import pick_device
from undiffuse.recipes.generate import Sampler, write_arrays
from undiffuse.recipes.load import load_recipe
from undiffuse.recipes.recipe import Recipe
from undiffuse.recipes.run import Run, new_run_folder
from undiffuse.recipes.text import read_tree
from undiffuse.training import World, fit, join, locked
from undiffuse.training.files import disk_errors, replace_file
from undiffuse.training.run_folder import refuse_changes

# Where data lie may change between sessions: what they are is in `facts.fingerprint`.
_PLACES = ("path", "data_files")


def train(
    recipe: Recipe | str | Path,
    run: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    on_start: Callable[[Run, nn.Module], Any] | None = None,
    on_data: Callable[[int, int], None] | None = None,
    on_log: Callable[[dict[str, Any]], Any] | None = None,
    on_sample: Callable[[Run, int, Sampler | EnergySampler], Any] | None = None,
) -> Run:
    """Train what a recipe says. A run folder that exists is taken up where it stopped, bit for bit.

    Under `torchrun` every process calls this; the first one writes the files and gets the calls of `on_log` and
    `on_sample`.

    Args:
        recipe: a recipe, or the name or file of one.
        run: the run folder; None: `runs/NAME-YYYYmmdd-HHMMSS`.
        device: None: a GPU where there is one.
        on_start: called with the run and the model before the first step, in every process.
        on_data: called with (images read, images in all) while the data are read.
        on_log: called with each record of `metrics.jsonl`.
        on_sample: called with the run, the step and a sampler every `training.sample_every` steps; None: the samples
            go to `samples/step-NNNNNNN.npz`.

    Returns:
        The run; `run.result` says how training ended.

    Raises:
        RecipeError, DataError: before anything is written. RunError: the folder is in use, or was begun with another
            recipe (says which key). TrainingError: a loss is not finite.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    place = pick_device(device)
    config = recipe.train_config()
    with join(place, config.timeout) as world:
        dataset = recipe.data(progress=on_data)
        check_levels(recipe.settings, dataset)
        recipe = recipe.resolved(dataset)
        model, objective = recipe.model(), recipe.objective(dataset)
        loader = Loader(
            dataset,
            config.batch,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            flip=recipe.settings.data["flip"],
            change=dequantiser(recipe.settings),
        )
        folder = _open_folder(recipe, run, world)
        here = Run(folder, recipe)
        if on_start is not None:
            on_start(here, model)
        save = on_sample or save_samples

        def sample(step: int, averaged: Any) -> None:
            save(here, step, sampler_of(averaged, recipe.settings))

        result = fit(
            model,
            objective,
            loader,
            config,
            folder,
            on_sample=sample,
            on_log=on_log,
            device=place,
            fingerprint=fingerprint(recipe),
        )
    return Run(folder, recipe, result)


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What may not change between the sessions of a run."""
    return without_places(recipe.to_dict())


def without_places(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree without where its data lie and what they are called there."""
    data = {key: value for key, value in (tree.get("data") or {}).items() if key not in _PLACES}
    facts = {key: value for key, value in (tree.get("facts") or {}).items() if key != "data"}
    return {**tree, "data": data, "facts": facts}


def _open_folder(recipe: Recipe, run: str | Path | None, world: World) -> Path:
    """Choose the folder and write the recipe into it; the same answer in every process."""

    def choose() -> str:
        folder = new_run_folder(recipe.name) if run is None else Path(run).expanduser()
        if folder.exists() and not folder.is_dir():
            raise RunError(f"the run folder '{folder}' is a file: give another --run")
        with disk_errors(f"{folder}", "Nothing was changed"), locked(folder):
            _write_recipe(recipe, folder)
        return str(folder)

    return Path(world.from_main("the name of the run folder", choose))


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    """`recipe.yaml`, unless the folder holds a run of another recipe that has been trained."""
    file = folder / "recipe.yaml"
    begun = any((folder / "checkpoints").glob("step-*"))
    if file.is_file() and begun:
        try:
            before = read_tree(file)
        except RecipeError as error:
            raise RunError(f"cannot resume {folder}: {error}") from error
        refuse_changes(without_places(before), fingerprint(recipe), folder)
    elif begun:
        raise RunError(f"{folder} has checkpoints but no recipe.yaml: give another run folder, or put it back")
    replace_file(file, recipe.to_yaml().encode())


def save_samples(run: Run, step: int, sampler: Sampler | EnergySampler) -> None:
    """The recipe's `sampling.n` samples as `samples/step-NNNNNNN.npz`."""
    seeds = range(run.recipe.settings.sampling.n)
    folder = run.folder / "samples"
    buffer = io.BytesIO()
    write_arrays(buffer, sampler(seeds), np.asarray(seeds), sampler.labels(seeds))
    with disk_errors(str(folder), "The checkpoints are intact"):
        folder.mkdir(exist_ok=True)
        replace_file(folder / f"step-{step:07d}.npz", buffer.getvalue())
