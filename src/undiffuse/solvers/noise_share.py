"""The noise of a reverse SDE as a share of the forward one's, constant between two noise levels and 0 outside them.

For any eta(lambda) >= 0, lambda = log(alpha / sigma), the marginals of the path are those of

    d (x / sigma) = [(1 + eta^2) e^lambda E[x_0 | x] - eta^2 x / sigma] d lambda + sqrt(2) eta dW,

the PF-ODE and eta^2 times Langevin dynamics at the level (eq. 4.1.6 in lambda; Xue et al. 2023, section 4, with tau for
eta). It is linear but for E[x_0 | x], so that over a step from t to s

    x_s = (sigma_s / sigma_t) e^{-N} x_t + alpha_s integral of (1 + eta^2) e^{-K(lambda)} E[x_0 | x] d lambda
          + sigma_s sqrt(1 - e^{-2 N}) z,

N the integral of eta^2 over the step, K(lambda) that of 1 + eta^2 from lambda to lambda_s. Both are piecewise linear:
where an end of the interval falls into a step, the pieces are integrated each; no step is split.

With polynomials through past E[x_0] for E[x_0], as in `undiffuse.solvers.multistep`, the means have the order of the
polynomials, but what the noise of a step does to E[x_0] within it is known to no polynomial: for k >= 2 points, or with
a corrector, what steps miss of it and what the next ones make good cancel in the variance to the weak order 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from undiffuse.solvers.level import Level
from undiffuse.solvers.polynomials import lagrange, snr_weights


@dataclass(frozen=True)
class NoiseShare:
    """eta for half log-SNRs from `first` to `last`, which may be infinite, and 0 elsewhere."""

    eta: float
    first: float
    last: float

    @staticmethod
    def between(eta: float, noisy: tuple[float, float], unit: float) -> NoiseShare:
        """eta between two values of sigma / alpha, for half log-SNRs of alpha in units of the data's scale."""
        low, high = noisy
        first = math.log(unit) - math.log(high) if high < math.inf else -math.inf
        return NoiseShare(eta, first, math.log(unit) - math.log(low) if low > 0 else math.inf)

    def spent(self, start: float, end: float) -> float:
        """N: the integral of eta^2 between two half log-SNRs; `start` may be -inf."""
        if self.eta == 0:
            return 0.0
        return self.eta**2 * max(0.0, min(end, self.last) - max(start, self.first))

    def spread(self, start: float, end: float) -> tuple[float, float]:
        """`(e^{-N}, sqrt(1 - e^{-2 N}))`: what is left of the old noise, and what is fresh, both in units of sigma."""
        spent = self.spent(start, end)
        return math.exp(-spent), math.sqrt(-math.expm1(-2 * spent))

    def step(self, start: Level, end: Level) -> tuple[float, float]:
        """Weight of x in a step, and the standard deviation of its fresh noise; the start may be alpha = 0."""
        if end.sigma == 0:
            return 0.0, 0.0
        kept, fresh = self.spread(start.half_log_snr if start.alpha > 0 else -math.inf, end.half_log_snr)
        return end.sigma / start.sigma * kept, end.sigma * fresh

    def weights(
        self, rule: str, start: Level, end: Level, levels: Sequence[Level], alpha: float
    ) -> tuple[float, list[float]]:
        """Weights of x and of E[x_0] at the levels in a step to `alpha`; of the newest alone where it ends in data."""
        if end.sigma == 0:
            return 0.0, [alpha]
        nodes = tuple(level.half_log_snr for level in levels)
        found = noisy_weights(self, rule, nodes, (start.half_log_snr, end.half_log_snr))
        return self.step(start, end)[0], [alpha * w for w in found]

    def pieces(self, start: float, end: float) -> list[tuple[float, float, float]]:
        """`(1 + eta^2, from, to)` of the parts of a step in which it is constant."""
        inner = [edge for edge in (self.first, self.last) if start < edge < end]
        return [
            (1 + self.eta**2 if self.first <= a and b <= self.last else 1.0, a, b)
            for a, b in pairwise([start, *inner, end])
        ]


@lru_cache(maxsize=16384)
def noisy_weights(
    share: NoiseShare, rule: str, nodes: tuple[float, ...], span: tuple[float, float]
) -> tuple[float, ...]:
    """`integral of (1 + eta^2) e^{-K(lambda)} l_j d lambda` over a step: the weights of E[x_0], over alpha_s.

    Args:
        share: eta.
        rule: "exact"; "midpoint": the polynomial's value in the middle of the step, times the integral of 1.
        nodes: half log-SNRs of past evaluations, the newest first.
        span: half log-SNRs of the step's start and end.
    """
    start, end = span
    if rule == "midpoint" and len(nodes) > 1:
        length = -math.expm1(start - end - share.spent(start, end))
        return tuple((length * lagrange(nodes, np.array([0.5 * (start + end)]))[:, 0]).tolist())
    total = np.zeros(len(nodes))
    for kappa, a, b in share.pieces(start, end):
        total += math.exp(b - end - share.spent(b, end)) * np.array(snr_weights(kappa, nodes, (a, b)))
    return tuple(total.tolist())
