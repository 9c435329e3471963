"""What a recipe of a classifier of noisy data is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from undiffuse.core.errors import RecipeError
from undiffuse.objectives import TIMES
from undiffuse.objectives.classification import NoisyClassification
from undiffuse.recipes.paths import check_path
from undiffuse.recipes.schema import SamplingSection, Settings
from undiffuse.recipes.tables import known, make, resolve

OBJECTIVES: dict[str, Callable] = {"noisy-classification": NoisyClassification}
# What `evaluate` measures: both, unless told.
METRICS = {
    "cross-entropy": "-log p(c | x_t) of held-out data at the times of training, nats",
    "accuracy": "share of them whose likeliest class is theirs, by noise level",
}
# Keys of `sampling` that mean something where no samples are drawn: which weights, and how many rows at a time.
_OF_SAMPLING = ("ema", "batch")


def check_classifier(tree: dict[str, Any], settings: Settings) -> None:
    """The sections of a classifier's recipe, resolved in place.

    Args:
        tree: a recipe whose `model` is a classifier.
        settings: the same, which know the keys that the recipe writes itself.

    Raises:
        RecipeError: no path, another objective, or what only sampling has a use for.
    """
    check_path(tree)
    choice = tree["objective"]
    if "name" not in choice:
        raise RecipeError(
            f"objective: a classifier is not trained by denoising; give objective.name, one of {', '.join(OBJECTIVES)}"
        )
    known(OBJECTIVES, choice["name"], "objective", "objective.name")
    choice.setdefault("time", "uniform")
    choice["time"] = resolve(TIMES, _named(choice["time"]), "time distribution", "objective.time")
    stray = sorted(choice.keys() - {"name", "time"})
    if stray:
        raise RecipeError(f"unknown key 'objective.{stray[0]}'. Known in 'objective': name, time.")
    _refuse_sampling(tree)
    if "metrics" not in settings.evaluation.model_fields_set:
        tree["evaluation"]["metrics"] = list(METRICS)


def _named(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise RecipeError(f"objective.time = {value}: must be a name, or a mapping of 'name' and its arguments")
    return value


def _refuse_sampling(tree: dict[str, Any]) -> None:
    """What a classifier has no use for, where it is not as by default."""
    usual = SamplingSection().model_dump()
    asked = {key: value for key, value in tree["sampling"].items() if key not in _OF_SAMPLING}
    given = [f"sampling.{key}" for key, value in asked.items() if value != usual.get(key)]
    ours = ("solver", "steps", "grid", "corrector", "denoise", "threshold")
    given += [f"evaluation.{key}" for key in ours if tree["evaluation"].get(key)]
    given += ["training.sample_every"] if tree["training"]["sample_every"] is not None else []
    if given:
        raise RecipeError(f"{given[0]}: a classifier draws no samples; leave it out")
    if tree["training"]["cond_dropout"]:
        raise RecipeError("training.cond_dropout: the classes are what a classifier learns; leave it out")


def objective(settings: Settings) -> NoisyClassification:
    """The objective of a classifier."""
    choice: Any = settings.objective
    return NoisyClassification(make(TIMES, choice["time"], "time distribution", "objective.time"))
