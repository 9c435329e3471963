"""Langevin dynamics: unadjusted, Metropolis-adjusted, and with momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.fields.energy import HasScore
from undiffuse.solvers.markov import Cond, Draws, Event, Kernel
from undiffuse.solvers.metropolis import Metropolis, Root


def positive(name: str, value: float) -> None:
    """Raises ArgumentError unless `value` is a finite number > 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ArgumentError(f"{name} is {value}: expected a finite number > 0")


@dataclass(frozen=True, eq=False)
class Langevin(Kernel):
    """`x + step P s(x) + sqrt(2 step) P^(1/2) z` (eq. 3.2.3), s the score, z standard normal: unadjusted Langevin.

    One call of the score per step. Its stationary law differs from the target by O(step): on N(0, v) its variance is
    `v / (1 - step / (2 v))`, and it diverges for step >= 2 v.

    Args:
        step_size: the step, in units of x^2; the default is for a density about as wide as a standard normal's modes.
        noise: standard deviation of the noise where it is not sqrt(2 step), as in short-run sampling of trained
            energies: `x + step s(x) + noise z`. 0 is gradient ascent of log p.
        clip: bound on the absolute value of each element of the score.
        bounds: (low, high), the interval every element of x is clamped to after the step, as images are in short-run
            sampling. The law then has mass at the bounds.
        preconditioner: P, an event's shape (a diagonal) or (D, D), symmetric positive definite; P^(1/2) is its
            Cholesky factor.

    Raises:
        ArgumentError: step_size or clip <= 0, noise < 0, low >= high; at the first step, a preconditioner of another
            shape or not positive definite.
    """

    step_size: float = 0.01
    noise: float | None = None
    clip: float | None = None
    preconditioner: Tensor | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self):
        positive("step_size", self.step_size)
        if self.noise is not None and not (self.noise >= 0 and math.isfinite(self.noise)):
            raise ArgumentError(f"noise is {self.noise}: expected a standard deviation >= 0, or None for sqrt(2 step)")
        if self.clip is not None:
            positive("clip", self.clip)
        if self.bounds is not None and not (len(self.bounds) == 2 and self.bounds[0] < self.bounds[1]):
            raise ArgumentError(f"bounds are {tuple(self.bounds)}: expected a pair (low, high), low < high")

    def init(self, target: HasScore, x: Event, cond: Cond = None) -> Root:
        return Root(self.preconditioner, x)

    def step(self, target: HasScore, x: Event, state: Root, draw: Draws, cond: Cond = None) -> tuple[Event, Root]:
        score = target.score(x, cond)
        if self.clip is not None:
            score = score.clamp(-self.clip, self.clip)
        noise = math.sqrt(2 * self.step_size) if self.noise is None else self.noise
        moved = torch.add(x, state(state.transposed(score)), alpha=self.step_size)
        if noise > 0:
            moved.add_(state(draw.normal()), alpha=noise)
        return (moved if self.bounds is None else moved.clamp_(*self.bounds)), state


@dataclass(frozen=True, eq=False)
class MALA(Metropolis):
    """Metropolis-adjusted Langevin: the step of `Langevin` as a proposal (Roberts and Tweedie 1996).

    Accepted with probability `min(1, p(y) q(x | y) / (p(x) q(y | x)))`, so that the target is left invariant for any
    step. The proposal is one leapfrog step of size sqrt(2 step) from a fresh momentum z, and the ratio
    `exp(E(x) - E(y) + (|z|^2 - |z'|^2) / 2)`, `z' = z + sqrt(step / 2) L^T (s(x) + s(y))`. One call of the target per
    step, and one before the first.

    Args:
        step_size: the step, as of `Langevin`. An acceptance near 0.57 is best in many dimensions (Roberts and Rosenthal
            1998).
        preconditioner: as of `Langevin`.

    Raises:
        ArgumentError: step_size <= 0; at the start, a preconditioner that does not fit, a target without energies, or
            an energy that is not finite.
    """

    step_size: float = 0.01

    def __post_init__(self):
        positive("step_size", self.step_size)

    def trajectory(self) -> tuple[float, int]:
        return math.sqrt(2 * self.step_size), 1


class Motion(NamedTuple):
    """State of `Underdamped`: the momentum `w = L^T p` (None before the first step) and the score at x."""

    root: Root
    w: Tensor | None
    score: Tensor


@dataclass(frozen=True, eq=False)
class Underdamped(Kernel):
    """Kinetic Langevin, `dx = L w dt, dw = (L^T s - friction w) dt + sqrt(2 friction) dW`, `L L^T = P`, by BAOAB.

    Half a kick, half a move, the exact decay `w e^(-friction step) + sqrt(1 - e^(-2 friction step)) z`, half a move,
    half a kick (Leimkuhler and Matthews 2013). One call of the score per step, and one before the first. The
    bias of x is O(step^2), and none at all on a Gaussian; stable there for step < 2 standard deviations (where P = I).

    Args:
        step_size: the step in time, in units of x.
        friction: per unit of time.
        preconditioner: the inverse of the mass; as of `Langevin`.

    Raises:
        ArgumentError: step_size or friction <= 0; at the start, a preconditioner that does not fit.
    """

    exact: ClassVar[bool] = False

    step_size: float
    friction: float = 1.0
    preconditioner: Tensor | None = None

    def __post_init__(self):
        positive("step_size", self.step_size)
        positive("friction", self.friction)

    def init(self, target: HasScore, x: Event, cond: Cond = None) -> Motion:
        return Motion(Root(self.preconditioner, x), None, target.score(x, cond))

    def step(self, target: HasScore, x: Event, state: Motion, draw: Draws, cond: Cond = None) -> tuple[Event, Motion]:
        h, root = self.step_size, state.root
        w = draw.normal() if state.w is None else state.w
        w = w + 0.5 * h * root.transposed(state.score)
        x = x + 0.5 * h * root(w)
        decay = math.exp(-self.friction * h)
        w = decay * w + math.sqrt(-math.expm1(-2 * self.friction * h)) * draw.normal()
        x = x + 0.5 * h * root(w)
        score = target.score(x, cond)
        return x, Motion(root, w + 0.5 * h * root.transposed(score), score)
