"""Cumulants of the posterior of x_0 given x_t, of every order: Tweedie's formula carried on."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.fields.tweedie import scales_with_signal
from undiffuse.oracles.law import Cond, Event, Law
from undiffuse.paths import Path


def posterior_cumulants(
    law: Law,
    path: Path,
    t: float | Float[Tensor, ""],
    x_t: Event,
    direction: Float[Tensor, "*event"] | Event,
    order: int = 4,
    cond: Cond = None,
) -> Float[Tensor, "b n"]:
    """Cumulants `kappa_1 ... kappa_n` of `v . x_0` given x_t: mean, variance, third cumulant, ...

    `p(x_0 | x_t)` is an exponential family in `eta = alpha x_t / sigma^2`, and its log-normaliser is, up to a constant,
    `log p_t(x_t) + |x_t|^2 / (2 sigma^2)`. A step h v of eta moves x_t by `(sigma^2 / alpha) h v`, so that

        K(h) = log p_t(x_t + (sigma^2 / alpha) h v) + h (v . x_t) / alpha + h^2 sigma^2 |v|^2 / (2 alpha^2)

    has `kappa_n = K^(n)(0)` (Efron 2011): n = 1 is Tweedie's formula, n = 2 the posterior variance along v, and from
    n = 3 on only `(sigma^2 / alpha)^n` times the derivative of `log p_t` is left. Computed in float64, by
    differentiating n times: the cost doubles with each order.

    Args:
        t: one time.
        direction: v, (*event), or one for each row, (B, *event); need not be a unit vector.
        order: n >= 1.

    Raises:
        ArgumentError: order < 1; a direction of another shape; t off the path, or where alpha = 0; a law without a
            density at t.
    """
    if order < 1:
        raise ArgumentError(f"order is {order}: expected at least 1, the mean")
    if tuple(direction.shape) not in (law.event, tuple(x_t.shape)):
        raise ArgumentError(
            f"direction has shape {tuple(direction.shape)}: expected {law.event}, or {tuple(x_t.shape)}"
        )
    time = torch.as_tensor(t, dtype=torch.float64)
    alpha, sigma = (float(scale) for scale in scales_with_signal(path, time, time))
    marginal = law.perturbed(path, time)
    x, v = x_t.double(), direction.double().expand(x_t.shape)
    along = (v * x).flatten(1).sum(1) / alpha
    spread = (sigma / alpha) ** 2 * v.square().flatten(1).sum(1)
    with torch.enable_grad():
        step = torch.zeros(len(x), dtype=torch.float64, device=x.device, requires_grad=True)
        moved = x + sigma**2 / alpha * step.reshape(-1, *[1] * (x.ndim - 1)) * v
        value = marginal.log_prob(moved, cond) + step * along + 0.5 * step.square() * spread
        cumulants = []
        for _ in range(order):
            value = _slope(value, step)
            cumulants.append(value)
    return torch.stack([c.detach() for c in cumulants], 1).to(x_t.dtype)


def _slope(value: Tensor, step: Tensor) -> Tensor:
    if not value.requires_grad:  # a constant: a Gaussian from its third cumulant on
        return torch.zeros_like(step)
    (slope,) = torch.autograd.grad(value.sum(), step, create_graph=True, allow_unused=True)
    return torch.zeros_like(step) if slope is None else slope
