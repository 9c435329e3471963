"""Runge-Kutta methods for `dx / dt = alpha' E[x_0 | x] + sigma' E[eps | x]` in the path's own time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.sums import added, combine, weighted_sum
from undiffuse.paths import Path, for_values
from undiffuse.solvers.base import (
    Bound,
    Event,
    Field,
    Noise,
    Scalar,
    Solver,
    ask,
    rates,
    rates_at,
    scales,
    scales_at,
    spare,
    spends,
)
from undiffuse.solvers.grids import make_grid

Row = tuple[float, ...]


def velocity_coefficients(field: Field, t: Tensor | float) -> tuple[float, float]:
    """(p, q) with velocity `p x + q E[x_0 | x]`: `p = sigma' / sigma`, `q = alpha' - alpha p` (Prop. 6.3.2)."""
    return _velocity(*scales(field, t), *rates(field, t))


def _velocity(alpha: float, sigma: float, alpha_dot: float, sigma_dot: float) -> tuple[float, float]:
    p = sigma_dot / sigma
    return p, alpha_dot - alpha * p


def stage_coefficients(h: float, row: Row, velocities: Sequence[Row]) -> Row:
    """Weights of x, D_1, D_2, ... in `x + h sum_j row_j v_j`, from their weights in the velocities v_j so far."""
    weights = [1.0]
    for a, velocity in zip(row, velocities):
        weights = [w + h * a * v for w, v in zip_longest(weights, velocity, fillvalue=0.0)]
    return tuple(weights)


def combined(x: Event, answers: Sequence[Event], weights: Row) -> Event:
    """`weights_0 x + weights_1 D_1 + weights_2 D_2 + ...`."""
    if len(answers) == 1:
        return combine(x, weights[0], answers[0], weights[1])
    used = [(answer, weight) for answer, weight in zip(answers, weights[1:]) if weight != 0]
    return weighted_sum((x, *(answer for answer, _ in used)), (weights[0], *(weight for _, weight in used)))


def between(t: float, s: float, node: float) -> float:
    """`t + node (s - t)`."""
    return t + node * (s - t)


# Nodes, and for each of them the weights of the velocities so far in what comes after it.
Tableau = tuple[Row, tuple[Row, ...]]


class Stages(NamedTuple):
    """A step by its nodes.

    Attributes:
        velocities: (p, q), as of `velocity_coefficients`.
        rows: weights of x, D_1, D_2, ... in what comes after the node.
        short: the same of x, the state at the node and its D alone, where it goes by this velocity only.
    """

    velocities: tuple[tuple[float, float], ...]
    rows: tuple[Row, ...]
    short: tuple[Row | None, ...]

    @classmethod
    def of(cls, tableau: Tableau, t: float, s: float, velocity: Callable[[float], tuple[float, float]]) -> Stages:
        """The step from t to s."""
        h, state, by_answers = s - t, (1.0,), []
        velocities, rows, short = [], [], []
        for node, row in zip(*tableau):
            p, q = velocity(s if node == 1 else between(t, s, node))
            velocities.append((p, q))
            by_answers.append((*(p * w for w in state), q))
            state = stage_coefficients(h, row, by_answers)
            rows.append(state)
            short.append(None if any(row[:-1]) else (1.0, h * row[-1] * p, h * row[-1] * q))
        return cls(tuple(velocities), tuple(rows), tuple(short))


# By step (t, s).
Plan = Mapping[tuple[float, float], Stages]


@for_values
def _plan(path: Path, tableau: Tableau, grid: tuple[float, ...]) -> Plan:
    """Of all steps but those to sigma = 0."""
    places = {step: [between(*step, node) for node in tableau[0] if node < 1] for step in pairwise(grid)}
    times = tuple({*grid, *(time for inner in places.values() for time in inner)})
    levels, slopes = scales_at(path, times), rates_at(path, times)

    def velocity(t: float) -> tuple[float, float]:
        return _velocity(*levels[t], *slopes[t])

    return {step: Stages.of(tableau, *step, velocity) for step in places if levels[step[1]][1] > 0}


@for_values
def _last_middle(path: Path, t: float, s: float) -> float | None:
    """When `sigma / alpha` is half of what it is at t, before s, where it is 0; None where that is not asked for."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = float(path.alpha(time)), float(path.sigma(time))
    if alpha == 0 or float(path.sigma(torch.tensor(s, dtype=torch.float64))) > 0:
        return None
    middle = float(path.time_of(torch.tensor(math.log(2 * alpha / sigma), dtype=torch.float64)))
    return middle if middle >= path.t_low else None


