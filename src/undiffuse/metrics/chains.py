"""Have the chains forgotten their starts, and how many independent draws are they worth? Per coordinate.

Vehtari, Gelman, Simpson, Carpenter and Bürkner 2021, "Rank-normalization, folding, and localization". Chains are
(n, chains, *event), as `Chains.samples` holds them; each is cut in halves, so that a drift within a chain counts as a
difference between two. An odd last state is left out.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import normal_quantile

Samples = Float[Tensor, "n chains *event"]
PerCoordinate = Float[Tensor, "*event"]
Halves = Float[Tensor, "half m d"]


def split_r_hat(samples: Samples, *, rank_normalised: bool = True) -> PerCoordinate:
    """`sqrt(var+ / W)`, W the variance within half chains, `var+ = (N - 1) / N W + B / N`, N their length (eq. 1-4).

    1 where the chains agree; above 1.01 they have not mixed. NaN for a coordinate that never changes.

    Args:
        samples: n >= 4 states of each chain.
        rank_normalised: the larger of two values, for the normal scores of the ranks (eq. 14) and for those of the
            distances from the median, which see chains that differ in scale; neither needs finite moments.
            False: the plain values.

    Raises:
        ArgumentError: n < 4, no chains, or a value that is not finite.
    """
    halves = _halves(samples)
    if not rank_normalised:
        return _potential(halves).reshape(samples.shape[2:])
    folded = (halves - halves.flatten(0, 1).quantile(0.5, dim=0)).abs()
    largest = torch.maximum(_potential(_normal_scores(halves)), _potential(_normal_scores(folded)))
    return largest.reshape(samples.shape[2:])


def effective_sample_size(samples: Samples, *, rank_normalised: bool = True) -> PerCoordinate:
    """`n chains / tau`, `tau = -1 + 2 sum of rho_2k + rho_2k+1` over Geyer's initial monotone sequence (eq. 10-13).

    `rho_t = 1 - (W - mean of the chains' autocovariances at lag t) / var+` counts a difference between chains as
    correlation. Chains that alternate can be worth more than their length, at most log10 of it times. NaN for a
    coordinate that never changes.

    Args:
        samples: n >= 4 states of each chain.
        rank_normalised: of the normal scores of the ranks ("bulk" size). False: of the plain values, so that
            std / sqrt(size) is the standard error of their mean.

    Raises:
        ArgumentError: n < 4, no chains, or a value that is not finite.
    """
    halves = _halves(samples)
    halves = _normal_scores(halves) if rank_normalised else halves
    n, m, _ = halves.shape
    covariance = _autocovariance(halves).mean(1) * (n / (n - 1))
    within, total = _variances(halves)
    rho = 1 - (within - covariance) / total
    rho[0] = 1
    pairs = rho[: n // 2 * 2].reshape(n // 2, 2, -1).sum(1)
    kept = (pairs > 0).cumprod(0) * pairs.cummin(0).values
    tau = (-1 + 2 * kept.sum(0)).clamp(min=1 / math.log10(n * m))
    return (n * m / tau).where(within > 0, math.nan).reshape(samples.shape[2:])


def _halves(samples: Tensor) -> Halves:
    """(n // 2, 2 chains, D) in float64."""
    if samples.ndim < 2 or samples.shape[0] < 4 or samples.shape[1] < 1:
        raise ArgumentError(
            f"samples have shape {tuple(samples.shape)}: expected (n, chains, *event), n >= 4 states of each chain"
        )
    if not bool(torch.isfinite(samples).all()):
        raise ArgumentError("samples hold a value that is not finite: leave out the chains listed in `diverged`")
    half = samples.shape[0] // 2
    rows = samples.detach().reshape(*samples.shape[:2], -1).to(torch.float64)
    return torch.cat([rows[:half], rows[half : 2 * half]], 1)


def _variances(halves: Halves) -> tuple[Tensor, Tensor]:
    """`(W, var+)`, (D,) each."""
    n = halves.shape[0]
    within = halves.var(0).mean(0)
    return within, within * ((n - 1) / n) + halves.mean(0).var(0)


def _potential(halves: Halves) -> Tensor:
    within, total = _variances(halves)
    return (total / within).sqrt()


def _normal_scores(halves: Halves) -> Halves:
    """`Phi^-1((r - 3/8) / (S + 1/4))`, r the rank among all S values of a coordinate, ties sharing their mean rank."""
    flat = halves.flatten(0, 1)
    ranks = torch.stack([_mean_ranks(column) for column in flat.unbind(1)], 1)
    return normal_quantile((ranks - 0.375) / (len(flat) + 0.25)).reshape(halves.shape)


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2).to(torch.float64)[place]


def _autocovariance(halves: Halves) -> Halves:
    """`1/N sum_i (x_i - mean) (x_i+t - mean)` at every lag t of every half chain, by FFT."""
    n = halves.shape[0]
    spectrum = torch.fft.rfft(halves - halves.mean(0), n=2 * n, dim=0)
    return torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n] / n
