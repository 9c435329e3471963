"""What a multistep run remembers, and sums of it: weights are of x and of evaluations, the newest first.

A weight is a number, or one for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.shapes import pad_to
from undiffuse.core.sums import weighted_sum
from undiffuse.solvers.base import Event
from undiffuse.solvers.level import Level
from undiffuse.solvers.polynomials import lagrange

Weight = float | Float[Tensor, " b"]
Weights = tuple[Weight, Sequence[Weight]]


class Value(NamedTuple):
    """An evaluation P as a sum of tensors: one, or x and the model's output, which a network's next call may overwrite.

    `own`: the first of them is the run's own, and held by nobody else.
    """

    tensors: tuple[Tensor, ...]
    weights: tuple[float, ...] = (1.0,)
    own: bool = False


class Past(NamedTuple):
    """What a run remembers: levels, values and, where it asks for them, lengths of its evaluations, the newest first,
    and its last step.

    That step began at `start` and made `x_next`; another x met next was changed on the way, by a corrector of noise
    say, and is taken as it is. `made` are the weights of x and of the values in it; None: it is not to be made anew.
    """

    levels: tuple[Level, ...] = ()
    values: tuple[Value, ...] = ()
    lengths: tuple[Float[Tensor, " b"], ...] = ()
    start: Level | None = None
    x_next: Tensor | None = None
    made: Weights | None = None


def added(a: Sequence[Weight], b: Sequence[Weight]) -> list[Weight]:
    """The sums of weights, of which there may be fewer in one than in the other."""
    return [v + w for v, w in zip_longest(a, b, fillvalue=0.0)]


def after(step: Weights, correction: Weights) -> Weights:
    """The weights of a step from what a correction makes of x."""
    on_x, weights = step
    return on_x * correction[0], added(weights, [on_x * w for w in correction[1]])


def total(x: Event, values: Sequence[Value], weights: Weights, spent: Event | None = None) -> Event:
    """x and values by their weights; each tensor once, those of weight 0 not at all; `spent` as in `weighted_sum`."""
    tensors, factors = _terms(x, values, weights)
    numbers = [w for w in factors if not isinstance(w, Tensor)]
    if len(numbers) == len(factors):
        return weighted_sum(tensors, numbers, spent)
    # Sums and products, not a contraction: those keep their precision under autocast.
    each = [pad_to(w.to(x), x) if isinstance(w, Tensor) else x.new_full((), w) for w in factors]
    total = each[0] * tensors[0]
    for w, tensor in zip(each[1:], tensors[1:]):
        total = torch.addcmul(total, w, tensor)
    return total


def added_up(value: Value, spent: Event | None = None) -> Value:
    """A value as one tensor; `spent` as in `weighted_sum`."""
    terms = [(part, w) for part, w in zip(*value[:2]) if w != 0]
    # Up to the largest weight: a sum that begins with 1 takes no more than a pass.
    parts, (first, *rest) = zip(*sorted(terms, key=lambda term: -abs(term[1])))
    return Value((weighted_sum(parts, (1.0, *(w / first for w in rest)), spent),), (first,), own=True)


def _terms(x: Event, values: Sequence[Value], weights: Weights) -> tuple[list[Tensor], list[Weight]]:
    """Each tensor once, and its weight."""
    on_x, tensors, factors = weights[0], [], []
    for value, w in zip(values, weights[1]):
        for tensor, factor in zip(*value[:2]):
            if tensor is x:
                on_x = on_x + w * factor  # not in place: the weights are kept
            elif isinstance(w, Tensor) or w != 0:
                tensors.append(tensor)
                factors.append(w * factor)
    if isinstance(on_x, Tensor) or on_x != 0 or not tensors:
        tensors, factors = [x, *tensors], [on_x, *factors]
    return tensors, factors


@torch.no_grad()
def lengths_of(value: Value) -> Float[Tensor, " b"]:
    """The Euclidean length of each sample's."""
    x = value.tensors[0] if value.weights == (1.0,) else weighted_sum(*value[:2])
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)


@torch.no_grad()
def told_by(
    values: Sequence[Value], lengths: Sequence[Float[Tensor, " b"]], places: Sequence[float], miss: float
) -> Int[Tensor, " b"] | None:
    """Through how many evaluations before the newest a polynomial tells that, for each sample: the most, at least 1.

    Told is what is within `miss` times the length of the longest. None: all tell it to all samples.

    Args:
        values: the newest first, three or more.
        lengths: theirs, and perhaps more.
        places: what the polynomials are functions of, at these.
        miss: above 0.
    """
    most = len(values) - 1
    allowed = miss * torch.stack(tuple(lengths[: len(values)])).amax(0)
    counts = None
    for count in range(most, 1, -1):
        weights = (1.0, *(-w for w in _ahead(tuple(places[: count + 1]))))
        tensors = [(tensor, w * factor) for value, w in zip(values, weights) for tensor, factor in zip(*value[:2])]
        # Not where it is NaN, which the run will name.
        parts, shares = zip(*tensors)
        lost = lengths_of(Value(parts, shares)) > allowed
        if counts is not None:
            lost &= counts == count
        if not bool(lost.any()):
            break
        counts = torch.full(lost.shape, most, device=lost.device) if counts is None else counts
        counts = torch.where(lost, count - 1, counts)
    return counts


@lru_cache(maxsize=4096)
def _ahead(places: tuple[float, ...]) -> tuple[float, ...]:
    """Weights of the polynomial's value at the first place, by its values at the others."""
    return tuple(lagrange(places[1:], np.array(places[:1]))[:, 0].tolist())


def chosen(choices: Sequence[Weights], which: Int[Tensor, " b"]) -> Weights:
    """For each sample the weights of one choice; the last has the most."""
    longest = len(choices[-1][1])
    rows = [[on_x, *weights, *[0.0] * (longest - len(weights))] for on_x, weights in choices]
    on_x, *columns = torch.tensor(rows, dtype=torch.float64, device=which.device)[which].unbind(1)
    return on_x, columns
