"""Predictor-corrector sampling: after each step of a solver, Langevin steps at the time it arrived at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.solvers.annealed import fixed_langevin, snr_langevin
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, scales

OfLevel = Callable[[float], float]

_RULES = {
    "score": snr_langevin,
    "level": lambda field, x, t, snr, noise: fixed_langevin(field, x, t, 2 * snr**2, noise),
}


@dataclass(frozen=True)
class LangevinCorrector:
    """K unadjusted Langevin steps `x + eta score + sqrt(2 eta) z` at a fixed time (Song et al. 2021, algorithms 4, 5).

    What a predictor got wrong decays by `1 - eta / V` a step in a direction of variance V. What a step itself gets
    wrong stays: on a Gaussian the variance settles at `V / (1 - eta / (2 V))`. With an exact score the steps can only
    undo the predictor's error of discretisation; a learned score they use to pull x to where it is right.

    With `r = eta / sigma^2`, the step relative to the level:

    - rule "score": `eta = 2 (snr |z| / |score|)^2` for each draw z, as published, but for each sample by itself where
      they take means over the batch, so that a sample does not depend on its neighbours; r is at most 1. In many
      dimensions r is close to `2 snr^2 (1 + alpha^2 C / sigma^2)` for data of variance C. In few it depends on x, and
      the law is wrong: take the other rule;
    - rule "level": `eta = 2 (snr sigma)^2`, r = 2 snr^2, their annealed Langevin corrector.

    Deviation: on VP and sub-VP they multiply eta by `1 - beta_i`, the share of signal that a step of the chain keeps.
    It is 1 in the limit of many steps (0.98 at the least with 1,000) and is left out, so that a correction does not
    depend on the grid.

    Args:
        snr: in (0, 1), or a function of the level sigma / alpha. Published: 0.16 (CIFAR-10, VE), 0.01 (VP).
        steps: K, or a function of the level; may be 0 there.
        rule: "score" or "level".

    Raises:
        ArgumentError: snr outside (0, 1), fewer than one step (as a function: fewer than 0), an unknown rule.
    """

    snr: float | OfLevel = 0.16
    steps: int | Callable[[float], int] = 1
    rule: str = "score"

    def __post_init__(self):
        choose(self.rule, _RULES, "rule of the corrector")
        if not callable(self.snr):
            _check_snr(self.snr, "")
        if not callable(self.steps):
            _check_steps(self.steps, 1, "")

    def correct(self, field: Field, x: Event, t: Scalar, noise: Noise) -> Event:
        """x after the corrections at time t, sigma(t) > 0; K calls of the field, K draws."""
        snr, steps = self.snr, self.steps
        if callable(snr) or callable(steps):
            alpha, sigma = scales(field, t)
            level = sigma / alpha if alpha > 0 else float("inf")
            snr = _check_snr(snr(level), f" at the level {level:g}") if callable(snr) else snr
            steps = _check_steps(steps(level), 0, f" at the level {level:g}") if callable(steps) else steps
        for _ in range(steps):
            x = _RULES[self.rule](field, x, t, snr, noise)
        return x


def _check_snr(snr: float, where: str) -> float:
    if not 0 < snr < 1:
        raise ArgumentError(f"snr is {snr}{where}: expected 0 < snr < 1; a step of 2 snr^2 >= 2 diverges. Try 0.16")
    return snr


def _check_steps(steps: int, least: int, where: str) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        raise ArgumentError(f"steps is {steps!r}{where}: expected a whole number of at least {least}")
    return steps


@dataclass(frozen=True)
class Stay(Solver):
    """No prediction, `x_s = x_t`: what is left to a corrector is corrector-only sampling ("C" of Song et al. 2021).

    x itself stays, as published, not x / alpha: on VP its variance is then right at every time where the data have
    variance 1. (`AnnealedLangevin` carries x / alpha; on VE the two are one.) The step to sigma = 0 is
    `alpha_s E[x_0 | x_t]`.
    """

    order: ClassVar[int] = 0
    evals_per_step: ClassVar[int] = 0

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        alpha_s, sigma_s = scales(field, s)
        return (x if sigma_s > 0 else field(x, t) * alpha_s), state
