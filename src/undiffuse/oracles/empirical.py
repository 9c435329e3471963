"""A finite data set: the law that a network trained for ever would memorise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.oracles.law import Event, Law

# Largest matrix made at a time, in numbers: 64 MiB of float64.
_BUDGET = 2**23


class Empirical(Law):
    """`(1 / N) sum_i N(data_i, std^2 I)`; std = 0 is the data set itself.

    Its denoiser is a softmax over the data, weights proportional to `exp(-|x - alpha data_i|^2 / (2 v))`, with
    `v = alpha^2 std^2 + sigma^2`, taken chunk by chunk with a running minimum of the distance, in float64:
    memory does not grow with N, and as v goes to 0 it becomes the nearest data point.

    Args:
        data: (N, *event).
        std: standard deviation of the noise put on each point.

    Raises:
        ArgumentError: no data, or std < 0.
    """

    data: Tensor
    centre: Tensor

    def __init__(self, data: Float[Tensor, "n *event"], std: float = 0.0):
        super().__init__()
        if data.ndim == 0 or data.numel() == 0 or not std >= 0:
            raise ArgumentError(
                f"Empirical: data of shape {tuple(data.shape)}, std {std}: expected rows of data, std >= 0"
            )
        self.event = tuple(data.shape[1:])
        self.std = float(std)
        self.register_buffer("data", data.detach().reshape(len(data), -1))
        # Distances are taken from the centre, where the squares that cancel are smallest.
        self.register_buffer("centre", self.data.mean(0, dtype=torch.float64))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.data.dtype

    @property
    def mean(self) -> Float[Tensor, "*event"]:
        return self.centre.to(self.dtype).reshape(self.event)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Of the flattened event, in float64: `X^T X / N + std^2 I`, X the centred data."""
        total = sum(rows.mT @ rows for rows in self._chunks(1))
        return total / len(self.data) + self.std**2 * torch.eye(len(self.centre), dtype=torch.float64).to(self.centre)

    def _chunks(self, batch: int) -> Iterator[Tensor]:
        """The centred data, (n, D) at a time, in float64."""
        size = max(1, _BUDGET // max(batch, self.data.shape[1]))
        return (rows.to(torch.float64) - self.centre.to(torch.float64) for rows in self.data.split(size))

    def _energies(self, x: Tensor, alpha: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of `|alpha m_i|^2 - 2 alpha x.m_i`, (B, n), and of the centred data m; x is centred too."""
        for rows in self._chunks(len(x)):
            squares = (rows * rows).sum(1)
            yield alpha.square() * squares - 2 * alpha * (x @ rows.mT), rows

    def _average(self, x: Tensor, alpha: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax mean of the centred data (B, D), least energy (B, 1), and sum of weights relative to it (B, 1).

        One pass: what was summed under an older minimum is rescaled when a smaller one turns up.
        """
        sharpness = _sharpness(variance)
        least = x.new_full((len(x), 1), torch.inf)
        total, mean = x.new_zeros(len(x), 1), torch.zeros_like(x)
        for energy, rows in self._energies(x, alpha):
            lower = torch.minimum(least, energy.min(1, keepdim=True).values)
            kept = torch.exp((lower - least) * sharpness)
            weight = torch.exp((lower - energy) * sharpness)
            total = total * kept + weight.sum(1, keepdim=True)
            mean = mean * kept + weight @ rows
            least = lower
        return mean / total, least, total

    def _variance(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha.square() * self.std**2 + sigma.square()

    def posterior_means(self, x, alpha, sigma, cond):
        self.unlabelled(cond)
        wide, alpha, sigma = x.double(), alpha.double(), sigma.double()
        centre, variance = self.centre.double(), self._variance(alpha, sigma)
        mean, _, _ = self._average(wide - alpha * centre, alpha, variance)
        mean = mean + centre
        pull = (wide - alpha * mean) / variance
        # alpha std^2 pull is 0 for points, also where pull is infinite
        x_0 = mean + alpha * self.std**2 * pull if self.std > 0 else mean
        return x_0.to(x.dtype), pull.to(x.dtype)

    def flat_posterior_covariance(self, x, alpha, sigma, cond):
        self.unlabelled(cond)
        wide, alpha, sigma = x.double(), alpha.double(), sigma.double()
        variance = self._variance(alpha, sigma)
        offset = wide - alpha * self.centre.double()
        mean, least, total = self._average(offset, alpha, variance)
        between = wide.new_zeros(len(x), x.shape[1], x.shape[1])
        for energy, rows in self._energies(offset, alpha):
            weight = torch.exp((least - energy) * _sharpness(variance)) / total
            # One row of x at a time: (B, n, D) would not fit.
            spread = [((rows - m) * w[:, None]).mT @ (rows - m) for m, w in zip(mean, weight)]
            between = between + torch.stack(spread)
        if self.std == 0:
            return between.to(x.dtype)
        ratio = (sigma.square() / variance).expand(len(x), 1)[:, :, None]
        within = ratio * self.std**2 * torch.eye(x.shape[1], dtype=wide.dtype, device=x.device)
        return (ratio.square() * between + within).to(x.dtype)

    def flat_log_prob(self, x, cond):
        self.unlabelled(cond)
        if self.std == 0:
            raise ArgumentError(
                "a data set without noise has no density: give Empirical a std > 0, or use .perturbed(path, t)"
            )
        offset = x.double() - self.centre.double()
        one = offset.new_ones(())
        variance = one * self.std**2
        _, least, total = self._average(offset, one, variance)
        squares = offset.square().sum(1) + least[:, 0]
        constant = math.log(len(self.data)) + 0.5 * x.shape[1] * math.log(2 * math.pi * self.std**2)
        return (total[:, 0].log() - 0.5 * squares / self.std**2 - constant).to(x.dtype)

    def sample(self, n: int, generator: Generator = None) -> Event:
        device = self.data.device
        chosen = self.data[random.integers(len(self.data), (n,), generator, device=device)].reshape(n, *self.event)
        if self.std == 0:
            return chosen
        return chosen + self.std * random.normal(chosen.shape, generator, dtype=self.dtype, device=device)

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Self:
        data = float(alpha) * self.data.reshape(len(self.data), *self.event)
        return type(self)(data, math.sqrt(float(self._variance(alpha, sigma))))


def _sharpness(variance: Tensor) -> Tensor:
    """`1 / (2 v)`, finite at v = 0, where the softmax becomes the nearest point."""
    return 0.5 / variance.clamp(min=torch.finfo(variance.dtype).tiny)