@for_values
def _turns(path: Path, steps: int) -> bool:
    """Whether a step by Euler's method on the canonical grid turns the sign of the noise, not at the path's end."""
    times = make_grid(path, steps, "canonical")
    t, s = times[:-1], times[1:]
    growth = 1 + (s - t) * path.sigma_dot(t) / path.sigma(t)
    return bool(((growth < 0) & (path.sigma(s) > 0)).any())


class RungeKutta(Solver):
    """An explicit Runge-Kutta method, given by its Butcher tableau.

    A velocity is a combination of x and of the answers D_1, D_2, ... of the field, and so is every state inside a step:
    each is made at once from these, its weights computed as numbers, and no velocity is stored.

    A step to sigma = 0 is a closed form, for there the velocity has no value that a field could give:
    `x_s = alpha_s E[x_0 | x_t]`; where `extrapolates`, one of second order, see `last_step`.

    Attributes:
        nodes: where in the step each stage is, 0 at t and 1 at s; the first is 0.
        rows: for each stage after the first, the weights of the velocities of those before it.
        weights: of the velocities in the step.
        extrapolates: how a step to sigma = 0 is made.
    """

    nodes: ClassVar[Row]
    rows: ClassVar[tuple[Row, ...]]
    weights: ClassVar[Row]
    extrapolates: ClassVar[bool] = False

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """The canonical grid, or "karras" where a canonical step would turn the sign of the noise.

        That is `1 + (s - t) sigma' / sigma < 0`, as on VE, whose t is the logarithm of sigma. There the error of Heun's
        method with 10 / 18 / 32 steps (ring of 8 modes) is 1.2 / 0.34 / 0.10 on the canonical grid and
        0.09 / 0.02 / 0.005 on "karras".
        """
        grid = super().default_grid(path, steps)
        return make_grid(path, steps, "karras") if _turns(path, steps) else grid

    def init(self, field: Field, x: Event, t: Scalar) -> Plan | None:
        """The weights of all steps, where the times are known."""
        if not isinstance(field, Bound) or field.grid is None:
            return None
        grid = tuple(field.grid.tolist())
        inner = {node for node in self.nodes if 0 < node < 1}
        last = _last_middle(field.path, *grid[-2:]) if self.extrapolates else None
        field.foresee(
            [*(between(*step, node) for step in pairwise(grid) for node in inner), *([] if last is None else [last])]
        )
        return _plan(field.path, self._tableau, grid)

    @property
    def _tableau(self) -> Tableau:
        return self.nodes, (*self.rows, self.weights)

    @spends
    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        answer, start, end = ask(field, x, t), float(t), float(s)
        stages = state.get((start, end)) if state else None
        if stages is None:
            if scales(field, end)[1] == 0:
                return self.last_step(field, x, answer, t, s), state
            stages = Stages.of(self._tableau, start, end, lambda time: velocity_coefficients(field, time))
        if len(stages.rows) == 1:
            return answer.plus(x, *stages.rows[0], spent=spare(field, x)), state
        times = [end if node == 1 else between(start, end, node) for node in self.nodes[1:]]
        if answer.weights(*stages.velocities[0])[0] == 0:
            return self._by_velocities(field, x, answer, times, stages.velocities, end - start), state
        return self._by_answers(field, x, answer, times, stages), state

    def _by_answers(self, field: Field, x: Event, answer: Answer, times: Sequence[float], stages: Stages) -> Event:
        """Each state a sum of x and all answers before it."""
        stage, answers = x, []
        for time, row, short in zip(times, stages.rows, stages.short):
            answers.append(answer.data(stage))
            if short is not None and len(row) > len(short):
                stage = weighted_sum((x, stage, answers[-1]), short)
            else:
                stage = combined(x, answers, row)
            answer = ask(field, stage, time)
        # The last answer is used before the next call, and need not be added up.
        *weights, on_denoised = stages.rows[-1]
        if answer.on_x != 0:
            share = on_denoised * answer.on_x
            weights = [added(w, share * v) for w, v in zip_longest(weights, stages.rows[-2], fillvalue=0.0)]
        answers.append(answer.output)
        return combined(x, answers, (*weights, on_denoised * answer.on_output))

    def _by_velocities(
        self,
        field: Field,
        x: Event,
        answer: Answer,
        times: Sequence[float],
        velocities: Sequence[tuple[float, float]],
        h: float,
    ) -> Event:
        """For outputs that are velocities: each is added to all that goes by it before the next call, and not kept."""
        stage, sums = x, [x] * len(velocities)
        for k, velocity in enumerate(velocities):
            terms = [(w, part) for w, part in zip(answer.weights(*velocity), (stage, answer.output)) if w != 0]
            for j, row in enumerate(self._tableau[1][k:], start=k):
                for weight, part in terms if row[k] != 0 else ():
                    share = h * row[k] * weight
                    fresh = sums[j] is x
                    sums[j] = torch.add(x, part, alpha=share) if fresh else sums[j].add_(part, alpha=share)
            if k < len(times):
                stage = sums[k]
                answer = ask(field, stage, times[k])
        return sums[-1]

    def last_step(self, field: Field, x: Event, answer: Answer, t: Scalar, s: Scalar) -> Event:
        """`alpha_s D_1`, D_1 = E[x_0 | x_t]; where `extrapolates`, `alpha_s (2 D_m - D_1)`.

        That is the midpoint rule in `u = sigma / alpha` for `y = x / alpha`, whose velocity `(y - D) / u` is regular
        down to u = 0: D_m is the answer at u / 2, for `y_m = (y + D_1) / 2`. It takes a second call, and is not made
        where that would be below t_low, or out of alpha = 0.
        """
        alpha, alpha_s = scales(field, t)[0], scales(field, s)[0]
        middle = _last_middle(field.path, float(t), float(s)) if self.extrapolates else None
        if middle is None:
            return answer.plus(x, 0.0, alpha_s)
        half, denoised = 0.5 * scales(field, middle)[0], answer.data(x)
        y = combine(x, half / alpha, denoised, half)
        return combine(ask(field, y, middle).data(y), 2 * alpha_s, denoised, -alpha_s)


