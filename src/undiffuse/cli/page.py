"""What a run's report says, gathered from the run folder, the model and the data."""

from __future__ import annotations

import math
import shlex
from typing import Any

import torch
from torch import Tensor

from undiffuse.cli.console import Console
from undiffuse.cli.drawing import How, Model, read_samples
from undiffuse.cli.measuring import RealData
from undiffuse.core.errors import ArgumentError, DataError, RecipeError
from undiffuse.recipes import Recipe, Run, load_recipe
from undiffuse.recipes.catalogue import recipe_files
from undiffuse.recipes.generate import spread
from undiffuse.recipes.text import dump_tree, flatten
from undiffuse.report import Neighbours, ReportData

PER_CLASS = 10
MOST_CLASSES = 20
UNLABELLED = 100
POINTS = 4000
FILM_ROWS = 6
FILM_FRAMES = 9


def make_page(run: Run, how: How, screen: Console) -> ReportData:
    """Everything on the page of a run."""
    model = Model.load(run, how)
    facts = model.sampler.facts
    seeds = _seeds(facts.num_classes, points=not facts.image)
    screen.say(f"report of {run.folder} (step {model.step}, weights {model.ema}): {len(seeds)} samples")
    with screen.progress("sampling", "samples") as bar:
        x = model.sampler(seeds, on_batch=lambda done: bar.to(done, len(seeds)))
    real = _real(run, screen)
    latest = _latest(run)
    return ReportData(
        title=run.folder.name,
        subtitle=run.recipe.settings.description,
        recipe_yaml=run.recipe.to_yaml(),
        commands=commands(run),
        samples=x,
        labels=model.sampler.labels(seeds),
        class_names=facts.class_names,
        reference=None if real is None else real.x[spread(len(real.x), POINTS if not facts.image else UNLABELLED)],
        film=film(model),
        metrics_log=run.metrics(),
        results=latest,
        facts=_facts(run, model),
        neighbours=_neighbours(run, latest, real),
    )


def _seeds(classes: int | None, points: bool) -> list[int]:
    """The first seeds: ten of each class, or enough to see."""
    if points:
        return list(range(POINTS))
    return list(range(UNLABELLED if classes is None else PER_CLASS * min(classes, MOST_CLASSES)))


def _real(run: Run, screen: Console) -> RealData | None:
    """The training data, where they are at hand; a page without them is still a page."""
    try:
        return RealData.load(run.recipe, run.recipe.settings.evaluation.split or "train")
    except (DataError, ArgumentError) as error:
        screen.say(f"note: the page shows no training data: {error}")
        return None


def film(model: Model) -> list[tuple[str, Tensor]]:
    """A few samples on their way: states at times spread over the run, noise first."""
    classes = model.sampler.facts.num_classes
    rows = min(FILM_ROWS, classes or FILM_ROWS)
    return model.sampler.film(list(range(rows)), FILM_FRAMES)


def _latest(run: Run) -> list[dict[str, Any]]:
    """The newest result of every metric; those of the newest evaluation first."""
    newest: dict[str, dict[str, Any]] = {}
    for record in run.evaluations():
        newest[record["name"]] = record
    return sorted(newest.values(), key=lambda record: record.get("at", ""), reverse=True)


def _facts(run: Run, model: Model) -> dict[str, Any]:
    log = run.metrics()
    facts = model.sampler.facts
    speeds = sorted(line["images_per_second"] for line in log if math.isfinite(line.get("images_per_second", math.nan)))
    return {
        "parameters": sum(p.numel() for p in model.sampler.model.parameters()),
        "steps": model.step,
        "seconds": log[-1]["seconds"] if log else None,
        "images_per_second": speeds[len(speeds) // 2] if speeds else None,
        "dataset": facts.data,
        "n": facts.n,
    }


def _neighbours(run: Run, results: list[dict[str, Any]], real: RealData | None) -> Neighbours | None:
    """The samples nearest to a training image, from the newest evaluation that looked for them."""
    record = next((r for r in results if r["name"] == "nearest"), None)
    if record is None or real is None or record["protocol"]["reference_fingerprint"] != real.fingerprint:
        return None
    folder = run.folder / record["samples"]
    if not (folder / "samples.npz").is_file():
        return None
    extra = record["extra"]
    x, _, _ = read_samples(folder)
    return Neighbours(
        samples=x[extra["closest_samples"]],
        nearest=real.x[extra["closest_training"]],
        distances=torch.tensor(extra["closest_distances"], dtype=torch.float32),
        references={"median, samples": extra["median"], "median, held-out": extra["held_out_median"]},
    )


def commands(run: Run) -> list[str]:
    """The commands that make this run, its figures and this page again."""
    folder = str(run.folder)
    return [
        shlex.join(["undiffuse", "train", *recipe_arguments(run.recipe, folder), "--run", folder]),
        shlex.join(["undiffuse", "evaluate", folder]),
        shlex.join(["undiffuse", "report", folder]),
    ]


def recipe_arguments(recipe: Recipe, folder: str) -> list[str]:
    """The library's recipe and the values that differ from it; or the recipe file of the run itself."""
    own = [f"{folder}/recipe.yaml"]
    if recipe.name not in recipe_files():
        return own
    try:
        base = flatten(load_recipe(recipe.name).to_dict())
    except RecipeError:
        return own
    ours = {key: value for key, value in flatten(recipe.to_dict()).items() if not key.startswith("facts")}
    filled = {f"model.net.{key}" for key in ("shape", "num_classes", "cond_dim")}
    changed = {key: value for key, value in ours.items() if base.get(key) != value and key not in filled}
    if any(key not in ours for key in base if not key.startswith("facts")):
        return own  # another choice by name: the arguments of the old one cannot be taken away by overrides
    return [recipe.name, *(f"{key}={_scalar(value)}" for key, value in changed.items())]


def _scalar(value: Any) -> str:
    return dump_tree({"v": value}).removeprefix("v:").strip()
