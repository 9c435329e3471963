"""From the names in a recipe to the objects of the other rooms, by their registries and signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch

from undiffuse.core.errors import ArgumentError, RecipeError, choose
from undiffuse.data.load import load
from undiffuse.fields import PREDICTIONS, NetworkDenoiser
from undiffuse.metrics import METRICS
from undiffuse.nets import NETS
from undiffuse.objectives import TIMES, WEIGHTS, Denoising
from undiffuse.paths import PATHS, Path, Tabulated
from undiffuse.recipes.arguments import argument_names, complete
from undiffuse.recipes.schema import FactsSection, Settings
from undiffuse.solvers import GRIDS, SOLVERS, Solver
from undiffuse.training import TrainConfig

T = TypeVar("T")

# Arguments that a network takes from the data.
FROM_DATA = ("shape", "num_classes", "cond_dim")
# What the library passes itself: the splits are named by the sections, the seed of training is the recipe's.
_DATA_OWN = ("split", "progress")
_TRAINING_OWN = ("seed",)


def betas(levels: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tabulated:
    """DDPM's chain with linear step variances (Ho et al. 2020, section 4)."""
    return Tabulated.from_betas(torch.linspace(first, last, levels, dtype=torch.float64))


def sigmas(levels: int = 232, smallest: float = 0.01, largest: float = 50.0) -> Tabulated:
    """NCSN's chain with geometric noise levels (Song and Ermon 2020, technique 2; 232 levels on CIFAR-10)."""
    ends = torch.log(torch.tensor([smallest, largest], dtype=torch.float64))
    return Tabulated.from_sigmas(torch.exp(torch.linspace(float(ends[0]), float(ends[1]), levels).double()))


ALL_PATHS: dict[str, Callable[..., Path]] = {**PATHS, "tabulated-betas": betas, "tabulated-sigmas": sigmas}


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


@cache
def option_keys() -> list[str]:
    """Dotted keys of the sections whose contents other rooms define."""
    return [
        *(f"data.{key}" for key in ["flip", *argument_names(load, _DATA_OWN)]),
        *(f"training.{key}" for key in argument_names(TrainConfig, _TRAINING_OWN)),
    ]


def check(settings: Settings) -> Settings:
    """Settings with every name known, every argument valid and every default written out.

    Raises:
        RecipeError: what is not.
    """
    tree = settings.model_dump()
    data = dict(tree["data"])
    flip = data.pop("flip", False)
    if not isinstance(flip, bool):
        raise RecipeError(f"data.flip = {flip!r}: must be true or false.")
    tree["data"] = {**complete(load, data, "data", left_out=_DATA_OWN), "flip": flip}
    tree["path"] = resolve(ALL_PATHS, tree["path"], "path", "path")
    model = tree["model"]
    model["net"] = resolve(NETS, model["net"], "network", "model.net", later=("shape",))
    known(PREDICTIONS, model["prediction"], "prediction", "model.prediction")
    shared = {"sigma_data": model["sigma_data"]}
    for key, table, what in (("time", TIMES, "time distribution"), ("weight", WEIGHTS, "weight")):
        tree["objective"][key] = resolve(table, tree["objective"][key], what, f"objective.{key}", shared=shared)
    tree["training"] = complete(TrainConfig, tree["training"], "training", left_out=_TRAINING_OWN)
    for name in ("sampling", "evaluation"):
        if tree[name]["solver"] is not None:
            tree[name]["solver"] = resolve(SOLVERS, tree[name]["solver"], "solver", f"{name}.solver")
        if tree[name]["grid"] is not None:
            known(GRIDS, tree[name]["grid"], "grid", f"{name}.grid")
    for name in tree["evaluation"]["metrics"]:
        known(METRICS, name, "metric", "evaluation.metrics")
    checked = Settings.model_validate(tree)
    for make_one in (path, objective, train_config, lambda one: solver(one.sampling.solver)):
        make_one(checked)  # refuses a value out of range
    return checked


def path(settings: Settings) -> Path:
    """The path."""
    return make(ALL_PATHS, settings.path, "path", "path")


def objective(settings: Settings) -> Denoising:
    """The objective."""
    choice = settings.objective
    return Denoising(
        time=make(TIMES, choice.time, "time distribution", "objective.time"),
        weight=make(WEIGHTS, choice.weight, "weight", "objective.weight"),
    )


def train_config(settings: Settings) -> TrainConfig:
    """The numbers of training; its seed is the recipe's."""
    try:
        return TrainConfig(**settings.training, seed=settings.seed)
    except ArgumentError as error:
        raise RecipeError(str(error)) from None


def solver(choice: Mapping[str, Any]) -> Solver:
    """A solver."""
    return make(SOLVERS, choice, "solver", "sampling.solver")


def data(settings: Settings, split: str, progress: Callable[[int, int], None] | None = None) -> Any:
    """A split of the data; without its labels where the model is not conditional."""
    options = {key: value for key, value in settings.data.items() if key != "flip"}
    dataset = load(**options, split=split, progress=progress)
    return dataset if settings.model.conditional else Unlabelled(dataset)


def facts(dataset: Any) -> FactsSection:
    """What a data set says of itself."""
    return FactsSection(
        shape=list(dataset.shape),
        num_classes=dataset.num_classes,
        cond_dim=dataset.cond_dim,
        class_names=dataset.class_names,
        image=dataset.is_image,
        data=dataset.name,
        n=len(dataset) if hasattr(dataset, "batch") else None,
        fingerprint=dataset.fingerprint,
    )


def net_arguments(settings: Settings, said: FactsSection) -> dict[str, Any]:
    """The network's choice with what the data say filled in where the recipe leaves it open.

    Raises:
        RecipeError: the recipe states another shape, or fewer classes, than the data have.
    """
    choice = dict(settings.model.net)
    names = argument_names(known(NETS, choice["name"], "network", "model.net"))
    for key in (key for key in FROM_DATA if key in names):
        theirs = getattr(said, key)
        if choice.get(key) is None:
            choice[key] = theirs
        elif choice[key] != theirs and not (key == "num_classes" and theirs is not None and choice[key] > theirs):
            raise RecipeError(
                f"model.net.{key} = {choice[key]}: the data '{said.data}' have {theirs}; leave it out to take theirs."
            )
    return choice


def model(settings: Settings) -> NetworkDenoiser:
    """The untrained model of settings whose network is filled in. Initial weights: torch's generator."""
    return NetworkDenoiser(
        make(NETS, settings.model.net, "network", "model.net"),
        path(settings),
        prediction=settings.model.prediction,
        sigma_data=settings.model.sigma_data,
    )


class Unlabelled:
    """A data set without its labels."""

    num_classes = None
    cond_dim = None
    class_names = None

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._dataset, name)
        if name == "batch":
            return lambda indices: (value(indices)[0], None)
        if name == "batches":
            return lambda *args, **options: ((x, None) for x, _ in value(*args, **options))
        return value

    def __len__(self) -> int:
        return len(self._dataset)
