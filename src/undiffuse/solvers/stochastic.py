"""Solvers that draw noise: ancestral sampling, and Heun's method with churn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.sharing import alone
from undiffuse.core.sums import combine
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, ask, scales
from undiffuse.solvers.exponential import exponential_coefficients


def posterior_coefficients(field: Field, t: Tensor, s: Tensor) -> tuple[float, float, float]:
    """Weights of x_t and x_0 in the mean of `p(x_s | x_t, x_0)`, and its standard deviation (Lemma 4.4.2)."""
    ratio, _, q = exponential_coefficients(field, t, s)
    alpha_s, sigma_s = scales(field, s)
    fresh = (1 - q) * (1 + q)
    return ratio * q, alpha_s * fresh, sigma_s * math.sqrt(fresh)


@dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling: a draw of `p(x_s | x_t, x_0)` at `x_0 = E[x_0 | x_t]` (Ho et al. 2020; eq. 4.4.8)."""

    order: ClassVar[int] = 1
    evals_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        answer = ask(field, x, t)
        on_x, on_denoised, std = posterior_coefficients(field, t, s)
        mean = answer.plus(x, on_x, on_denoised)
        return (torch.add(mean, noise(), alpha=std) if std > 0 else mean), state


def correction_weight(q: float) -> float:
    """Weight of the second denoiser: Heun's step is Euler's with D moved by this share of its change.

    From `x_s / alpha_s = y + (u_s - u) / 2 ((y - D_1) / u + (y_e - D_2) / u_s)`, `y = x / alpha`, `q = u_s / u`.
    """
    return 0.5 / q


@dataclass(frozen=True)
class EDM(Solver):
    """Heun's method in `u = sigma / alpha` of `x / alpha`, each step preceded by added noise.

    Karras et al. 2022, algorithm 2. In a run of N steps, a step from u in [S_min, S_max] first goes up to
    `u (1 + gamma)`, `gamma = min(S_churn / N, sqrt(2) - 1)`, by noise of size S_noise, but not above the path's
    own end. S_churn = 0 draws nothing. A step out of alpha = 0 is DDIM's.

    Args:
        S_churn, S_min, S_max, S_noise: as in the paper; the three levels are values of sigma / alpha.
        steps: N. The loop fills it in.
    """

    order: ClassVar[int] = 2
    evals_per_step: ClassVar[int] = 2
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    steps: int | None = None

    def __post_init__(self):
        if not (self.S_churn >= 0 and 0 <= self.S_min <= self.S_max and self.S_noise > 0):
            raise ArgumentError(f"{self}: expected S_churn >= 0, 0 <= S_min <= S_max, S_noise > 0")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.S_churn > 0

    def for_steps(self, steps: int) -> EDM:
        return self if self.steps is not None else replace(self, steps=steps)

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        if self.stochastic:
            x, t = self.churn(field, x, t, noise)
        first = field(x, t)
        on_x, on_denoised, q = exponential_coefficients(field, t, s)
        euler = combine(x, on_x, first, on_denoised)
        if q == 0:
            return euler, state
        average = torch.lerp(first, field(euler, s), correction_weight(q))
        return combine(average, on_denoised, x, on_x, spent=average if alone(average) else None), state

    def churn(self, field: Field, x: Tensor, t: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """x carried up to a noisier time, and that time; as they are where this step has no churn."""
        if self.steps is None:
            raise ArgumentError("EDM's churn is shared among the steps of a run: give EDM(steps=...)")
        alpha, sigma = scales(field, t)
        if alpha == 0 or not self.S_min <= sigma / alpha <= self.S_max:
            return x, t
        path, level = field.path, sigma / alpha
        raised = level * (1 + min(self.S_churn / self.steps, math.sqrt(2) - 1))
        time = path.time_of(torch.tensor(-math.log(raised), dtype=torch.float64)).clamp(max=path.t_max)
        alpha_up, sigma_up = scales(field, time)
        # From the time itself: on a path that ends below `raised` it is the end. Rounding must not go below 0.
        added = self.S_noise * math.sqrt(max(0.0, sigma_up**2 - (alpha_up * level) ** 2))
        if added == 0:
            return x, t
        return combine(x, alpha_up / alpha, noise(), added), time
