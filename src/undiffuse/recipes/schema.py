"""The sections of a recipe: what may be written in them, and in which range.

This module knows no other room. What other rooms own (the options of a data source, the names of networks and solvers
and their arguments, the numbers of training) is held here as a mapping and checked by `undiffuse.recipes.build`
against their signatures, so that no list of them is kept twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_serializer,
)

from undiffuse.core.errors import RecipeError
from undiffuse.recipes.arguments import explain, unknown_key


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _has_name(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("name"), str):
        raise ValueError(f"must be a name, or a mapping of 'name' and its arguments; it is {value}")
    return value


Choice = Annotated[dict[str, Any], BeforeValidator(_named), AfterValidator(_has_name)]
"""A name, or a mapping of `name` and the arguments that belong to it."""

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _choice(name: str) -> Any:
    return Field(default_factory=lambda: {"name": name})


class Section(BaseModel):
    """Unknown keys are refused, nothing is coerced, nothing is infinite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """A denoiser: the network and what its output means (a name in `undiffuse.predictions`).

    `conditional: false` trains without the labels that the data have.
    """

    net: Choice
    prediction: str = "noise"
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    conditional: bool = True


class EnergySection(Section):
    """An energy, `kind: energy`: the network, and the standard deviation of the Gaussian that confines it, if any."""

    kind: Literal["energy"]
    net: Choice
    prior_std: Annotated[float, Field(gt=0)] | None = None
    conditional: bool = False


class ClassifierSection(Section):
    """A classifier of noisy data, `kind: classifier`: the network. It always takes the labels: it learns them."""

    conditional: ClassVar[bool] = True

    kind: Literal["classifier"]
    net: Choice


class ObjectiveSection(Section):
    """Denoising: where training looks (`time`), how much it cares (`weight`), and at what it aims (`target`).

    "conditional": the image that was noised. "marginal": the mean of all training images of its class that it may
    have been, which asks for them in memory and costs a product of the batch with them at each step.
    """

    time: Choice = _choice("uniform")
    weight: Choice = _choice("simple")
    target: Literal["conditional", "marginal"] = "conditional"

    @model_serializer(mode="wrap")
    def _without_usual(self, write: Any) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if (key, value) != ("target", "conditional")}


# Sections of which there are several kinds: how their values tell which.
KINDS: dict[str, type[Section]] = {
    "denoiser": ModelSection,
    "energy": EnergySection,
    "classifier": ClassifierSection,
}
DENOISING = "denoising"


def _kind(value: Any) -> str:
    if isinstance(value, BaseModel):
        return getattr(value, "kind", "denoiser")
    return value.get("kind", "denoiser") if isinstance(value, dict) else "denoiser"


def _objective_kind(value: Any) -> str:
    plain = isinstance(value, ObjectiveSection) or (isinstance(value, dict) and "name" not in value)
    return DENOISING if plain else "named"


def _without(key: str, default: str) -> BeforeValidator:
    """What is chosen where nothing is said may also be said; it is not written out."""

    def drop(value: Any) -> Any:
        if isinstance(value, dict) and value.get(key) == default:
            return {name: item for name, item in value.items() if name != key}
        return value

    return BeforeValidator(drop)


Model = Annotated[
    Annotated[ModelSection, _without("kind", "denoiser"), Tag("denoiser")]
    | Annotated[EnergySection, Tag("energy")]
    | Annotated[ClassifierSection, Tag("classifier")],
    Discriminator(_kind, custom_error_type="kind", custom_error_message=f"one of {', '.join(KINDS)} in 'model.kind'"),
]
Objective = Annotated[
    Annotated[ObjectiveSection, Tag(DENOISING)] | Annotated[Choice, Tag("named")],
    Discriminator(_objective_kind),
    _without("name", DENOISING),
]


_SAID_IF_ANY = ("initial", "corrector", "denoise", "threshold")


