"""From the names in a recipe to the objects of the other rooms, by their registries and signatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch

from undiffuse.core.errors import ArgumentError, RecipeError
from undiffuse.core.memory import GIB, free_memory
from undiffuse.data.load import load
from undiffuse.fields import PREDICTIONS, NetworkDenoiser
from undiffuse.fields.energy import NetworkEnergy
from undiffuse.inference import dequantise
from undiffuse.metrics import METRICS
from undiffuse.nets import DENOISING_NETS, ENERGY_NETS, NETS
from undiffuse.objectives import TIMES, WEIGHTS, Denoising
from undiffuse.oracles import Empirical
from undiffuse.paths import PATHS, Path, Tabulated, geometric_levels
from undiffuse.recipes import energies
from undiffuse.recipes.arguments import argument_names, complete
from undiffuse.recipes.correctors import check_correctors
from undiffuse.recipes.schema import EnergySection, FactsSection, ObjectiveSection, Settings
from undiffuse.recipes.tables import known, make, resolve
from undiffuse.solvers import GRIDS, SOLVERS, Solver
from undiffuse.training import TrainConfig

# Arguments that a network takes from the data.
FROM_DATA = ("shape", "num_classes", "cond_dim")
# What the library passes itself: the splits are named by the sections, the seed of training is the recipe's.
_DATA_OWN = ("split", "progress")
# Keys of the data that say how they are trained on, not which they are.
_DATA_HERE = ("flip", "dequantise")
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


def betas(levels: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tabulated:
    """DDPM's chain with linear step variances (Ho et al. 2020, section 4)."""
    return Tabulated.from_betas(torch.linspace(first, last, levels, dtype=torch.float64))


def sigmas(levels: int = 232, smallest: float = 0.01, largest: float = 50.0) -> Tabulated:
    """NCSN's chain with geometric noise levels (Song and Ermon 2020, technique 2; 232 levels on CIFAR-10)."""
    return Tabulated.from_sigmas(geometric_levels(smallest, largest, levels))


def cosine_betas(levels: int = 1000, most: float = 0.999) -> Tabulated:
    """The cosine chain, its step variances cut at `most` (Nichol and Dhariwal 2021, eq. 17 and after)."""
    grid = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    signal = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
    return Tabulated.from_betas((1 - signal[1:] / signal[:-1]).clamp(max=most))


ALL_PATHS: dict[str, Callable[..., Path]] = {
    **PATHS,
    "tabulated-betas": betas,
    "tabulated-cosine": cosine_betas,
    "tabulated-sigmas": sigmas,
}


@cache
def option_keys() -> list[str]:
    """Dotted keys of the sections whose contents other rooms define."""
    return [
        *(f"data.{key}" for key in [*_DATA_HERE, *argument_names(load, _DATA_OWN)]),
        *(f"training.{key}" for key in argument_names(TrainConfig, _TRAINING_OWN)),
    ]


def check(settings: Settings) -> Settings:
    """Settings with every name known, every argument valid and every default written out.

    Raises:
        RecipeError: what is not.
    """
    tree = settings.model_dump()
    data = dict(tree["data"])
    flip, dequantise = data.pop("flip", False), data.pop("dequantise", None)
    if not isinstance(flip, bool):
        raise RecipeError(f"data.flip = {flip!r}: must be true or false.")
    tree["data"] = {**complete(load, data, "data", left_out=_DATA_OWN), "flip": flip}
    if dequantise is not None:  # unwritten where there is none: it came when there were runs already
        if type(dequantise) is not int or dequantise < 2:
            raise RecipeError(
                f"data.dequantise = {dequantise!r}: must be the number of values per pixel, 256 for bytes."
            )
        tree["data"]["dequantise"] = dequantise
    nets = ENERGY_NETS if energies.is_energy(settings) else DENOISING_NETS
    tree["model"]["net"] = _written(resolve(nets, tree["model"]["net"], "network", "model.net", later=("shape",)))
    tree["training"] = complete(TrainConfig, tree["training"], "training", left_out=_TRAINING_OWN)
    for name in tree["evaluation"]["metrics"]:
        known(METRICS, name, "metric", "evaluation.metrics")
    if energies.is_energy(settings):
        tree = energies.check_energy(tree, settings.sampling.model_fields_set)
    else:
        _check_denoiser(tree)
    checked = Settings.model_validate(tree)
    for make_one in (objective, train_config):
        make_one(checked)  # refuses a value out of range
    if energies.is_energy(checked):
        energies.kernel(checked.sampling.solver)
        energies.initial(checked.sampling.initial or {})
    else:
        path(checked)
        solver(checked.sampling.solver)
    return checked


