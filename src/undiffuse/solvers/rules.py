"""Rules that make one step, linear in x and in what the denoiser says: for iterations over a whole grid.

x_{j+1} = a_j x_j + sum_r w_{j,r} D(x_{j+r}, t_{j+r}),    r = -1, 0, 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from undiffuse.paths import Path
from undiffuse.solvers.base import Field, scales
from undiffuse.solvers.exponential import DDIM, exponential_coefficients
from undiffuse.solvers.multistep import DPMpp2M
from undiffuse.solvers.runge_kutta import Euler, velocity_coefficients

# The time before t (None at the start of the grid), t and s of a step from t to s.
Times = tuple[Tensor | None, Tensor, Tensor]
# Of x_j, and of the denoiser at the points j - 1, j and j + 1.
Weights = tuple[float, float, float, float]


def ddim_weights(field: Field, times: Times) -> Weights:
    """Of DDIM with eta = 0."""
    on_x, on_denoised, _ = exponential_coefficients(field, *times[1:])
    return on_x, 0.0, on_denoised, 0.0


def euler_weights(field: Field, times: Times) -> Weights:
    """Of Euler's method in the path's time."""
    _, t, s = times
    alpha_s, sigma_s = scales(field, s)
    if sigma_s == 0:
        return 0.0, 0.0, alpha_s, 0.0
    h = float(s) - float(t)
    p, q = velocity_coefficients(field, t)
    return 1 + h * p, 0.0, h * q, 0.0


def dpmpp_2m_weights(field: Field, times: Times) -> Weights:
    """Of DPM-Solver++(2M), `times` beginning with the time before t, or None."""
    before, t, s = times
    on_x, on_denoised, q = exponential_coefficients(field, t, s)
    q_before = exponential_coefficients(field, before, t)[2] if before is not None else 0.0
    if q == 0 or q_before == 0:
        return on_x, 0.0, on_denoised, 0.0
    share = 1 + 0.5 * math.log(q) / math.log(q_before)
    return on_x, on_denoised * (1 - share), on_denoised * share, 0.0


def trapezoid_weights(field: Field, times: Times) -> Weights:
    """Of the trapezoidal rule for `d(x / sigma) = D d(alpha / sigma)`, exact where D is linear in alpha / sigma.

    `x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - q) (D_t + D_s) / 2`; to sigma = 0 DDIM's step.
    """
    on_x, on_denoised, _ = exponential_coefficients(field, *times[1:])
    if on_x == 0:
        return 0.0, 0.0, on_denoised, 0.0
    return on_x, 0.0, 0.5 * on_denoised, 0.5 * on_denoised


@dataclass(frozen=True)
class Rule:
    """How one step is made: its order, its own grid, its weights, and whether they ask beyond the step's start."""

    order: float
    grid: Callable[[Path, int], Tensor]
    weights: Callable[[Field, Times], Weights]
    implicit: bool = False


RULES: dict[str, Rule] = {
    "ddim": Rule(1, DDIM().default_grid, ddim_weights),
    "dpmpp-2m": Rule(2, DPMpp2M().default_grid, dpmpp_2m_weights),
    "euler": Rule(1, Euler().default_grid, euler_weights),
    "trapezoid": Rule(2, DDIM().default_grid, trapezoid_weights, implicit=True),
}
