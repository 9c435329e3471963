"""What a multistep run remembers, and sums of it: weights are of x and of evaluations, the newest first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from torch import Tensor

from undiffuse.solvers.base import Event
from undiffuse.solvers.level import Level
from undiffuse.solvers.sums import weighted_sum

Weights = tuple[float, Sequence[float]]


class Value(NamedTuple):
    """An evaluation P as a sum of tensors."""

    tensors: tuple[Tensor, ...]
    weights: tuple[float, ...]


class Past(NamedTuple):
    """What a run remembers: levels and values of its evaluations, the newest first, and its last step.

    That step began at `start` and made `x_next`; another x met next was changed on the way, by a corrector of noise
    say, and is taken as it is. `made` are the weights of x and of the values in it; None: it is not to be made anew.
    """

    levels: tuple[Level, ...] = ()
    values: tuple[Value, ...] = ()
    start: Level | None = None
    x_next: Tensor | None = None
    made: Weights | None = None


def added(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """The sums of weights, of which there may be fewer in one than in the other."""
    return [v + w for v, w in zip_longest(a, b, fillvalue=0.0)]


def after(step: Weights, correction: Weights) -> Weights:
    """The weights of a step from what a correction makes of x."""
    on_x, weights = step
    return on_x * correction[0], added(weights, [on_x * w for w in correction[1]])


def total(x: Event, values: Sequence[Value], weights: Weights) -> Event:
    """x and values by their weights; each tensor once, and those of weight 0 not at all."""
    on_x, tensors, factors = weights[0], [], []
    for value, w in zip(values, weights[1]):
        for tensor, factor in zip(*value):
            if tensor is x:
                on_x += w * factor
            elif w != 0:
                tensors.append(tensor)
                factors.append(w * factor)
    if on_x == 0 and tensors:
        return weighted_sum(tensors, factors)
    return weighted_sum((x, *tensors), (on_x, *factors))