@dataclass(frozen=True)
class Euler(RungeKutta):
    """`x_s = x_t + (s - t) v(x_t, t)`; `x_s = alpha_s E[x_0 | x_t]` where sigma_s = 0."""

    order: ClassVar[int] = 1
    evals_per_step: ClassVar[int] = 1
    nodes: ClassVar[Row] = (0.0,)
    rows: ClassVar[tuple[Row, ...]] = ()
    weights: ClassVar[Row] = (1.0,)


@dataclass(frozen=True)
class Heun(RungeKutta):
    """`x_s = x_t + (s - t) / 2 (v(x_t, t) + v(x_e, s))`, x_e Euler's; the closed form where sigma_s = 0."""

    order: ClassVar[int] = 2
    evals_per_step: ClassVar[int] = 2
    nodes: ClassVar[Row] = (0.0, 1.0)
    rows: ClassVar[tuple[Row, ...]] = ((1.0,),)
    weights: ClassVar[Row] = (0.5, 0.5)


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """`x_s = x_t + (s - t) v(x_m, m)`, `m = (t + s) / 2`, x_m by Euler's method."""

    extrapolates: ClassVar[bool] = True
    order: ClassVar[int] = 2
    evals_per_step: ClassVar[int] = 2
    nodes: ClassVar[Row] = (0.0, 0.5)
    rows: ClassVar[tuple[Row, ...]] = ((0.5,),)
    weights: ClassVar[Row] = (0.0, 1.0)


@dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical method: velocities at t, twice in the middle and at s, weighted 1 : 2 : 2 : 1."""

    extrapolates: ClassVar[bool] = True
    order: ClassVar[int] = 4
    evals_per_step: ClassVar[int] = 4
    nodes: ClassVar[Row] = (0.0, 0.5, 0.5, 1.0)
    rows: ClassVar[tuple[Row, ...]] = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    weights: ClassVar[Row] = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
