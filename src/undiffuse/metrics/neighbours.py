"""Nearest neighbours by blocks: precision and recall, density and coverage, the check for memorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics.rows import Others, Points, Rows, Thirds, gram_rounding, pair, squared_distances


class PrecisionRecall(NamedTuple):
    """Share of samples that look real; share of reality that the samples reach."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Mean number of reference balls around a sample, over k; share of reference balls that hold a sample."""

    density: float
    coverage: float


def squared_radii(rows: Rows, k: int) -> Float[Tensor, " n"]:
    """Squared distance of each row to its k-th nearest other row.

    Raises:
        ArgumentError: k < 1 or k >= n.
    """
    if not 1 <= k < rows.n:
        raise ArgumentError(f"k = {k} neighbours among {rows.n} {rows.name}: expected 1 <= k < {rows.n}")
    radii = torch.empty(rows.n, dtype=torch.float64, device=rows.device)
    for one in rows.parts():
        block = rows.block(one)
        best = torch.full((len(block), k), torch.inf, dtype=torch.float64, device=rows.device)
        for other in rows.parts():
            tile = squared_distances(block, rows.block(other))
            if one == other:
                tile.fill_diagonal_(torch.inf)
            nearest_here = tile.topk(min(k, tile.shape[1]), dim=1, largest=False).values
            best = torch.cat([best, nearest_here], dim=1).topk(k, dim=1, largest=False).values
        radii[one] = best.amax(dim=1)
    return radii


def _balls_around(
    points: Rows, centres: Rows, radii: Float[Tensor, " m"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """How many closed balls hold each point, and how many points each ball holds."""
    limits = radii + gram_rounding(points, centres)
    of_point = torch.zeros(points.n, dtype=torch.int64, device=points.device)
    of_ball = torch.zeros(centres.n, dtype=torch.int64, device=points.device)
    for one in points.parts():
        block = points.block(one)
        for other in centres.parts():
            inside = squared_distances(block, centres.block(other)) <= limits[other]
            of_point[one] += inside.sum(dim=1)
            of_ball[other] += inside.sum(dim=0)
    return of_point, of_ball


def precision_recall(samples: Points, reference: Others, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision: share of samples within the k-th neighbour distance of some reference image. Recall: the same
    with the roles exchanged. Both depend on n and m; compare like with like, n = m if you can.

    Raises:
        ArgumentError: a set has k rows or fewer, or as `Rows`.
    """
    first, second = pair(samples, reference)
    near_real, _ = _balls_around(first, second, squared_radii(second, k))
    near_sample, _ = _balls_around(second, first, squared_radii(first, k))
    return PrecisionRecall(_share(near_real > 0), _share(near_sample > 0))


def density_coverage(samples: Points, reference: Others, *, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, equations 4 and 6), on closed balls.

    For samples and reference of one law, density has mean 1 and coverage
    `1 - (m-1)...(m-k) / ((n+m-1)...(n+m-k))`, whatever the law and the dimension.

    Raises:
        ArgumentError: the reference has k rows or fewer, or as `Rows`.
    """
    first, second = pair(samples, reference)
    of_point, of_ball = _balls_around(first, second, squared_radii(second, k))
    return DensityCoverage(float(of_point.double().mean()) / k, _share(of_ball > 0))


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def nearest(samples: Points, train: Others) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Distance of each sample to its nearest training image, and that image's index.

    The neighbour is found by the Gram matrix in float64; its distance is then taken from the difference
    itself, so that an exact copy is at exactly 0.

    Raises:
        ArgumentError: as `Rows`.
    """
    first, second = pair(samples, train, ("samples", "training images"))
    distance = torch.empty(first.n, dtype=torch.float64, device=first.device)
    index = torch.empty(first.n, dtype=torch.int64, device=first.device)
    for one in first.parts():
        block = first.block(one)
        best = torch.full((len(block),), torch.inf, dtype=torch.float64, device=first.device)
        where = torch.zeros(len(block), dtype=torch.int64, device=first.device)
        for other in second.parts():
            value, column = squared_distances(block, second.block(other)).min(dim=1)
            closer = value < best
            best, where = torch.where(closer, value, best), torch.where(closer, column + other.start, where)
        index[one] = where
        found = train[where.to(train.device)].to(first.device, torch.float64).reshape(len(block), -1)
        given = samples[one].to(first.device, torch.float64).reshape(len(block), -1)
        distance[one] = (given - found).square().sum(dim=1).sqrt()
    return distance, index


@dataclass(frozen=True)
class NearestNeighbours:
    """What `nearest_neighbour` found.

    distance, index: of each sample to its nearest training image, and which that is, for a picture of both.
    median: of the distances. held_out_median: the same for held-out images. ratio: the first over the second;
    near 1 where the model generalises, well below 1 where it copies.
    duplicates: samples that equal a training image in every value.
    """

    distance: Float[Tensor, " n"]
    index: Int[Tensor, " n"]
    median: float
    held_out_median: float
    ratio: float
    duplicates: int

    def closest(self, count: int) -> Int[Tensor, " count"]:
        """The samples nearest to a training image, nearest first: the ones to look at."""
        return self.distance.sort(stable=True).indices[:count]


def nearest_neighbour(samples: Points, train: Others, held_out: Thirds) -> NearestNeighbours:
    """Check for memorisation: are samples nearer to the training images than held-out images are?

    Raises:
        ArgumentError: as `Rows`; or every second held-out image is a training image, so that no ratio exists.
    """
    distance, index = nearest(samples, train)
    unseen, _ = nearest(held_out, train)
    median, held_out_median = float(distance.quantile(0.5)), float(unseen.quantile(0.5))
    if held_out_median == 0.0:
        raise ArgumentError(
            "half of the held-out images are exact copies of training images: hold out images that are unseen"
        )
    duplicates = int((distance == 0.0).sum())
    return NearestNeighbours(distance, index, median, held_out_median, median / held_out_median, duplicates)
