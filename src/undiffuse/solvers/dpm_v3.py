"""DPM-Solver-v3 (Zheng, Lu, Chen and Zhu 2023): exponential multistep in coordinates that statistics of a model choose.

Let `u = x / alpha`, lambda the half log-SNR. For any l(lambda), one number for each coordinate, the flow is

    du/dlambda = -l u - f,    f = (sigma E[eps] - l x) / alpha = (1 - l) u - E[x_0],

with l = 0 that of DPM-Solver's noise prediction, with l = 1 that of DPM-Solver++, f = -E[x_0]. For any s and b the
remainder is `f = e^S (g + B)` with `g' = e^-S (f' - s f - b)`, `S' = s`, `B' = e^-S b` (eqs. 8 and 9): where
statistics say that `f' = s f + b`, g hardly changes. g is followed by a polynomial through the last evaluations. Here
that is done with the f themselves: each is carried to the step's start a along `f' = s f + b`, where it is g but for
factors that all of them share, and

    u_b = e^{-(L_b - L_a)} u_a - integral from a to b of e^{-(L_b - L)} (e^{S - S_a} sum_j l_j f_j + p),

L' = l, `p' = s p + b`, p_a = 0, l_j Lagrange's polynomials (`undiffuse.solvers.carrying`). The corrector makes a step
anew with the f at its end among the f_j (section 3.2.2). s = -1, l = b = 0 and l = 1, s = b = 0 are the noise's and the
data's methods of `Multistep`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.paths import Path
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, weighted_sum
from undiffuse.solvers.carrying import Basis, Carriage, carriage
from undiffuse.solvers.grids import curved_angle, make_grid
from undiffuse.solvers.level import Level
from undiffuse.solvers.polynomials import COORDINATES, Coordinate, lagrange
from undiffuse.solvers.statistics import ModelStatistics

_INFINITE = ("half-log-snr", "sigma")


@dataclass(frozen=True)
class _Past:
    """What a run remembers: evaluated levels, the newest first, their f carried to the newest; and its last step."""

    levels: tuple[Level, ...] = ()
    values: tuple[Tensor, ...] = ()
    x: Tensor | None = None
    x_next: Tensor | None = None


@dataclass(frozen=True)
class DPMv3(Solver):
    statistics: ModelStatistics
    points: int = 3
    corrector: bool = True
    variable: str = "half-log-snr"
    pseudo: bool = False
    grid: str = "canonical"
    trust: float = 0.0
    evals_per_step: ClassVar[int] = 1

    @property
    def order(self) -> float:  # type: ignore[override]
        return self.points + self.corrector

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        if self.grid == "own":
            scale = max(1.0, 0.18 * math.sqrt(math.prod(self.statistics.event)))
            return make_grid(path, steps, curved_angle(scale, max(20.0, float(steps))))
        return make_grid(path, steps, self.grid)

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        past: _Past = state if state is not None else _Past()
        start, end = (Level.of(field, time, 1.0) for time in (t, s))
        if start.alpha == 0:
            start, x, value = self._first(field, x, start, end)
        else:
            value = self._remainder(field(x, t), x, start)
        levels, values = past.levels, past.values
        if levels:
            span = levels[0].half_log_snr, start.half_log_snr
            if self.corrector and past.x_next is x and past.x is not None:
                known = (levels[0], start, *levels[1:])[: self.points + 1]
                made = carriage(self.statistics, span, self._basis(known))
                back = (value - made.gain.to(x)) / made.grow.to(x)
                old = (values[0], back, *values[1:])[: self.points + 1]
                x = self._moved(made, past.x, levels[0], start, old)
            else:
                made = carriage(self.statistics, span, self._basis((start,)))
            values = tuple(torch.addcmul(made.gain.to(x), made.grow.to(x), old) for old in values)
        levels, values = (start, *levels)[: self.points], (value, *values)[: self.points]
        if end.sigma == 0:
            return self._last(x, start, end, levels, values), _Past()
        made = carriage(self.statistics, (start.half_log_snr, end.half_log_snr), self._basis(levels))
        moved = self._moved(made, x, start, end, values)
        return moved, _Past(levels, values, x, moved)

    def _linear(self, place: float, like: Tensor) -> Tensor:
        return self.statistics.at(torch.tensor(place, dtype=torch.float64))[0].to(like)

    def _remainder(self, denoised: Event, x: Event, level: Level) -> Event:
        """`f = (1 - l) u - E[x_0]`."""
        return torch.addcmul(-denoised, 1 - self._linear(level.half_log_snr, x), x, value=1 / level.alpha)

    def _first(self, field, x, start, end):
        theta = max(math.atan(20.0), 0.5 * (start.theta + end.theta))
        t = field.path.time_of_angle(torch.tensor(theta, dtype=torch.float64))
        level = Level.of(field, t, 1.0)
        pure = x * (level.sigma / start.sigma)
        linear = self._linear(level.half_log_snr, x).clamp(0.5, 1.0)
        value = self._remainder(field(pure, t), pure, level)
        return level, pure / linear.sqrt() - level.alpha * value / linear, value

    def _moved(self, made: Carriage, x: Event, start: Level, end: Level, values: tuple[Tensor, ...]) -> Event:
        moved = (made.keep * (end.alpha / start.alpha)).to(x) * x - (made.offset * end.alpha).to(x)
        for weight, value in zip(made.weights, values, strict=True):
            moved = torch.addcmul(moved, (weight * end.alpha).to(x), value, value=-1)
        return moved

    def _last(self, x, start, end, levels, values):
        """To sigma = 0: the mean of the data at the statistics' end, all but the data there."""
        u, f, place = x / start.alpha, values[0], float(self.statistics.half_log_snr[-1])
        if start.half_log_snr < place:
            if self.variable in _INFINITE:
                levels, values = levels[:1], values[:1]
            basis = self._basis(levels)
            made = carriage(self.statistics, (start.half_log_snr, place), basis)
            u = self._moved(made, x, start, Level(0.0, 0.0, 1.0, 0.0), values)
            weights = basis(np.array([place]))[:, 0].tolist()
            f = torch.addcmul(made.gain.to(x), made.grow.to(x), weighted_sum(values, weights))
        linear = self._linear(place, x).clamp(0.0, 1.0)
        return end.alpha * (u - (linear * u + f) / (1 + (1 - linear).sqrt()))

    def _basis(self, levels: tuple[Level, ...]) -> Basis:
        coordinate = COORDINATES[self.variable]
        at = coordinate(np.array([level.theta for level in levels])).tolist()
        make = pseudo if self.pseudo else lagrange
        return lambda places: make(at, coordinate(np.arctan(np.exp(-places))))


def pseudo(nodes, points):
    out = np.zeros((len(nodes), len(points)))
    for i in range(len(nodes)):
        for k in range(i + 1):
            d = np.prod([nodes[k] - nodes[m] for m in range(i + 1) if m != k])
            out[k] += (points - nodes[0]) ** i / d
    return out
