"""From the names in a recipe to the objects of the other rooms, by their registries and signatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from undiffuse.core.errors import ArgumentError, RecipeError
from undiffuse.core.memory import GIB, free_memory
from undiffuse.fields import PREDICTIONS, NetworkClassifier, NetworkDenoiser
from undiffuse.fields.energy import NetworkEnergy
from undiffuse.metrics import METRICS
from undiffuse.nets import CLASSIFIER_NETS, DENOISING_NETS, ENERGY_NETS, NETS
from undiffuse.objectives import TIMES, WEIGHTS, Denoising
from undiffuse.oracles import Empirical
from undiffuse.recipes import classifiers, datasets, energies
from undiffuse.recipes.arguments import argument_names, complete
from undiffuse.recipes.correctors import check_correctors
from undiffuse.recipes.paths import check_path, path
from undiffuse.recipes.schema import FactsSection, ObjectiveSection, Settings
from undiffuse.recipes.tables import known, make, resolve
from undiffuse.recipes.thresholds import check_thresholds
from undiffuse.recipes.tuned import TABLE as ALL_SOLVERS
from undiffuse.solvers import GRIDS, SOLVERS, Solver
from undiffuse.training import TrainConfig

# Arguments that a network takes from the data, and what those call them.
FROM_DATA = {"shape": "shape", "num_classes": "num_classes", "cond_dim": "cond_dim", "classes": "num_classes"}
# What the library passes itself: the seed of training is the recipe's.
_TRAINING_OWN = ("seed",)
# Options that came when there were runs already. Where they are as by default they stay unwritten, so that those runs
# can be resumed; a default of these may not change.
_CAME_LATER = {
    "unet": {
        "up_attention",
        "heads",
        "late_condition",
        "noise_offset",
        "noise_frequencies",
        "resample_filter",
        "progressive_input",
        "combine",
        "progressive_output",
        "input_fourier",
        "norm_groups",
        "norm_eps",
        "initial",
    }
}
_USUAL = 'set objective.target to "conditional"'


@cache
def option_keys() -> list[str]:
    """Dotted keys of the sections whose contents other rooms define."""
    return [
        *(f"data.{key}" for key in datasets.data_keys()),
        *(f"training.{key}" for key in argument_names(TrainConfig, _TRAINING_OWN)),
    ]


def check(settings: Settings) -> Settings:
    """Settings with every name known, every argument valid and every default written out.

    Raises:
        RecipeError: what is not.
    """
    tree = settings.model_dump()
    tree["data"] = datasets.check_data(tree["data"])
    kind = KINDS[settings.kind]
    net = resolve(kind.nets, tree["model"]["net"], "network", "model.net", later=("shape", "classes"))
    tree["model"]["net"] = _written(net)
    tree["training"] = complete(TrainConfig, tree["training"], "training", left_out=_TRAINING_OWN)
    kind.check(tree, settings)
    for name in tree["evaluation"]["metrics"]:
        _check_metric(name, settings.kind)
    checked = Settings.model_validate(tree)
    for make_one in (objective, train_config, *kind.parts):
        make_one(checked)  # refuses a value out of range
    return checked


def _check_metric(name: str, kind: str) -> None:
    """Refuse a metric that is unknown, or of what other kinds of models give."""
    ours = KINDS[kind].metrics
    others = [one for one, parts in KINDS.items() if name in parts.metrics]
    if name not in ours and others:
        raise RecipeError(
            f"evaluation.metrics: unknown metric '{name}' where model.kind is {kind}: it is of kind "
            f"{' or '.join(others)}. Known: {', '.join(ours)}."
        )
    known(ours, name, "metric", "evaluation.metrics")


def _written(net: dict[str, Any]) -> dict[str, Any]:
    """A network's choice without what came later and is as by default."""
    later = _CAME_LATER.get(net["name"], set())
    usual = complete(NETS[net["name"]], {}, "", later=("shape",)) if later else {}
    return {key: value for key, value in net.items() if key not in later or value != usual[key]}


def _check_denoiser(tree: dict[str, Any], settings: Settings) -> None:
    """The sections of a denoiser's recipe, resolved in place."""
    model = tree["model"]
    if "name" in tree["objective"]:
        raise RecipeError(
            f"objective.name = {tree['objective']['name']!r}: a denoiser is trained by denoising (objective.time, "
            f"objective.weight). For an energy, set model.kind to energy; its objectives: "
            f"{', '.join(energies.OBJECTIVES)}. For a classifier, to classifier; its objective: "
            f"{', '.join(classifiers.OBJECTIVES)}"
        )
    changed = next((key for key in datasets.CHANGES if tree["data"].get(key)), None)
    if tree["objective"].get("target") == "marginal" and changed:
        raise RecipeError(
            f"objective.target = 'marginal' with data.{changed}: such images are not in the data; {_USUAL}"
        )
    if tree["sampling"].get("initial") is not None:
        raise RecipeError("sampling.initial: samples of a denoiser start from the path's own law; leave it out")
    check_path(tree)
    known(PREDICTIONS, model["prediction"], "prediction", "model.prediction")
    if model["net"].get("input_fourier") and model["prediction"] != "noise-unscaled":
        raise RecipeError(
            f"model.net.input_fourier with model.prediction = {model['prediction']!r}: it takes the noise label for "
            "log(sigma / alpha), as 'noise-unscaled' gives it"
        )
    shared = {"sigma_data": model["sigma_data"]}
    for key, table, what in (("time", TIMES, "time distribution"), ("weight", WEIGHTS, "weight")):
        tree["objective"][key] = resolve(table, tree["objective"][key], what, f"objective.{key}", shared=shared)
    for name in ("sampling", "evaluation"):
        if tree[name]["solver"] is not None:
            tree[name]["solver"] = resolve(SOLVERS, tree[name]["solver"], "solver", f"{name}.solver")
        if tree[name]["grid"] is not None:
            known(GRIDS, tree[name]["grid"], "grid", f"{name}.grid")
    check_correctors(tree)
    check_thresholds(tree)


