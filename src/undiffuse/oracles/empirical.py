"""A finite data set: the law that a network trained for ever would memorise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.oracles.law import Cond, Event, Law, check_labels

# Largest matrix made at a time, in numbers: 64 MiB of float64.
_BUDGET = 2**23


class Empirical(Law):
    """`(1 / N) sum_i N(data_i, std^2 I)`; std = 0 is the data set itself.

    Its denoiser is a softmax over the data, weights proportional to `exp(-|x - alpha data_i|^2 / (2 v))`, with
    `v = alpha^2 std^2 + sigma^2`, taken chunk by chunk with a running minimum of the distance, in float64:
    memory does not grow with N, and as v goes to 0 it becomes the nearest data point.

    With labels, `cond` (int64, (B,)) selects among the data: row b sees those whose label is `cond[b]`, and all of
    them where `cond[b]` is -1. A point without a label, -1, is seen by the latter only.

    Args:
        data: (N, *event).
        std: standard deviation of the noise put on each point.
        labels: (N,) integers >= -1, the class of each point. The data are then kept in the order of their labels.

    Raises:
        ArgumentError: no data, std < 0, or labels that do not fit.
    """

    data: Tensor
    centre: Tensor
    labels: Tensor | None

    def __init__(self, data: Float[Tensor, "n *event"], std: float = 0.0, labels: Int[Tensor, " n"] | None = None):
        super().__init__()
        if data.ndim == 0 or data.numel() == 0 or not std >= 0:
            raise ArgumentError(
                f"Empirical: data of shape {tuple(data.shape)}, std {std}: expected rows of data, std >= 0"
            )
        self.event = tuple(data.shape[1:])
        self.std = float(std)
        if labels is not None:
            if labels.shape != data.shape[:1] or labels.is_floating_point() or bool((labels < -1).any()):
                raise ArgumentError(
                    f"Empirical: labels must be {len(data)} integers >= -1; given {labels.dtype}, shape "
                    f"{tuple(labels.shape)}"
                )
            order = labels.argsort(stable=True)
            data, labels = data[order], labels[order]
        self.register_buffer("labels", labels)
        # Where in the data each class begins and ends; -1: all of them.
        self._spans = {**_spans(labels), -1: (0, len(data))}
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
        total = sum(rows.mT @ rows for rows in self._chunks(self.data, 1))
        return total / len(self.data) + self.std**2 * torch.eye(len(self.centre), dtype=torch.float64).to(self.centre)

    def _chunks(self, data: Tensor, batch: int) -> Iterator[Tensor]:
        """The data centred, (n, D) at a time, in float64."""
        size = max(1, _BUDGET // max(batch, data.shape[1]))
        return (rows.to(torch.float64) - self.centre.to(torch.float64) for rows in data.split(size))

    def _by_label(self, answer: Callable[..., Tensor], cond: Cond, x: Tensor, *scales: Tensor) -> Tensor:
        """`answer(data, x, *scales)`, where each row of x meets the data that it sees."""
        if cond is None:
            return answer(self.data, x, *scales)
        labels = self._checked(cond, len(x))
        groups, parts = [], []
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero()[:, 0]
            data = self.data[slice(*self._spans[label])]
            groups.append(rows)
            parts.append(answer(data, x[rows], *(s[rows] if s.ndim and len(s) > 1 else s for s in scales)))
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def _checked(self, cond: Cond, rows: int) -> Tensor:
        """`cond` as one known label for each row."""
        if self.labels is None:
            self.unlabelled(cond)
        return check_labels(cond, rows, self._spans)

    def _energies(self, data: Tensor, x: Tensor, alpha: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of `|alpha m_i|^2 - 2 alpha x.m_i`, (B, n), and of the centred data m; x is centred too."""
        for rows in self._chunks(data, len(x)):
            squares = (rows * rows).sum(1)
            yield alpha.square() * squares - 2 * alpha * (x @ rows.mT), rows

    def _average(self, data: Tensor, x: Tensor, alpha: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax mean of the centred data (B, D), least energy (B, 1), and sum of weights relative to it (B, 1).

        One pass: what was summed under an older minimum is rescaled when a smaller one turns up.
        """
        sharpness = _sharpness(variance)
        # Finite, not infinity: its derivative by the sharpness, 0 times this, is 0.
        least = x.new_full((len(x), 1), torch.finfo(x.dtype).max)
        total, mean = x.new_zeros(len(x), 1), torch.zeros_like(x)
        for energy, rows in self._energies(data, x, alpha):
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
        def mean_of(data: Tensor, *args: Tensor) -> Tensor:
            return self._average(data, *args)[0]

        wide, alpha, sigma = x.double(), alpha.double(), sigma.double()
        centre, variance = self.centre.double(), self._variance(alpha, sigma)
        mean = self._by_label(mean_of, cond, wide - alpha * centre, alpha, variance) + centre
        pull = (wide - alpha * mean) / variance
        # alpha std^2 pull is 0 for points, also where pull is infinite
        x_0 = mean + alpha * self.std**2 * pull if self.std > 0 else mean
        return x_0.to(x.dtype), pull.to(x.dtype)

    def flat_posterior_covariance(self, x, alpha, sigma, cond):
        def covariance_of(data: Tensor, x: Tensor, alpha: Tensor, variance: Tensor) -> Tensor:
            mean, least, total = self._average(data, x, alpha, variance)
            between = x.new_zeros(len(x), x.shape[1], x.shape[1])
            for energy, rows in self._energies(data, x, alpha):
                weight = torch.exp((least - energy) * _sharpness(variance)) / total
                # One row of x at a time: (B, n, D) would not fit.
                spread = [((rows - m) * w[:, None]).mT @ (rows - m) for m, w in zip(mean, weight)]
                between = between + torch.stack(spread)
            return between

        wide, alpha, sigma = x.double(), alpha.double(), sigma.double()
        variance = self._variance(alpha, sigma)
        offset = wide - alpha * self.centre.double()
        between = self._by_label(covariance_of, cond, offset, alpha, variance)
        if self.std == 0:
            return between.to(x.dtype)
        ratio = (sigma.square() / variance).expand(len(x), 1)[:, :, None]
        within = ratio * self.std**2 * torch.eye(x.shape[1], dtype=wide.dtype, device=x.device)
        return (ratio.square() * between + within).to(x.dtype)

    def flat_log_prob(self, x, alpha, sigma, cond):
        def log_mean_of(data: Tensor, x: Tensor, alpha: Tensor, variance: Tensor) -> Tensor:
            parts = [(-0.5 * energy / variance).logsumexp(1) for energy, _ in self._energies(data, x, alpha)]
            log_mean = torch.stack(parts).logsumexp(0) - math.log(len(data))
            rest = x.square() / variance + torch.log(2 * math.pi * variance)
            return log_mean - 0.5 * rest.sum(1)

        alpha, sigma = alpha.double(), sigma.double()
        variance = self._variance(alpha, sigma)
        if bool((variance == 0).any()):
            raise ArgumentError(
                "a data set without noise has no density: give Empirical a std > 0, or use .perturbed(path, t)"
            )
        offset = x.double() - alpha * self.centre.double()
        return self._by_label(log_mean_of, cond, offset, alpha, variance).to(x.dtype)

    def sample(self, n: int, generator: Generator = None, cond: Cond = None) -> Event:
        """`n` draws; `cond` (n,) chooses the class of each."""
        device = self.data.device
        if cond is None:
            rows = random.integers(len(self.data), (n,), generator, device=device)
        else:
            spans = torch.tensor([self._spans[k] for k in self._checked(cond, n).tolist()], device=device)
            u = random.uniform((n,), generator, dtype=torch.float64, device=device)
            rows = (spans[:, 0] + u * (spans[:, 1] - spans[:, 0])).long()
        chosen = self.data[rows].reshape(n, *self.event)
        if self.std == 0:
            return chosen
        return chosen + self.std * random.normal(chosen.shape, generator, dtype=self.dtype, device=device)

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Self:
        data = float(alpha) * self.data.reshape(len(self.data), *self.event)
        return type(self)(data, math.sqrt(float(self._variance(alpha, sigma))), self.labels)


def _spans(labels: Tensor | None) -> dict[int, tuple[int, int]]:
    """First row and row after the last of each label, in labels that are sorted."""
    if labels is None:
        return {}
    known, counts = labels.unique(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return {k: (end - count, end) for k, count, end in zip(known.tolist(), counts.tolist(), ends)}


def _sharpness(variance: Tensor) -> Tensor:
    """`1 / (2 v)`, finite at v = 0, where the softmax becomes the nearest point."""
    return 0.5 / variance.clamp(min=torch.finfo(variance.dtype).tiny)