def _written(net: dict[str, Any]) -> dict[str, Any]:
    """A network's choice without what came later and is as by default."""
    later = _CAME_LATER.get(net["name"], set())
    usual = complete(NETS[net["name"]], {}, "", later=("shape",)) if later else {}
    return {key: value for key, value in net.items() if key not in later or value != usual[key]}


def _check_denoiser(tree: dict[str, Any]) -> None:
    """The sections of a denoiser's recipe, resolved in place."""
    model = tree["model"]
    if tree["path"] is None:
        raise RecipeError("'path' is required but not given.")
    if "name" in tree["objective"]:
        raise RecipeError(
            f"objective.name = {tree['objective']['name']!r}: a denoiser is trained by denoising (objective.time, "
            f"objective.weight). For an energy, set model.kind to energy; its objectives: "
            f"{', '.join(energies.OBJECTIVES)}"
        )
    changed = next((key for key in _DATA_HERE if tree["data"].get(key)), None)
    if tree["objective"].get("target") == "marginal" and changed:
        raise RecipeError(
            f"objective.target = 'marginal' with data.{changed}: such images are not in the data; {_USUAL}"
        )
    if tree["sampling"].get("initial") is not None:
        raise RecipeError("sampling.initial: samples of a denoiser start from the path's own law; leave it out")
    tree["path"] = resolve(ALL_PATHS, tree["path"], "path", "path")
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


def path(settings: Settings) -> Path:
    """The path.

    Raises:
        RecipeError: an energy has none.
    """
    if settings.path is None:
        raise RecipeError(f"recipe '{settings.name}' trains an energy, which has no path")
    return make(ALL_PATHS, settings.path, "path", "path")


def objective(settings: Settings, dataset: Any = None) -> Any:
    """The objective; where it aims at means of the training data, only if they are given."""
    choice = settings.objective
    if not isinstance(choice, ObjectiveSection):
        return energies.objective(settings)
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
    return make(SOLVERS, choice, "solver", "sampling.solver")


def resolve_solver(settings: Settings, choice: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A choice of solver (for an energy, of kernel), checked, every default written out."""
    if energies.is_energy(settings):
        return energies.resolve_deep(energies.KERNELS, dict(choice), "kernel", where)
    return resolve(SOLVERS, choice, "solver", where)


def data(settings: Settings, split: str, progress: Callable[[int, int], None] | None = None) -> Any:
    """A split of the data; without its labels where the model is not conditional."""
    options = {key: value for key, value in settings.data.items() if key not in _DATA_HERE}
    dataset = load(**options, split=split, progress=progress)
    return dataset if settings.model.conditional else Unlabelled(dataset)


def dequantiser(settings: Settings) -> Callable[..., Any] | None:
    """What makes values densities while they are trained on (`data.dequantise`); None: they stay as they are."""
    levels = settings.data.get("dequantise")
    return None if levels is None else partial(dequantise, levels=levels)


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


def model(settings: Settings) -> NetworkDenoiser | NetworkEnergy:
    """The untrained model of settings whose network is filled in. Initial weights: torch's generator."""
    section = settings.model
    net = make(NETS, section.net, "network", "model.net")
    if isinstance(section, EnergySection):
        return NetworkEnergy(net, prior_std=section.prior_std)
    return NetworkDenoiser(net, path(settings), prediction=section.prediction, sigma_data=section.sigma_data)


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
