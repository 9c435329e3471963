"""Exponential integrators: the linear part of the PF-ODE in closed form, the denoiser constant in a step.

With `q = alpha_t sigma_s / (alpha_s sigma_t) = exp(lambda_t - lambda_s)`, a number in [0, 1] that needs no
logarithm and is 0 where the step starts in alpha = 0 or ends in sigma = 0, the flow is

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - q) D,    D an average of E[x_0 | x] over the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, ask, scales, spare, spends


def exponential_coefficients(field: Field, t: Tensor, s: Tensor) -> tuple[float, float, float]:
    """`(sigma_s / sigma_t, alpha_s (1 - q), q)`: the weights of x_t and of the denoiser, and q."""
    (alpha, sigma), (alpha_s, sigma_s) = scales(field, t), scales(field, s)
    ratio = sigma_s / sigma
    q = ratio * alpha / alpha_s
    return ratio, alpha_s * (1 - q), q


@dataclass(frozen=True)
class DDIM(Solver):
    """`x_s = alpha_s D + sqrt(sigma_s^2 - nu^2) eps + nu z`, `nu = eta sigma_s sqrt(1 - q^2)`.

    Song, Meng and Ermon 2021, eq. 12. eta = 0 is the exponential Euler method (Prop. 9.2.1); eta = 1 is
    ancestral sampling.

    Args:
        eta: in [0, 1], the share of the posterior's standard deviation that is drawn anew.
    """

    order: ClassVar[int] = 1
    evals_per_step: ClassVar[int] = 1
    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ArgumentError(f"eta is {self.eta}: expected 0 (deterministic) to 1 (ancestral)")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @spends
    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        answer = ask(field, x, t)
        on_x, on_denoised, q = exponential_coefficients(field, t, s)
        if self.eta == 0:
            return answer.plus(x, on_x, on_denoised, spent=spare(field, x)), state
        alpha_s, sigma_s = scales(field, s)
        fresh = (1 - q) * (1 + q) * self.eta**2
        kept = math.sqrt(1 - fresh)  # sqrt(sigma_s^2 - nu^2) / sigma_s
        mean = answer.plus(x, on_x * kept, alpha_s * (1 - q * kept))
        nu = sigma_s * math.sqrt(fresh)
        return (torch.add(mean, noise(), alpha=nu) if nu > 0 else mean), state
