"""What MALA and Hamiltonian Monte Carlo share: a preconditioner, the leapfrog, and the accept step."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.solvers.markov import Cond, Draws, Event, HasEnergy, Kernel, PerChain, finite_rows, over_events


class Root:
    """`L` with `L L^T = P`, P the preconditioner: nothing (the identity), a diagonal, or a matrix.

    Momenta are kept as `w = L^T p`, standard normal, so that neither P's inverse nor a mass is needed: a move is
    `L w`, a kick `L^T s`.

    Args:
        preconditioner: an event's shape (a diagonal, entries > 0), or (D, D), symmetric positive definite.
        x: gives the shape (B, *event), dtype and device.

    Raises:
        ArgumentError: another shape, or not positive definite.
    """

    def __init__(self, preconditioner: Tensor | None, x: Tensor):
        self.diagonal: Tensor | None = None
        self.matrix: Tensor | None = None
        self.scale: Tensor | None = None  # per row, over the event
        if preconditioner is None:
            return
        given, size = preconditioner.to(x), math.prod(x.shape[1:])
        if given.shape == x.shape[1:]:
            if not bool((given > 0).all()):
                raise ArgumentError(f"the preconditioner's smallest entry is {float(given.min())}: expected all > 0")
            self.diagonal = given.sqrt()
        elif given.shape == (size, size):
            self.matrix = _cholesky(given)
        else:
            raise ArgumentError(
                f"preconditioner has shape {tuple(given.shape)}: expected an event's, {tuple(x.shape[1:])}, or "
                f"({size}, {size})"
            )

    def scaled(self, scale: PerChain, x: Event) -> Root:
        """`scale_i L` in row i."""
        other = copy.copy(self)
        other.scale = over_events(scale, x)
        return other

    def __call__(self, v: Tensor) -> Tensor:
        """`L v`."""
        if self.matrix is not None:
            v = (v.flatten(1) @ self.matrix.T).reshape(v.shape)
        return self._elementwise(v)

    def transposed(self, v: Tensor) -> Tensor:
        """`L^T v`."""
        if self.matrix is not None:
            v = (v.flatten(1) @ self.matrix).reshape(v.shape)
        return self._elementwise(v)

    def _elementwise(self, v: Tensor) -> Tensor:
        v = v if self.diagonal is None else v * self.diagonal
        return v if self.scale is None else v * self.scale


def _cholesky(matrix: Tensor) -> Tensor:
    exact = matrix.double()
    if not bool(torch.allclose(exact, exact.T, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))):
        raise ArgumentError("the preconditioner is not symmetric: give (P + P^T) / 2")
    factor, failed = torch.linalg.cholesky_ex((exact + exact.T) / 2)
    if int(failed) != 0 or not bool(torch.isfinite(factor).all()):
        smallest = float(torch.linalg.eigvalsh(exact)[0]) if bool(torch.isfinite(exact).all()) else math.nan
        raise ArgumentError(
            f"the preconditioner is not positive definite (smallest eigenvalue {smallest:.3g}): add a multiple of the "
            "identity"
        )
    return factor.to(matrix.dtype)


class Point(NamedTuple):
    """State of a kernel that accepts or rejects: what is known at x, and how likely the last proposal was accepted."""

    root: Root
    energy: Tensor
    score: Tensor
    chance: Tensor


def leapfrog(
    target: HasEnergy, x: Event, w: Event, point: Point, step: float, count: int, cond: Cond = None
) -> tuple[Event, Event, PerChain, Event]:
    """`(x, w, E(x), s(x))` after `count` leapfrog steps of `dx = L w dt, dw = L^T s dt` (Neal 2011, eq. 5.18-5.20).

    Half a kick, a move, half a kick; kicks that meet are one. `count` calls of the target. Reversible: from (x, -w) it
    leads back; the error of `E + |w|^2 / 2` is O(step^2).
    """
    root, score, energy = point.root, point.score, point.energy
    for i in range(count):
        w = w + (0.5 if i == 0 else 1.0) * step * root.transposed(score)
        x = x + step * root(w)
        if i == count - 1:
            energy, score = target.energy_and_score(x, cond)
        else:
            score = target.score(x, cond)
    return x, w + 0.5 * step * root.transposed(score), energy, score


def log_ratio(energy: PerChain, w: Event, new_energy: PerChain, new_w: Event) -> PerChain:
    """`H(x, w) - H(x', w')` with `H = E + |w|^2 / 2`, (B,): the logarithm of the acceptance ratio."""
    return energy - new_energy + 0.5 * (w.square() - new_w.square()).reshape(len(w), -1).sum(1)


@dataclass(frozen=True, eq=False)
class Metropolis(Kernel):
    """A kernel whose proposal is a leapfrog trajectory from a fresh momentum, accepted or rejected.

    A proposal of energy +inf has density 0 and is rejected; one whose energy is NaN or -inf stops its chain.
    """

    exact: ClassVar[bool] = True

    step_size: float
    preconditioner: Tensor | None = field(default=None, kw_only=True)

    @abstractmethod
    def trajectory(self) -> tuple[float, int]:
        """Size and number of the leapfrog steps."""

    def init(self, target: HasEnergy, x: Event, cond: Cond = None) -> Point:  # type: ignore[override]
        energy, score = target.energy_and_score(x, cond)
        bad = ~(torch.isfinite(energy) & finite_rows(score))
        if bool(bad.any()):
            rows = bad.nonzero()[:, 0].tolist()
            raise ArgumentError(
                f"{len(rows)} of {len(x)} starting states have an energy or a score that is not finite: rows "
                f"{', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}; start where the density is > 0"
            )
        return Point(Root(self.preconditioner, x), energy, score, torch.zeros_like(energy))

    def step(  # type: ignore[override]
        self, target: HasEnergy, x: Event, state: Point, draw: Draws, cond: Cond = None
    ) -> tuple[Event, Point]:
        w = draw.normal()
        size, count = self.trajectory()
        y, new_w, energy, score = leapfrog(target, x, w, state, size, count, cond)
        ratio = log_ratio(state.energy, w, energy, new_w)
        chance = ratio.clamp(max=0).exp().nan_to_num(nan=0.0)
        stopped = torch.isnan(energy) | torch.isneginf(energy)
        taken = draw.uniform() < chance
        rows = over_events(taken, x)
        x = torch.where(rows, y, x)
        if bool(stopped.any()):
            x = x.masked_fill(over_events(stopped, x), math.nan)
        kept = torch.where(taken, energy, state.energy), torch.where(rows, score, state.score)
        return x, Point(state.root, *kept, chance)

    def acceptance(self, state: Point) -> PerChain:
        return state.chance
