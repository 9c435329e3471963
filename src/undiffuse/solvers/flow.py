"""The probability flow in the coordinate that is regular at both ends: the angle.

With `theta = atan2(sigma, alpha)`, `n = hypot(alpha, sigma)` and `y = x / n` it is on every path (Prop. 6.3.3)

    y = cos(theta) E[x_0 | x] + sin(theta) E[eps | x],    dy / dtheta = cos(theta) E[eps | x] - sin(theta) E[x_0 | x].

The second line says that y and its slope are (E[x_0], E[eps]) turned by theta, so either pair gives the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.adaptive import Solution, Tolerance, solve
from undiffuse.solvers.base import Bound, Event, Field, Noise, Scalar, Solver
from undiffuse.solvers.pairs import PAIRS, Pair


def norm_at(path: Path, t: float | Tensor) -> float:
    """`n = hypot(alpha, sigma)`."""
    time = torch.as_tensor(t, dtype=torch.float64)
    return math.hypot(float(path.alpha(time)), float(path.sigma(time)))


class Flow:
    """`dy / dtheta` of a denoiser, for samples at angles of their own.

    Args:
        bound: the denoiser, with its condition.
        shape: (B, *event) of all samples; states are (n, D).
    """

    def __init__(self, bound: Bound, shape: tuple[int, ...]):
        self.bound, self.path = bound, bound.path
        self.event = tuple(shape[1:])

    def angle(self, t: float | Tensor) -> float:
        return float(self.path.angle(torch.as_tensor(t, dtype=torch.float64)))

    def time(self, theta: float) -> float:
        return float(self._times(torch.tensor([theta], dtype=torch.float64))[0])

    def described(self, t: float | Tensor, s: float | Tensor) -> Callable[[float], str]:
        """A position between two times in words."""
        return lambda theta: f"t = {self.time(theta):.6g} on the way from {float(t):.6g} to {float(s):.6g}"

    def _times(self, theta: Tensor) -> Tensor:
        low = max(self.path.t_min, min(self.bound.field.t_low, self.path.t_max))
        return self.path.time_of_angle(theta).clamp(low, self.path.t_max)

    def __call__(
        self, theta: Float[Tensor, " n"], y: Float[Tensor, "n d"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        time = self._times(theta)
        # Scales from the time itself, so that its rounding near an end is seen by all alike.
        alpha, sigma = self.path.alpha(time), self.path.sigma(time)
        alpha, sigma, n = (scale[:, None].to(y) for scale in (alpha, sigma, torch.hypot(alpha, sigma)))
        x_0, noise = self.bound.estimate((y * n).reshape(len(y), *self.event), time, rows)
        return torch.addcmul(alpha * noise.reshape(y.shape), sigma, x_0.reshape(y.shape), value=-1) / n


def score_at(theta: Float[Tensor, " n"], y: Float[Tensor, "n d"], slope: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The score of y by its slope, `-E[eps | x] / sin(theta)`."""
    sin, cos = torch.sin(theta).to(y)[:, None], torch.cos(theta).to(y)[:, None]
    return -(y + cos / sin * slope)


def flow(
    field: Denoiser | Bound,
    x: Event,
    t: float | Tensor,
    s: float | Tensor,
    *,
    pair: Pair,
    tolerance: Tolerance,
    keep: bool = False,
    first: tuple[Tensor | None, Tensor] | None = None,
) -> tuple[Event, Solution, Flow]:
    """x carried by the probability flow from time t to time s, either way; the solution in (theta, y); its slope.

    Raises:
        SamplingError: the tolerance cannot be met.
    """
    bound = field if isinstance(field, Bound) else Bound(field)
    slope = Flow(bound, tuple(x.shape))
    y = (x / norm_at(bound.path, t)).reshape(len(x), -1)
    solution = solve(
        slope,
        y,
        slope.angle(t),
        slope.angle(s),
        pair,
        tolerance,
        first=first,
        keep=keep,
        describe=slope.described(t, s),
    )
    return (solution.y * norm_at(bound.path, s)).reshape(x.shape), solution, slope


@dataclass(frozen=True)
class Adaptive(Solver):
    """The probability flow to a tolerance, with steps of its own for every sample.

    A sample's result and cost do not depend on who shares its batch, but for the rounding of batched kernels. `steps`
    of `sample` has no meaning here; a grid's times are all visited, so that fewer cost less. Where the path ends in
    sigma = 0 and the model knows no answer below `t_low`, the step from there to the end is the closed form
    `alpha E[x_0 | x]`.

    Args:
        method: "dopri5", "tsit5" (both of order 5, 6 evaluations a step) or "bosh3" (of order 3, 3 evaluations).
        rtol, atol: error allowed in a step, relative and absolute, in units of `x / hypot(alpha, sigma)`.
        max_steps: tried steps per sample and interval of the grid.

    Raises:
        ArgumentError: an unknown method, tolerances out of range. While sampling, SamplingError: they cannot be met.
    """

    adaptive: ClassVar[bool] = True
    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000

    def __post_init__(self):
        choose(self.method, PAIRS, "method")
        self._tolerance()

    def _tolerance(self) -> Tolerance:
        return Tolerance(self.rtol, self.atol, max_steps=self.max_steps)

    @property
    def order(self) -> float:  # type: ignore[override]
        return PAIRS[self.method].order

    @property
    def evals_per_step(self) -> int:  # type: ignore[override]
        return PAIRS[self.method].stages - 1

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """From one end to the other, whatever `steps`."""
        return torch.tensor([path.t_max, path.t_min], dtype=torch.float64)

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        if not isinstance(field, Bound):
            raise ArgumentError(f"an adaptive solver needs a Bound denoiser, given {type(field).__name__}")
        field.track(len(x))
        path, start, end = field.path, float(t), float(s)
        closed = field.field.t_low > end and float(path.sigma(s)) == 0
        stop = min(field.field.t_low, start) if closed else end
        slope, step = (None, None) if state is None else (state[1] if state[0] is x else None, state[2])
        x, solution, way = flow(
            field,
            x,
            start,
            stop,
            pair=PAIRS[self.method],
            tolerance=self._tolerance(),
            first=None if step is None else (slope, step),
        )
        theta = way.angle(stop)
        denoised = (math.cos(theta) * solution.y - math.sin(theta) * solution.slope).reshape(x.shape)
        if closed:
            denoised = field(x, torch.tensor(stop, dtype=torch.float64))
            x = denoised * float(path.alpha(s))
        field.denoised = denoised
        return x, (x, solution.slope, solution.step)
