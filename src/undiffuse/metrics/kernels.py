"""Kernel distances: the unbiased squared maximum mean discrepancy, with two kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import hash_key
from undiffuse.metrics.rows import Others, Points, Rows, pair, squared_distances

Kernel = Callable[[Tensor, Tensor], Tensor]  # (r, d), (c, d) -> (r, c)

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the median distance: from neighbours to the whole cloud
MEDIAN_ROWS = 1000  # rows that the median distance is taken over: half a million pairs


@dataclass(frozen=True)
class Polynomial:
    """`k(x, y) = (x . y / d + 1)^degree`: three moments decide at degree 3 (Binkowski et al. 2018)."""

    degree: int = 3

    def __call__(self, x: Float[Tensor, "r d"], y: Float[Tensor, "c d"]) -> Float[Tensor, "r c"]:
        return (x @ y.T / x.shape[1] + 1.0) ** self.degree


@dataclass(frozen=True)
class RBF:
    """`k(x, y) = mean_h exp(-|x - y|^2 / (2 h^2))` over the bandwidths h."""

    bandwidths: tuple[float, ...]

    def __call__(self, x: Float[Tensor, "r d"], y: Float[Tensor, "c d"]) -> Float[Tensor, "r c"]:
        squares = squared_distances(x, y)
        total = torch.zeros_like(squares)
        for width in self.bandwidths:
            total += torch.mul(squares, -0.5 / width**2).exp_()
        return total.div_(len(self.bandwidths))


def _mean_within(kernel: Kernel, rows: Rows) -> float:
    """Mean of k over ordered pairs of different rows; k is symmetric, so half of the tiles are computed."""
    total = 0.0
    for one, other in itertools.combinations_with_replacement(list(rows.parts()), 2):
        tile = kernel(rows.block(one), rows.block(other))
        if one == other:
            tile.fill_diagonal_(0.0)
            total += float(tile.sum())
        else:
            total += 2.0 * float(tile.sum())
    return total / (rows.n * (rows.n - 1))


def _mean_between(kernel: Kernel, a: Rows, b: Rows) -> float:
    total = 0.0
    for one, other in itertools.product(list(a.parts()), list(b.parts())):
        total += float(kernel(a.block(one), b.block(other)).sum())
    return total / (a.n * b.n)


def unbiased_mmd(kernel: Kernel, a: Rows, b: Rows) -> float:
    """`E k(x, x') + E k(y, y') - 2 E k(x, y)` over different rows; mean 0 for equal laws, so often negative.

    Gretton et al. 2012, equation 3.
    """
    return _mean_within(kernel, a) + _mean_within(kernel, b) - 2.0 * _mean_between(kernel, a, b)


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets; they share rows, so std / sqrt(subsets) is too small."""

    mean: float
    std: float
    subset_size: int


def kernel_distance(
    samples: Points,
    reference: Others,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    """Kernel distance (KID): unbiased MMD^2 with `(x . y / d + 1)^3`, averaged over random subsets.

    Args:
        samples: (n, *event).
        reference: (m, *event).
        subsets: how many pairs of subsets.
        subset_size: rows in each, drawn without replacement; None: 1,000, or all of the smaller set.
        seed: of the draws.

    Raises:
        ArgumentError: subsets < 1, a subset larger than a set or below 2 rows, or as `Rows`.
    """
    first, second = pair(samples, reference, least=2)
    size = min(1000, first.n, second.n) if subset_size is None else subset_size
    if subsets < 1 or not 2 <= size <= min(first.n, second.n):
        raise ArgumentError(
            f"{subsets} subsets of {size} rows, from {first.n} samples and {second.n} reference images: "
            "expected at least 1 subset, of at least 2 rows and at most the smaller set"
        )
    generator = torch.Generator().manual_seed(hash_key(seed, "kernel distance") >> 1)
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        a, b = (_subset(rows, size, generator) for rows in (first, second))
        values[i] = unbiased_mmd(Polynomial(), a, b)
    std = float(values.std()) if subsets > 1 else 0.0
    return KernelDistance(float(values.mean()), std, size)


def _subset(rows: Rows, size: int, generator: torch.Generator) -> Rows:
    """Rows drawn without replacement, and not centred: a polynomial kernel is not invariant under a shift."""
    chosen = torch.randperm(rows.n, generator=generator)[:size].to(rows.x.device)
    return Rows(rows.x[chosen], rows.name)


def median_distance(reference: Points) -> float:
    """Median distance between different rows, over at most 1,000 rows spread evenly through `reference`.

    Raises:
        ArgumentError: the median is 0, because most rows are equal.
    """
    rows = Rows(reference, "reference images", least=2)
    chosen = torch.linspace(0, rows.n - 1, min(MEDIAN_ROWS, rows.n), device=reference.device).round().long()
    block = Rows(reference[chosen], rows.name, centre=rows.mean()).block(slice(0, len(chosen)))
    upper = torch.ones(len(chosen), len(chosen), dtype=torch.bool, device=block.device).triu(1)
    median = float(squared_distances(block, block)[upper].median().sqrt())
    if median == 0.0:
        raise ArgumentError("the median distance between reference images is 0: give the bandwidths yourself")
    return median


def mmd(
    samples: Points,
    reference: Others,
    *,
    bandwidths: Sequence[float] | None = None,
) -> float:
    """Squared maximum mean discrepancy, unbiased, with a mixture of Gaussian kernels over all pairs.

    Args:
        samples: (n, *event).
        reference: (m, *event).
        bandwidths: standard deviations of the kernels, in units of the data. None: 1/4, 1/2, 1, 2 and 4 times
            `median_distance(reference)`; the samples have no say, so that two models are measured alike.

    Returns:
        MMD^2: mean 0 for equal laws (negative half of the time then), at most 2.

    Raises:
        ArgumentError: a bandwidth that is not positive and finite, or as `Rows`.
    """
    first, second = pair(samples, reference, least=2)
    if bandwidths is None:
        bandwidths = [factor * median_distance(reference) for factor in FACTORS]
    if not bandwidths or not all(0.0 < width < float("inf") for width in bandwidths):
        raise ArgumentError(f"bandwidths {list(bandwidths)}: expected one or more positive finite numbers")
    return unbiased_mmd(RBF(tuple(bandwidths)), first, second)
