"""`Operator`: a linear operator on densities with its adjoint, and the check that the two belong together."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator

Field = Callable[[Tensor], Tensor]
LogProb = Callable[[Tensor], Tensor]
PerSample = Float[Tensor, " b"]

# Points of the quadrature on which an adjoint is checked, and how many there are along one axis.
_POINTS, _FEWEST, _MOST = 2**16, 4, 20


@dataclass(frozen=True)
class Trial:
    """A law as points with weights, `sum_i w_i f(x_i) = E_p f`, and a way to make random fields on them."""

    x: Tensor
    weights: Tensor
    log_prob: LogProb
    field: Callable[[tuple[int, ...]], Field]


class Operator(ABC):
    """A linear operator L on densities, with its adjoint; a frozen value. To add one, give `adjoint` and `ratio`.

    Attributes:
        name: as errors call it.
        method: the model's method that is the field, called as `method(x, cond)`.
        event: shape of the events on which the adjoint is checked.
    """

    name: ClassVar[str] = "operator"
    method: ClassVar[str] = "score"
    event: tuple[int, ...] = (2,)

    @abstractmethod
    def adjoint(self, field: Field, x: Tensor, generator: Generator = None) -> tuple[Tensor, PerSample]:
        """`(s(x), (L† s)(x))`.

        The field may be called at other points than x: with k rows for each row of x, those of one sample adjacent.
        """

    @abstractmethod
    def ratio(self, log_prob: LogProb, x: Tensor) -> Tensor:
        """`(L p)(x) / p(x)` of a known law: what the field should be, of the field's shape."""

    def to_check(self) -> Operator:
        """The operator as it is checked: exact, and with no more states than can be enumerated."""
        return self

    def trial(self, generator: Generator) -> Trial:
        """A random Gaussian and cubic fields, by Gauss-Hermite quadrature: exact for polynomial coefficients."""
        size = math.prod(self.event)
        axis = min(_MOST, int(_POINTS ** (1 / size) + 1e-9))
        if axis < _FEWEST:
            raise ArgumentError(
                f"the adjoint of '{self.name}' is checked by quadrature, which stops at events of size "
                f"{int(math.log(_POINTS, _FEWEST))}: given {self.event}; set `event` to a smaller one"
            )
        points, weights = _hermite(size, axis)
        mean = random.normal((size,), generator, dtype=torch.float64)
        root = torch.eye(size, dtype=torch.float64) + 0.3 * random.normal((size, size), generator, dtype=torch.float64)
        inverse, log_det = torch.linalg.inv(root), torch.linalg.slogdet(root).logabsdet

        def log_prob(y: Tensor) -> Tensor:
            square = ((y.flatten(1) - mean) @ inverse.mT).square().sum(1)
            return -0.5 * (square + size * math.log(2 * math.pi)) - log_det

        def field(part: tuple[int, ...]) -> Field:
            ridges = random.normal((size + 1, 8), generator, dtype=torch.float64) / math.sqrt(size)
            outputs = random.normal((8, math.prod(part)), generator, dtype=torch.float64)
            return lambda y: ((y.flatten(1) @ ridges[1:] + ridges[0]) ** 3 @ outputs).reshape(len(y), *part)

        return Trial((mean + points @ root.mT).reshape(-1, *self.event), weights, log_prob, field)


def _hermite(size: int, axis: int) -> tuple[Tensor, Tensor]:
    """Nodes (N, D) and weights (N,) of a standard normal."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(axis))
    grid = torch.cartesian_prod(*[nodes] * size).reshape(-1, size)
    shares = torch.cartesian_prod(*[weights / weights.sum()] * size).reshape(-1, size).prod(1)
    return grid, shares


def finite_trial(x: Tensor, index: Callable[[Tensor], Tensor], states: int, generator: Generator) -> Trial:
    """A random law and random fields on finitely many states x; `index` is the place of a state in x."""
    log_p = random.normal((states,), generator, dtype=torch.float64).log_softmax(0)

    def field(part: tuple[int, ...]) -> Field:
        table = random.normal((states, *part), generator, dtype=torch.float64)
        return lambda y: table[index(y)]

    return Trial(x, log_p.exp(), lambda y: log_p[index(y)], field)


def check_adjoint(
    operator: Operator, *, trials: int = 3, tolerance: float = 1e-6, generator: Generator = None
) -> float:
    """Compare `<L p, s>` with `<p, L† s>` for random laws p and fields s; returns the largest relative gap.

    Finite operators take random vectors. Others take Gaussians and cubic polynomials, integrated by Gauss-Hermite
    quadrature: exact where the operator's coefficients are polynomials, close where they are smooth. Operators that
    estimate by random directions are checked in their exact form.

    Args:
        tolerance: of the gap relative to `E|s . L p / p| + E|L† s|`.
        generator: None: a fixed seed, so that the check gives the same answer each time.

    Raises:
        ArgumentError: they differ, and by how much; a field, or an adjoint, of a shape that does not fit.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    worst = 0.0
    for _ in range(trials):
        trial = operator.trial(generator)
        forward, backward, size = _both_sides(operator.to_check(), trial)
        gap = abs(forward - backward) / size if size > 0 else abs(forward - backward)
        if not gap <= tolerance:
            raise ArgumentError(
                f"the adjoint of '{operator.name}' does not match its ratio: <L p, s> = {forward:.6g} and "
                f"<p, L† s> = {backward:.6g} differ by {100 * gap:.3g} % of their size, allowed {100 * tolerance:.3g} "
                "%; integrate s . L p by parts to find L† s"
            )
        worst = max(worst, gap)
    return worst


def _both_sides(operator: Operator, trial: Trial) -> tuple[float, float, float]:
    with torch.no_grad():
        target = operator.ratio(trial.log_prob, trial.x)
        value, pulled = operator.adjoint(trial.field(tuple(target.shape[1:])), trial.x)
    if value.shape != target.shape or pulled.shape != trial.x.shape[:1]:
        raise ArgumentError(
            f"'{operator.name}': for x of shape {tuple(trial.x.shape)} ratio gives {tuple(target.shape)} and adjoint "
            f"{tuple(value.shape)} with {tuple(pulled.shape)}: expected one shape, and ({len(trial.x)},)"
        )
    product = (value * target).reshape(len(value), -1).sum(1)
    sides = (trial.weights * v for v in (product, pulled, product.abs() + pulled.abs()))
    forward, backward, size = (float(side.sum()) for side in sides)
    return forward, backward, size