def objective(settings: Settings, dataset: Any = None) -> Any:
    """The objective; where it aims at means of the training data, only if they are given."""
    return KINDS[settings.kind].objective(settings, dataset)


def _denoising(settings: Settings, dataset: Any) -> Denoising:
    choice = settings.objective
    assert isinstance(choice, ObjectiveSection)
    marginal = choice.target == "marginal" and dataset is not None
    return Denoising(
        time=make(TIMES, choice.time, "time distribution", "objective.time"),
        weight=make(WEIGHTS, choice.weight, "weight", "objective.weight"),
        target=_law(settings, dataset).denoiser(path(settings)) if marginal else None,
    )


def _law(settings: Settings, dataset: Any) -> Empirical:
    """The training data as a law.

    Raises:
        RecipeError: they are not all there at once, or do not fit into memory.
    """
    if dataset.cond_dim is not None or not hasattr(dataset, "batch"):
        raise RecipeError(f"objective.target = 'marginal' takes data that are no stream, with labels or none; {_USUAL}")
    needed, free = 2 * 4 * len(dataset) * math.prod(dataset.shape), free_memory()
    if needed > free:
        raise RecipeError(
            f"objective.target = 'marginal' keeps the data in memory: {needed / GIB:.3g} GiB, of which "
            f"{free / GIB:.3g} are free; {_USUAL}"
        )
    x, labels = dataset.batch(torch.arange(len(dataset)))
    return Empirical(x, labels=labels)


def train_config(settings: Settings) -> TrainConfig:
    """The numbers of training; its seed is the recipe's."""
    try:
        return TrainConfig(**settings.training, seed=settings.seed)
    except ArgumentError as error:
        raise RecipeError(str(error)) from None


def solver(choice: Mapping[str, Any]) -> Solver:
    """A solver."""
    return make(ALL_SOLVERS, choice, "solver", "sampling.solver")


def resolve_solver(settings: Settings, choice: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A choice of solver (for an energy, of kernel), checked, every default written out."""
    if settings.kind == "energy":
        return energies.resolve_deep(energies.KERNELS, dict(choice), "kernel", where)
    return resolve(ALL_SOLVERS, choice, "solver", where)


def net_arguments(settings: Settings, said: FactsSection) -> dict[str, Any]:
    """The network's choice with what the data say filled in where the recipe leaves it open.

    Raises:
        RecipeError: the recipe states another shape, or fewer classes, than the data have.
    """
    choice = dict(settings.model.net)
    names = argument_names(known(NETS, choice["name"], "network", "model.net"))
    if "classes" in names and said.num_classes is None:
        raise RecipeError(f"model.kind = 'classifier': the data '{said.data}' have no classes to be told apart")
    for key in (key for key in FROM_DATA if key in names):
        theirs = getattr(said, FROM_DATA[key])
        if choice.get(key) is None:
            choice[key] = theirs
        elif choice[key] != theirs and not (key == "num_classes" and theirs is not None and choice[key] > theirs):
            raise RecipeError(
                f"model.net.{key} = {choice[key]}: the data '{said.data}' have {theirs}; leave it out to take theirs."
            )
    return choice


def model(settings: Settings) -> NetworkDenoiser | NetworkEnergy | NetworkClassifier:
    """The untrained model of settings whose network is filled in. Initial weights: torch's generator."""
    return KINDS[settings.kind].model(make(NETS, settings.model.net, "network", "model.net"), settings)


def _denoiser(net: nn.Module, settings: Settings) -> NetworkDenoiser:
    section: Any = settings.model
    return NetworkDenoiser(net, path(settings), prediction=section.prediction, sigma_data=section.sigma_data)


def _energy(net: nn.Module, settings: Settings) -> NetworkEnergy:
    section: Any = settings.model
    return NetworkEnergy(net, prior_std=section.prior_std)


@dataclass(frozen=True)
class Kind:
    """What differs between recipes by what they train.

    Args:
        nets: which networks there are.
        metrics: what is measured of it.
        check: resolves the sections of its own in place, and refuses those that mean nothing to it.
        objective: of settings and, where there are some, the training data.
        model: of the network and settings.
        parts: makes what else could refuse a value.
    """

    nets: Mapping[str, Callable[..., nn.Module]]
    metrics: Mapping[str, Any]
    check: Callable[[dict[str, Any], Settings], None]
    objective: Callable[[Settings, Any], Any]
    model: Callable[[nn.Module, Settings], Any]
    parts: tuple[Callable[[Settings], Any], ...]


KINDS = {
    "denoiser": Kind(
        nets=DENOISING_NETS,
        metrics=METRICS,
        check=_check_denoiser,
        objective=_denoising,
        model=_denoiser,
        parts=(path, lambda settings: solver(settings.sampling.solver)),
    ),
    "energy": Kind(
        nets=ENERGY_NETS,
        metrics=METRICS,
        check=energies.check_energy,
        objective=lambda settings, _: energies.objective(settings),
        model=_energy,
        parts=(
            lambda settings: energies.kernel(settings.sampling.solver),
            lambda settings: energies.initial(settings.sampling.initial or {}),
        ),
    ),
    "classifier": Kind(
        nets=CLASSIFIER_NETS,
        metrics=classifiers.METRICS,
        check=classifiers.check_classifier,
        objective=lambda settings, _: classifiers.objective(settings),
        model=lambda net, settings: NetworkClassifier(net, path(settings)),
        parts=(path,),
    ),
}
