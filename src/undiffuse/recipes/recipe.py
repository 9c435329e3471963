"""`Recipe`: a checked choice on every axis, and the objects it stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from undiffuse.core.random import hash_key
from undiffuse.fields import NetworkClassifier, NetworkDenoiser
from undiffuse.fields.energy import NetworkEnergy
from undiffuse.paths import Path
from undiffuse.recipes import build, datasets
from undiffuse.recipes.schema import ObjectiveSection, Settings, parse_settings
from undiffuse.recipes.text import dump_tree
from undiffuse.training import TrainConfig


class Recipe:
    """A point on the axes data x path x model x objective x training x sampling; see `load_recipe`.

    A recipe trains a denoiser or a classifier on a path, or an energy, which has none.

    Args:
        settings: the sections, checked; read them as `recipe.settings.sampling.steps`.
    """

    def __init__(self, settings: Settings):
        self.settings = settings

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], origin: str = "recipe") -> Recipe:
        """A recipe from plain values.

        Raises:
            RecipeError: see `load_recipe`.
        """
        return cls(build.check(parse_settings(tree, origin, build.option_keys())))

    @property
    def name(self) -> str:
        """What runs of it are called."""
        return self.settings.name

    def to_dict(self) -> dict[str, Any]:
        """Every value, as plain numbers, strings, lists and mappings."""
        return self.settings.model_dump(exclude_none=False)

    def to_yaml(self) -> str:
        """Every value as YAML; loading it gives an equal recipe."""
        return dump_tree(self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    __hash__ = None  # pyright: ignore  (settings are plain, mutable values)

    def __repr__(self) -> str:
        return f"Recipe({self.name!r})"

    @property
    def kind(self) -> str:
        """What it trains: "denoiser", "energy" or "classifier"."""
        return self.settings.kind

    def path(self) -> Path:
        """How data become noise.

        Raises:
            RecipeError: an energy has no path.
        """
        return build.path(self.settings)

    def objective(self, dataset: Any = None) -> Any:
        """What training minimises. One that keeps chains has their number and size, from the data's facts.

        Args:
            dataset: the training data, where they are loaded already. `objective.target: marginal` loads them else.

        Raises:
            RecipeError: a replay buffer that is larger than memory; a marginal target on a stream or mirrored images.
        """
        choice = self.settings.objective
        if dataset is None and isinstance(choice, ObjectiveSection) and choice.target == "marginal":
            dataset = self.data()
        return build.objective(self.settings, dataset)

    def train_config(self) -> TrainConfig:
        """The numbers of training."""
        return build.train_config(self.settings)

    def data(self, split: str = "train", progress: Callable[[int, int], None] | None = None) -> Any:
        """A split of the data: "train", "held-out", or a name that the source knows.

        Raises:
            DataError: missing, unreadable, of mixed sizes. ArgumentError: unknown source, split, or option.
        """
        return datasets.data(self.settings, split, progress)

    def resolved(self, dataset: Any = None) -> Recipe:
        """The recipe with what the data say written out: shape, classes, and the network's arguments for them.

        Args:
            dataset: the training data, where they are loaded already. Without it a recipe that holds the facts is
                returned as it is, and one that does not loads them.

        Raises:
            RecipeError: the recipe states another shape or number of classes.
        """
        if self.settings.facts is not None and dataset is None:
            return self
        facts = datasets.facts(self.data() if dataset is None else dataset)
        model = self.settings.model.model_copy(update={"net": build.net_arguments(self.settings, facts)})
        return Recipe(self.settings.model_copy(update={"facts": facts, "model": model}))

    def model(self, dataset: Any = None) -> NetworkDenoiser | NetworkEnergy | NetworkClassifier:
        """The untrained model; its initial weights are a function of the recipe's seed.

        Raises:
            RecipeError: a shape that the network cannot take.
        """
        settings = self.resolved(dataset).settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_key(settings.seed, "init") & (2**63 - 1))
            return build.model(settings)
