"""Time distributions: at which noise levels training looks. Each maps a uniform number to a time on any path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator, normal_quantile
from undiffuse.paths import Path


class TimeDistribution(ABC):
    """A law of the training time, given by its inverse distribution function."""

    @abstractmethod
    def quantile(self, path: Path, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The time below which a share `u` in (0, 1) of all draws falls; float64, kept to [t_low, t_max]."""


def drawn(
    time: TimeDistribution, path: Path, x_0: Float[Tensor, "b *event"], generator: Generator
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *event"]]:
    """A time of each sample, then noise like x_0."""
    u = random.uniform(x_0.shape[:1], generator, dtype=torch.float64, device=x_0.device)
    t = time.quantile(path, u).to(torch.promote_types(x_0.dtype, torch.float32))
    return t, random.normal(x_0.shape, generator, dtype=x_0.dtype, device=x_0.device)


def _kept(path: Path, t: Tensor) -> Tensor:
    return t.clamp(path.t_low, path.t_max)


@dataclass(frozen=True)
class Uniform(TimeDistribution):
    """`t ~ U(t_low, t_max)`."""

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return path.t_low + (path.t_max - path.t_low) * u


@dataclass(frozen=True)
class LogNormal(TimeDistribution):
    """`log(sigma / alpha) ~ N(mean, std^2)` (Karras et al. 2022, table 1: P_mean, P_std)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if not self.std > 0:
            raise ArgumentError(f"log-normal time: std is {self.std}, expected > 0")

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return _kept(path, path.time_of(-self.mean - self.std * normal_quantile(u)))


@dataclass(frozen=True)
class UniformHalfLogSNR(TimeDistribution):
    """`log(alpha / sigma)` uniform between its values at t_high and t_low (Kingma et al. 2021)."""

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        ends = torch.tensor([path.t_low, path.t_high], dtype=u.dtype, device=u.device)
        low, high = path.half_log_snr(ends)
        return _kept(path, path.time_of(low + (high - low) * u))


@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """`t = t_low + (t_max - t_low) sigmoid(z)`, `z ~ N(mean, std^2)` (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not self.std > 0:
            raise ArgumentError(f"logit-normal time: std is {self.std}, expected > 0")

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        z = self.mean + self.std * normal_quantile(u)
        return path.t_low + (path.t_max - path.t_low) * torch.sigmoid(z)


@dataclass(frozen=True)
class Discrete(TimeDistribution):
    """`t = i t_max / n` with i uniform on 1 ... n: a chain of n levels (DDPM, NCSN)."""

    n: int = 1000

    def __post_init__(self):
        if self.n < 1:
            raise ArgumentError(f"discrete time: n is {self.n}, expected at least 1 level")

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return _kept(path, (torch.floor(u * self.n) + 1) * (path.t_max / self.n))


TIMES: dict[str, type[TimeDistribution]] = {
    "uniform": Uniform,
    "log-normal": LogNormal,
    "uniform-half-log-snr": UniformHalfLogSNR,
    "logit-normal": LogitNormal,
    "discrete": Discrete,
}
