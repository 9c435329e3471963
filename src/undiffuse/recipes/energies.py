"""What a recipe of an energy is made of: objectives, kernels, where chains start, noise of a known law."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from undiffuse.core.errors import RecipeError
from undiffuse.objectives.contrastive import ContrastiveDivergence, Stop
from undiffuse.objectives.noise_contrastive import NoiseContrastive
from undiffuse.objectives.score_matching import (
    DenoisingScoreMatching,
    FiniteDifferenceSliced,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)
from undiffuse.objectives.starts import INITIAL, STARTS, FromNoise
from undiffuse.oracles.gaussian import Gaussian
from undiffuse.recipes.arguments import argument_names, complete, unknown_key
from undiffuse.recipes.correctors import refuse_correctors
from undiffuse.recipes.schema import FactsSection, Settings
from undiffuse.recipes.tables import known, make
from undiffuse.recipes.thresholds import refuse_thresholds
from undiffuse.solvers import KERNELS, Kernel
from undiffuse.solvers.tempering import ParallelTempering

Choice = dict[str, Any]
Table = Mapping[str, Callable]


def gaussian_noise(shape: Sequence[int], std: float = 1.0) -> Gaussian:
    """`N(0, std^2)` in every coordinate of an event."""
    return Gaussian(torch.zeros(*shape), std)


EXACT_KERNELS: dict[str, Callable[..., Kernel]] = {name: KERNELS[name] for name in ("mala", "hmc")}
OBJECTIVES: dict[str, Callable] = {
    "contrastive-divergence": ContrastiveDivergence,
    "noise-contrastive": NoiseContrastive,
    "implicit-score-matching": ImplicitScoreMatching,
    "sliced-score-matching": SlicedScoreMatching,
    "finite-difference-score-matching": FiniteDifferenceSliced,
    "denoising-score-matching": DenoisingScoreMatching,
}
NOISES: dict[str, Callable] = {"gaussian": gaussian_noise}
INITIALS: dict[str, Callable] = dict.fromkeys(INITIAL, FromNoise)

# Arguments that are choices themselves: of which table, what the message calls them, and which one where none is given
# (None: it must be).
PARTS: dict[Callable, dict[str, tuple[Table, str, str | None]]] = {
    ContrastiveDivergence: {
        "kernel": (KERNELS, "kernel", None),
        "start": (STARTS, "start", "data"),
        "stop": ({"divergence": Stop}, "rule", "divergence"),
    },
    NoiseContrastive: {"noise": (NOISES, "noise law", "gaussian")},
    ParallelTempering: {"kernel": (EXACT_KERNELS, "kernel", None)},
}
# Arguments that the data say.
_FROM_DATA = ("shape", "labelled")


def resolve_deep(table: Table, choice: Any, what: str, where: str) -> Choice:
    """A choice whose arguments may be choices, all names and arguments checked and every default written out.

    Raises:
        RecipeError: an unknown name or argument (the nearest is offered), a missing one, or one of the wrong type.
    """
    choice = _as_choice(choice, table, where)
    factory = known(table, choice["name"], what, where)
    parts = PARTS.get(factory, {})
    given = {key: value for key, value in choice.items() if key != "name" and key not in parts}
    told = [key for key in _FROM_DATA if key in inspect.signature(factory).parameters]
    names = [*argument_names(factory, (*parts, *told)), *parts]
    for key in given:
        if key not in names:
            raise RecipeError(unknown_key(f"{where}.{key}", [f"{where}.{name}" for name in names]))
    plain = complete(factory, given, where, left_out=(*parts, *told))
    for key, (inner, called, usual) in parts.items():
        part = usual if choice.get(key) is None else choice[key]
        if part is None:
            raise RecipeError(f"'{where}.{key}' is required but not given: one of {', '.join(sorted(inner))}")
        plain[key] = resolve_deep(inner, part, called, f"{where}.{key}")
    return {"name": choice["name"], **plain}


def _as_choice(value: Any, table: Table, where: str) -> Choice:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and "name" not in value and len(table) == 1:
        return {"name": next(iter(table)), **value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise RecipeError(f"{where} = {value}: must be a name, or a mapping of 'name' and its arguments")
    return value


def make_deep(table: Table, choice: Choice, what: str, where: str, said: FactsSection | None = None) -> Any:
    """The object that a resolved choice stands for; `said` gives what the data say."""
    factory = known(table, choice["name"], what, where)
    parts, names = PARTS.get(factory, {}), inspect.signature(factory).parameters
    built = {
        key: make_deep(inner, choice[key], called, f"{where}.{key}", said) for key, (inner, called, _) in parts.items()
    }
    told: Choice = {}
    if "shape" in names:
        told["shape"] = said.shape if said is not None else [1]
    if "labelled" in names:
        told["labelled"] = said is not None and said.num_classes is not None
    return make(table, {**choice, **told, **built}, what, where)


# ---------------------------------------------------------------- the sections


def check_energy(tree: Choice, settings: Settings) -> None:
    """The sections of an energy's recipe, resolved in place.

    Args:
        tree: a recipe whose `model` is an energy.
        settings: the same, which know the keys that the recipe writes itself.

    Raises:
        RecipeError: a path, a grid, a corrector, an objective that trains denoisers; see `resolve_deep`.
    """
    if tree["path"] is not None:
        raise RecipeError(
            "path: an energy has none (it is a density of the data, at no noise level); leave it out, "
            "or write `path: null` where the recipe that this one extends has one"
        )
    if "name" not in tree["objective"]:
        raise RecipeError(
            f"objective: an energy is not trained by denoising along a path; give objective.name, one of "
            f"{', '.join(OBJECTIVES)}"
        )
    objective = tree["objective"] = resolve_deep(OBJECTIVES, tree["objective"], "objective", "objective")
    refuse_correctors(tree)
    refuse_thresholds(tree)
    sampling = tree["sampling"]
    if "solver" not in settings.sampling.model_fields_set:
        if objective.get("kernel") is None:
            raise RecipeError(
                f"'sampling.solver' is required with objective '{objective['name']}': one of {', '.join(KERNELS)}"
            )
        sampling["solver"] = objective["kernel"]
    if sampling.get("initial") is None:
        sampling["initial"] = _initial_of(tree)
    sampling["initial"] = resolve_initial(sampling["initial"])
    for name in ("sampling", "evaluation"):
        if tree[name]["grid"] is not None:
            raise RecipeError(f"{name}.grid: chains of an energy have no grid of times; leave it out")
        if tree[name]["solver"] is not None:
            tree[name]["solver"] = resolve_deep(KERNELS, tree[name]["solver"], "kernel", f"{name}.solver")


def _initial_of(tree: Choice) -> Choice:
    """Where nothing is said, sampling starts where training does; else from a normal law as wide as the prior."""
    start = tree["objective"].get("start") or {}
    if "initial" in start:
        return {"name": start["initial"], "scale": start["scale"]}
    return {"name": "normal", "scale": tree["model"]["prior_std"] or 1.0}


def resolve_initial(choice: Choice) -> Choice:
    """A law of starting states, checked: its name and `scale`."""
    known(INITIALS, choice["name"], "initial law", "sampling.initial")
    given = {key: value for key, value in choice.items() if key != "name"}
    return {"name": choice["name"], **complete(FromNoise, given, "sampling.initial", left_out=("initial",))}


def initial(choice: Choice) -> FromNoise:
    """A law of starting states."""
    rest = {key: value for key, value in choice.items() if key != "name"}
    return make({"noise": FromNoise}, {"name": "noise", "initial": choice["name"], **rest}, "law", "sampling.initial")


def kernel(choice: Choice) -> Kernel:
    """A Markov kernel."""
    return make_deep(KERNELS, choice, "kernel", "sampling.solver")


def objective(settings: Settings) -> Any:
    """The objective of an energy; sizes that the data say are those of `facts`, or 1 where there are none yet."""
    choice = settings.objective
    assert isinstance(choice, dict)
    return make_deep(OBJECTIVES, choice, "objective", "objective", settings.facts)
