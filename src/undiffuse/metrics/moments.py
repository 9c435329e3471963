"""Moments that stream and merge, and the Frechet distance between two of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics.rows import Others, Points, Rows, pair


class SmallSampleWarning(UserWarning):
    """Too few samples for the number to mean what its name says."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter `sum_i (x_i - mean)(x_i - mean)^T` of rows of length d, in float64.

    `Moments.of(batch)` and `merge` give, up to rounding, what one pass over all rows gives (Chan, Golub and
    LeVeque, 1979): no sum of squares is ever subtracted from another.
    """

    n: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @classmethod
    def of(cls, x: Points, name: str = "samples") -> Moments:
        """Moments of `x`, taken block by block.

        Raises:
            ArgumentError: `x` is empty, not floating point, or not finite.
        """
        rows = Rows(x, name)
        mean = rows.mean()
        scatter = torch.zeros(rows.d, rows.d, dtype=torch.float64, device=rows.device)
        for part in rows.parts():
            centred = rows.block(part) - mean
            scatter.addmm_(centred.T, centred)
        return cls(rows.n, mean, scatter)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Unbiased covariance, scatter / (n - 1).

        Raises:
            ArgumentError: n < 2.
        """
        if self.n < 2:
            raise ArgumentError(f"a covariance needs at least 2 samples, given {self.n}")
        return self.scatter / (self.n - 1)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together.

        Raises:
            ArgumentError: the two have rows of different length.
        """
        if self.mean.shape != other.mean.shape:
            raise ArgumentError(f"moments of {len(self.mean)} and of {len(other.mean)} values cannot be merged")
        n = self.n + other.n
        gap = other.mean - self.mean
        between = torch.outer(gap, gap) * (self.n * other.n / n)
        return Moments(n, self.mean + gap * (other.n / n), self.scatter + other.scatter + between)

    def update(self, x: Points) -> Moments:
        """These moments with one more batch."""
        return self.merge(Moments.of(x))

    def reduce(self) -> Moments:
        """Moments of the rows of all processes, equal on each; of this process where there is only one.

        Every process must call it, and with at least one row.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        count = torch.tensor(float(self.n), dtype=torch.float64, device=self.mean.device)
        dist.all_reduce(count)
        mean = self.mean * (self.n / count)
        dist.all_reduce(mean)
        gap = self.mean - mean
        scatter = self.scatter + torch.outer(gap, gap) * self.n
        dist.all_reduce(scatter)
        return Moments(int(count), mean, scatter)


def _root(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Symmetric square root. An eigenvalue below the rounding of the largest counts as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * _root_values(values)) @ vectors.T


def _root_values(values: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(values > rounding, values, torch.zeros_like(values)).sqrt()


def frechet_between(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with these moments, as FID reports it.

    `|m_a - m_b|^2 + tr(S_a + S_b) - 2 tr (S_a^{1/2} S_b S_a^{1/2})^{1/2}` (Dowson and Landau 1982; Heusel et
    al. 2017), by symmetric eigendecompositions, so no complex root appears and none has to be thrown away.
    Rounding below zero is returned as zero.

    Raises:
        ArgumentError: rows of different length, or fewer than 2 of them.
    """
    if a.mean.shape != b.mean.shape:
        raise ArgumentError(f"moments of {len(a.mean)} and of {len(b.mean)} values: they must be equally long")
    cov_a, cov_b = a.covariance, b.covariance
    root = _root(cov_a)
    inner = root @ cov_b @ root
    cross = _root_values(torch.linalg.eigvalsh((inner + inner.T) / 2)).sum()
    value = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(value), 0.0)


def rank_warning(n_samples: int, n_reference: int, d: int) -> str | None:
    """What to say where a covariance of d values comes from n <= d rows; None where it has full rank."""
    n = min(n_samples, n_reference)
    if n > d:
        return None
    return (
        f"n = {n} samples of d = {d} values: the covariance has rank {n - 1}, and that dominates the Frechet "
        f"distance; use at least d + 1 = {d + 1}, better 10 d"
    )


def frechet_distance(samples: Points, reference: Others) -> float:
    """Frechet distance between two sets of points or images (`frechet_between`), biased upward by O(d / n).

    Args:
        samples: (n, *event), floating point, n >= 2.
        reference: (m, *event), on the same scale.

    Returns:
        The distance in squared units of the data; 0 for equal moments.

    Raises:
        ArgumentError: too few rows, different event shapes, a value that is not finite.

    Warns:
        SmallSampleWarning: n or m is below d + 1, so a covariance is singular.
    """
    first, second = pair(samples, reference, least=2)
    message = rank_warning(first.n, second.n, first.d)
    if message is not None:
        warnings.warn(message, SmallSampleWarning, stacklevel=2)
    return frechet_between(Moments.of(samples), Moments.of(reference, "reference images"))


@dataclass(frozen=True)
class Baselines:
    """Frechet distances to the training set that a model's own is read against.

    resample: of n images drawn from the training set with replacement: as close as memory can come.
    held_out: of images that the model has never seen: what perfect generalisation gives with that many.
    """

    resample: float
    held_out: float
    n: int
    n_held_out: int


def baselines(train: Points, held_out: Others, n: int = 10_000, seed: int = 0) -> Baselines:
    """Reference values of `frechet_distance(., train)`: a bootstrap of n draws, and the held-out images.

    Raises:
        ArgumentError: n < 2, or as `frechet_distance`.
    """
    if n < 2:
        raise ArgumentError(f"n = {n} draws: a covariance needs at least 2")
    pair(held_out, train, ("held-out images", "training images"), least=2)
    whole = Moments.of(train, "training images")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(train.shape[0], (n,), generator=generator).to(train.device)
    resample = frechet_between(Moments.of(train[chosen]), whole)
    unseen = frechet_between(Moments.of(held_out, "held-out images"), whole)
    return Baselines(resample, unseen, n, held_out.shape[0])
