"""DPM-Solver-v3 (Zheng, Lu, Chen and Zhu 2023): exponential multistep in coordinates that statistics of a model choose.

Let `u = x / alpha`, lambda the half log-SNR. For any l(lambda), one number for each coordinate, the flow is

    du/dlambda = -l u - f,    f = (sigma E[eps] - l x) / alpha = (1 - l) u - E[x_0]:

with l = 0 that of DPM-Solver, with l = 1 that of DPM-Solver++, f = -E[x_0]. For any s and b the remainder is
`f = e^S (g + B)` with `S' = s`, `B' = e^-S b`, and `g' = e^-S (f' - s f - b)`: where statistics say that
`f' = s f + b`, g hardly changes, and a polynomial through its last values is put in its place. Here that is done with
the f themselves. Each is carried to the step's start a along `f' = s f + b`; there it is g but for a factor and a term
that all of them share, and

    u_b = e^{L_a - L_b} u_a - integral from a to b of e^{L - L_b} (e^{S - S_a} sum_j w_j f_j + p) dlambda,

`L' = l`, `p' = s p + b`, p_a = 0, w_j Lagrange's polynomials (`undiffuse.solvers.carrying`). The corrector makes a step
anew with the f at its end among the f_j. In the half log-SNR `l = 0, s = -1, b = 0` and `l = 1, s = 0, b = 0` are the
noise's and the data's methods of `Multistep`.

From the statistics' end to sigma = 0 the step is that of Gaussian data, for which, in a coordinate of mean m and
variance c, `l = sigma^2 / (alpha^2 c + sigma^2)` and x - alpha m goes like `sigma / sqrt(l)`: to `u + (E[x_0] - u) /
(1 + sqrt(1 - l))`, E[x_0] itself where l = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.sums import weighted_sum
from undiffuse.paths import Path
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver
from undiffuse.solvers.carrying import Basis, Carriage, carriage
from undiffuse.solvers.level import Level
from undiffuse.solvers.multistep import Multistep
from undiffuse.solvers.polynomials import COORDINATES, lagrange
from undiffuse.solvers.statistics import ModelStatistics

# Infinite at sigma = 0, or at alpha = 0: no polynomial of them goes there.
_INFINITE = ("half-log-snr", "sigma")
# As `Multistep`: where alpha is 0 the model is asked at this sigma / (scale alpha), or in the middle of the step.
_EARLIEST = 20.0
# x is u where alpha = 1.
_UNIT = Level(0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class _Past:
    """What a run remembers: evaluated levels and their f, the newest first, and its last step.

    The f are all carried to the newest level. `x` is where the last step began, `x_next` what it made; another x met
    next was changed on the way and is taken as it is.
    """

    levels: tuple[Level, ...] = ()
    values: tuple[Tensor, ...] = ()
    x: Tensor | None = None
    x_next: Tensor | None = None


@dataclass(frozen=True)
class DPMv3(Solver):
    """DPM-Solver-v3: one call a step, for the model, the path and the shape that the statistics are of.

    Args:
        statistics: of the model, see `model_statistics`.
        points: evaluations of the predictor's polynomial, the one at the step's start among them. The corrector takes
            one more.
        corrector: predict, evaluate, correct; "half": only at levels with sigma < alpha, for strong guidance.
        variable: of the polynomials: "angle", "canonical" (sigma / (alpha + sigma)), or the paper's "half-log-snr",
            or "sigma" (sigma / alpha); by these two the step to sigma = 0 goes by one evaluation.
        pseudo: divided differences as if they were derivatives at the step's start, the paper's pseudo order: of order
            2 at most.

    Raises:
        ArgumentError: a setting out of its range.
    """

    evals_per_step: ClassVar[int] = 1

    statistics: ModelStatistics
    points: int = 2
    corrector: bool | Literal["half"] = True
    variable: str = "angle"
    pseudo: bool = False

    def __post_init__(self):
        if not isinstance(self.statistics, ModelStatistics):
            raise ArgumentError(
                f"statistics: {type(self.statistics).__name__} given, expected those of a model: "
                "ud.model_statistics(denoiser, x_0), or ud.ModelStatistics.load(file)"
            )
        if not (type(self.points) is int and 1 <= self.points <= 4):
            raise ArgumentError(f"points is {self.points!r}: expected 1 to 4 evaluations for the polynomial")
        if not (isinstance(self.corrector, bool) or self.corrector == "half"):
            raise ArgumentError(f"corrector is {self.corrector!r}: expected True, False or 'half'")
        choose(self.variable, COORDINATES, "variable")

    @property
    def order(self) -> float:  # type: ignore[override]
        return min(self.points + (self.corrector is True), 2 if self.pseudo else 8)

    def for_event(self, event: tuple[int, ...]) -> DPMv3:  # type: ignore[override]
        self.statistics.check_event(event)
        return self

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """As `Multistep()` for data of that shape."""
        return self._like.default_grid(path, steps)

    @property
    def _like(self) -> Multistep:
        """The default solver of the library: its grid, and where it asks out of alpha = 0, suit here too."""
        return Multistep().for_event(self.statistics.event)

    def init(self, field: Field, x: Event, t: Scalar) -> Any:
        self.statistics.check_model(field.path, getattr(field, "field", field))
        return _Past()

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        past: _Past = state if state is not None else _Past()
        start, end = (Level.of(field, time, 1.0) for time in (t, s))
        if start.alpha == 0:
            start, x, value = self._first(field, x, start, end)
        else:
            value = self._remainder(field(x, t), x, start)
        old = past.values
        if past.levels:
            x, old = self._arrived(past, x, start, value)
        levels, values = (start, *past.levels)[: self.points], (value, *old)[: self.points]
        if end.sigma == 0:
            return self._last(x, start, end, levels, values), _Past()
        made = self._carriage(start.half_log_snr, end.half_log_snr, levels)
        moved = _moved(made, x, start, end, values)
        return moved, _Past(levels, values, x, moved)

    def _first(self, field: Field, x: Event, start: Level, end: Level) -> tuple[Level, Event, Event]:
        """Out of alpha = 0: a level inside, x there, and f, asked where x is nothing but its noise.

        To the beginning of the statistics as if E[x_0] stayed, `sigma z + alpha E[x_0]`, from there by their l.
        """
        earliest = math.atan(_EARLIEST * self._like.unit)
        theta = torch.tensor(max(earliest, 0.5 * (start.theta + end.theta)), dtype=torch.float64)
        t = field.path.time_of_angle(theta)
        level = Level.of(field, t, 1.0)
        pure = x * (level.sigma / start.sigma)
        value = self._remainder(field(pure, t), pure, level)
        place = min(float(self.statistics.half_log_snr[0]), level.half_log_snr)
        u = x * ((2 - self._linear(place, x)) * (math.exp(-place) / start.sigma)) - value
        if place < level.half_log_snr:
            # What statistics say of f counts for nothing here: it is taken as it was found.
            still = replace(self.statistics, scaling=_zero(self.statistics), bias=_zero(self.statistics))
            made = carriage(still, (place, level.half_log_snr), self._basis((level,)))
            u = _moved(made, u, _UNIT, _UNIT, (value,))
        return level, level.alpha * u, value

    def _arrived(self, past: _Past, x: Event, start: Level, value: Event) -> tuple[Event, tuple[Tensor, ...]]:
        """x at the end of the last step, corrected where it is to be, and the older f carried there."""
        before = past.levels[0]
        known = (before, start, *past.levels[1:])[: self.points + 1]
        made = self._carriage(before.half_log_snr, start.half_log_snr, known)
        correct = self.corrector is True or (self.corrector == "half" and start.sigma < start.alpha)
        if correct and past.x_next is x and past.x is not None:
            back = (value - made.gain.to(x)) / made.grow.to(x)
            x = _moved(made, past.x, before, start, (past.values[0], back, *past.values[1:])[: self.points + 1])
        return x, tuple(_carried(made, f) for f in past.values)

    def _last(self, x: Event, start: Level, end: Level, levels: tuple[Level, ...], values: tuple[Tensor, ...]) -> Event:
        """To sigma = 0: to the end of the statistics, and from there as Gaussian data."""
        u, f, place = x / start.alpha, values[0], float(self.statistics.half_log_snr[-1])
        if start.half_log_snr < place:
            if self.variable in _INFINITE:
                levels, values = levels[:1], values[:1]
            made = self._carriage(start.half_log_snr, place, levels)
            u = _moved(made, x, start, _UNIT, values)
            f = _carried(made, weighted_sum(values, self._basis(levels)(np.array([place]))[:, 0].tolist()))
        linear = self._linear(max(place, start.half_log_snr), x).clamp(0.0, 1.0)
        return end.alpha * (u - (linear * u + f) / (1 + (1 - linear).sqrt()))

    def _remainder(self, denoised: Event, x: Event, level: Level) -> Event:
        """`f = (1 - l) u - E[x_0]`."""
        return torch.addcmul(-denoised, 1 - self._linear(level.half_log_snr, x), x, value=1 / level.alpha)

    def _linear(self, half_log_snr: float, like: Tensor) -> Tensor:
        return self.statistics.at(torch.tensor(half_log_snr, dtype=torch.float64))[0].to(like)

    def _carriage(self, start: float, end: float, levels: tuple[Level, ...]) -> Carriage:
        return carriage(self.statistics, (start, end), self._basis(levels))

    def _basis(self, levels: tuple[Level, ...]) -> Basis:
        """Polynomials through evaluations at these levels, functions of the half log-SNR."""
        coordinate = COORDINATES[self.variable]
        nodes = coordinate(np.array([level.theta for level in levels])).tolist()
        make = divided if self.pseudo else lagrange
        return lambda places: make(nodes, coordinate(np.arctan(np.exp(-places))))


def divided(nodes: list[float], points: np.ndarray) -> np.ndarray:
    """Weights (nodes, points) of the values in `sum_i [y_0 ... y_i] (y - y_0)^i`, divided differences of all nodes."""
    weights = np.zeros((len(nodes), len(points)))
    for i in range(len(nodes)):
        for k in range(i + 1):
            others = [nodes[k] - nodes[m] for m in range(i + 1) if m != k]
            weights[k] += (points - nodes[0]) ** i / np.prod(others)
    return weights


def _zero(statistics: ModelStatistics) -> Tensor:
    return torch.zeros_like(statistics.scaling)


def _carried(made: Carriage, value: Tensor) -> Tensor:
    return torch.addcmul(made.gain.to(value), made.grow.to(value), value)


def _moved(made: Carriage, x: Event, start: Level, end: Level, values: tuple[Tensor, ...]) -> Event:
    """x at the end of a step, from remainders that are carried to its start."""
    moved = (made.keep * (end.alpha / start.alpha)).to(x) * x - (made.offset * end.alpha).to(x)
    for weight, value in zip(made.weights, values, strict=True):
        moved = torch.addcmul(moved, (weight * end.alpha).to(x), value, value=-1)
    return moved
