"""The data of a recipe: which they are, how they are trained on, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from undiffuse.core.errors import ArgumentError, RecipeError
from undiffuse.data.load import load
from undiffuse.inference import dequantise
from undiffuse.inference.dequantisation import count_levels
from undiffuse.recipes.arguments import argument_names, complete
from undiffuse.recipes.schema import FactsSection, Settings

# What the library passes itself: the splits are named by the sections.
_OWN = ("split", "progress")
# Keys that say how data are trained on, not which they are.
CHANGES = ("flip", "dequantise")
_LOOK_AT = 1000  # rows, to tell how many values data have


def data_keys() -> list[str]:
    """What may be written in the section."""
    return [*CHANGES, *argument_names(load, _OWN)]


def check_data(section: dict[str, Any]) -> dict[str, Any]:
    """The section with every default written out.

    Raises:
        RecipeError: a key that no source knows, or a wrong value.
    """
    flip, levels = section.get("flip", False), section.get("dequantise")
    if not isinstance(flip, bool):
        raise RecipeError(f"data.flip = {flip!r}: must be true or false.")
    if not (levels is None or (type(levels) is int and levels >= 2)):
        raise RecipeError(f"data.dequantise = {levels!r}: must be the number of values per pixel, 256 for bytes.")
    which = {key: value for key, value in section.items() if key not in CHANGES}
    checked = {**complete(load, which, "data", left_out=_OWN), "flip": flip}
    # Unwritten where there is none: it came when there were runs already.
    return checked if levels is None else {**checked, "dequantise": levels}


def data(settings: Settings, split: str, progress: Callable[[int, int], None] | None = None) -> Any:
    """A split of the data; without its labels where the model is not conditional."""
    options = {key: value for key, value in settings.data.items() if key not in CHANGES}
    dataset = load(**options, split=split, progress=progress)
    return dataset if settings.model.conditional else Unlabelled(dataset)


def dequantiser(settings: Settings) -> Callable[..., Any] | None:
    """What makes values densities while they are trained on (`data.dequantise`); None: they stay as they are."""
    levels = settings.data.get("dequantise")
    return None if levels is None else partial(dequantise, levels=levels)


def check_levels(settings: Settings, dataset: Any) -> None:
    """Look at the first rows whether `data.dequantise` is the number of values that they have; of a stream, nothing.

    Raises:
        RecipeError: they have another, or none that can be told.
    """
    levels = settings.data.get("dequantise")
    if levels is None or not hasattr(dataset, "batch"):
        return
    rows = dataset.batch(torch.arange(min(len(dataset), _LOOK_AT)))[0]
    try:
        found = count_levels(rows)
    except ArgumentError as error:
        raise RecipeError(f"data.dequantise = {levels}: {error}; leave it out") from None
    if found != levels:
        raise RecipeError(f"data.dequantise = {levels}: the data '{dataset.name}' have {found} values; write {found}")


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
