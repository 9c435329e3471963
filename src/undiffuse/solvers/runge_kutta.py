"""Runge-Kutta methods for `dx / dt = alpha' E[x_0 | x] + sigma' E[eps | x]` in the path's own time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from undiffuse.paths import Path
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, combine, rates, scales
from undiffuse.solvers.grids import make_grid


def velocity_coefficients(field: Field, t: Tensor) -> tuple[float, float]:
    """(p, q) with velocity `p x + q E[x_0 | x]`: `p = sigma' / sigma`, `q = alpha' - alpha p` (Prop. 6.3.2)."""
    alpha, sigma = scales(field, t)
    alpha_dot, sigma_dot = rates(field, t)
    p = sigma_dot / sigma
    return p, alpha_dot - alpha * p


def heun_coefficients(h: float, start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float, float]:
    """Weights of x, of D(x, t) and of D(x_e, s) in Heun's step, from the velocity's (p, q) at t and at s.

    `v(x_e, s) = p_s ((1 + h p) x + h q D(x, t)) + q_s D(x_e, s)`, so no velocity is stored.
    """
    (p, q), (p_s, q_s) = start, end
    return 1 + 0.5 * h * (p + p_s * (1 + h * p)), 0.5 * h * (q + p_s * h * q), 0.5 * h * q_s


class _InPathTime(Solver):
    """What Euler's and Heun's method share: steps bounded by the growth rate of the noise in t."""

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """The canonical grid, or "karras" where a canonical step would turn the sign of the noise.

        That is `1 + (s - t) sigma' / sigma < 0`, as on VE, whose t is the logarithm of sigma. There the error of Heun's
        method with 10 / 18 / 32 steps (ring of 8 modes) is 1.2 / 0.34 / 0.10 on the canonical grid and
        0.09 / 0.02 / 0.005 on "karras".
        """
        grid = super().default_grid(path, steps)
        t, s = grid[:-1], grid[1:]
        growth = 1 + (s - t) * path.sigma_dot(t) / path.sigma(t)
        turns = (growth < 0) & (path.sigma(s) > 0)
        return make_grid(path, steps, "karras") if bool(turns.any()) else grid


@dataclass(frozen=True)
class Euler(_InPathTime):
    """`x_s = x_t + (s - t) v(x_t, t)`; `x_s = alpha_s E[x_0 | x_t]` where sigma_s = 0."""

    order: ClassVar[int] = 1
    evals_per_step: ClassVar[int] = 1

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        denoised = field(x, t)
        alpha_s, sigma_s = scales(field, s)
        if sigma_s == 0:
            return denoised * alpha_s, state
        h = float(s) - float(t)
        p, q = velocity_coefficients(field, t)
        return combine(x, 1 + h * p, denoised, h * q), state


@dataclass(frozen=True)
class Heun(_InPathTime):
    """`x_s = x_t + (s - t) / 2 (v(x_t, t) + v(x_e, s))`, x_e Euler's; the closed form where sigma_s = 0."""

    order: ClassVar[int] = 2
    evals_per_step: ClassVar[int] = 2

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        first = field(x, t)
        alpha_s, sigma_s = scales(field, s)
        if sigma_s == 0:
            return first * alpha_s, state
        h = float(s) - float(t)
        start, end = velocity_coefficients(field, t), velocity_coefficients(field, s)
        second = field(combine(x, 1 + h * start[0], first, h * start[1]), s)
        on_x, on_first, on_second = heun_coefficients(h, start, end)
        return (x * on_x).add_(first, alpha=on_first).add_(second, alpha=on_second), state