class SamplingSection(Section):
    """How samples are drawn from a run, unless the caller says otherwise.

    `n` samples are drawn on training's schedule, `batch` at a time. `ema` names an average of the weights
    ("half-life-500", "power-0.05", or "none"); null is the first that training keeps. `precision` "bf16" runs the
    network's large products so; the solver keeps fp32. `corrector` takes its steps after each of the solver's, and
    `denoise` ends a path that stops in noise, as VE does, with `E[x_0 | x]`. `threshold` keeps all estimates of x_0 in
    the range of the data. From an energy, `solver` is a Markov kernel, `initial` the law its chains start from, and
    there is no grid, corrector, denoising or threshold.
    """

    solver: Choice = _choice("abm-4")
    steps: Count = 20
    grid: str | None = None
    n: Count = 64
    batch: Count = 256
    ema: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    initial: Choice | None = None
    corrector: Choice | None = None
    denoise: bool = False
    threshold: Choice | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, write: Any) -> dict[str, Any]:
        """What came later, or belongs to other kinds of models, is written where it is something."""
        return {key: value for key, value in write(self).items() if key not in _SAID_IF_ANY or value}


class EvaluationSection(Section):
    """What `evaluate` measures: `n` samples of seeds `seed ...` against `split`. Null: as in `sampling` or `data`.

    `corrector: none` and `threshold: none` take away those of `sampling`; a solver of another name comes without its
    corrector and grid.
    """

    n: Annotated[int, Field(ge=2)] = 10_000
    metrics: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["frechet"])
    split: str | None = None
    seed: Seed = 0
    solver: Choice | None = None
    steps: Count | None = None
    grid: str | None = None
    corrector: Choice | None = None
    denoise: bool | None = None
    threshold: Choice | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, write: Any) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key not in _SAID_IF_ANY or value is not None}


class FactsSection(Section):
    """What the data say of themselves; filled in when training starts, so that sampling needs no data."""

    shape: Annotated[list[Count], Field(min_length=1)]
    num_classes: Count | None = None
    cond_dim: Count | None = None
    class_names: list[str] | None = None
    image: bool
    data: str
    n: int | None = None
    fingerprint: str


class Settings(Section):
    """A whole recipe. `facts` is written by training."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
    description: str = ""
    seed: Seed = 0
    data: dict[str, Any]
    path: Choice | None = None
    model: Model
    objective: Objective = Field(default_factory=ObjectiveSection)
    training: dict[str, Any] = Field(default_factory=dict)
    sampling: SamplingSection = Field(default_factory=SamplingSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    facts: FactsSection | None = None

    @property
    def kind(self) -> str:
        """What it trains: a name in `KINDS`."""
        return _kind(self.model)


def section_keys(tree: Mapping[str, Any] | None = None) -> list[str]:
    """Dotted names of all keys that this module knows, for a recipe of the kind of `tree`."""
    model = KINDS.get(_kind((tree or {}).get("model")), ModelSection)
    plain = _objective_kind((tree or {}).get("objective") or {}) == DENOISING
    keys = list(Settings.model_fields)
    for name, section in (
        ("model", model),
        ("objective", ObjectiveSection if plain else Section),
        ("sampling", SamplingSection),
        ("evaluation", EvaluationSection),
        ("facts", FactsSection),
    ):
        keys += [f"{name}.{key}" for key in section.model_fields]
    return keys


_TAGS = {*(("model", kind) for kind in KINDS), ("objective", DENOISING), ("objective", "named")}


def _keys_only(place: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place of a problem without the tag by which its section's kind was told."""
    return place[:1] + place[2:] if place[:2] in _TAGS else place


def parse_settings(tree: Mapping[str, Any], origin: str, more_keys: list[str] | None = None) -> Settings:
    """The tree of a recipe as checked settings.

    Args:
        tree: as YAML gives it.
        origin: what to call the recipe in messages.
        more_keys: dotted keys that other rooms know, offered when a key is unknown.

    Raises:
        RecipeError: an unknown key (names the nearest), a missing section, a value of the wrong type or range.
    """
    try:
        return Settings.model_validate_json(json.dumps(dict(tree)))
    except ValidationError as error:
        problems: list[Any] = [{**item, "loc": _keys_only(item["loc"])} for item in error.errors()]
    unknown = [item for item in problems if item["type"] == "extra_forbidden"]
    if unknown:
        key = ".".join(str(part) for part in unknown[0]["loc"])
        raise RecipeError(f"{origin}: {unknown_key(key, [*section_keys(tree), *(more_keys or [])])}")
    raise RecipeError(f"{origin}: {explain(problems)}")
