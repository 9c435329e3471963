"""The named paths, each with its derivatives and its inverse in closed form."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.paths.base import Path, Time


def _check_range(path: str, **values: float) -> None:
    """Raise unless the values given by name are finite, positive and increasing in the order given."""
    numbers = list(values.values())
    if any(not math.isfinite(v) or v <= 0 for v in numbers) or any(a >= b for a, b in itertools.pairwise(numbers)):
        given = ", ".join(f"{k}={v:g}" for k, v in values.items())
        raise ArgumentError(f"{path}: given {given}; expected 0 < {' < '.join(values)}")


@dataclass(frozen=True)
class _BetaPath(Path):
    """What VP and sub-VP share: `beta(t)` linear in t, `B(t)` its integral, `alpha = exp(-B / 2)`."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_low: float = 1e-3

    def __post_init__(self):
        _check_range(type(self).__name__, beta_min=self.beta_min, beta_max=self.beta_max)
        _check_range(type(self).__name__, t_low=self.t_low, t_max=self.t_max)

    def beta(self, t: Time) -> Time:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t: Time) -> Time:
        """`B(t)`, the integral of beta from 0 to t."""
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _time_of_integral(self, b: Time) -> Time:
        # The root of B(t) = b, in the form without cancellation. b is infinite where alpha = 0: a time past every end.
        b = b.clamp(max=torch.finfo(b.dtype).max ** 0.5)
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b)
        return 2 * b / (self.beta_min + root)

    def alpha(self, t: Time) -> Time:
        return torch.exp(-0.5 * self.integral(t))

    def alpha_dot(self, t: Time) -> Time:
        return -0.5 * self.beta(t) * self.alpha(t)

    def drift(self, t: Time) -> Time:
        return -0.5 * self.beta(t)


@dataclass(frozen=True)
class VP(_BetaPath):
    """Variance preserving: `dx = -beta x / 2 dt + sqrt(beta) dw`, `sigma^2 = 1 - exp(-B)`."""

    value: ClassVar[bool] = True

    def sigma(self, t: Time) -> Time:
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def variance_dot(self, t: Time) -> Time:
        return self.beta(t) * torch.exp(-self.integral(t))

    def sigma_dot(self, t: Time) -> Time:
        return 0.5 * self.variance_dot(t) / self.sigma(t)

    def diffusion(self, t: Time) -> Time:
        return torch.sqrt(self.beta(t))

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        return self._time_of_integral(torch.log1p((sigma / alpha).square()))


@dataclass(frozen=True)
class SubVP(_BetaPath):
    """Sub-VP: drift of VP, `sigma = 1 - exp(-B)`, `g^2 = beta (1 - exp(-2 B))` (Song et al. 2021, eq. 28-29)."""

    value: ClassVar[bool] = True

    def sigma(self, t: Time) -> Time:
        return -torch.expm1(-self.integral(t))

    def sigma_dot(self, t: Time) -> Time:
        return self.beta(t) * torch.exp(-self.integral(t))

    def diffusion(self, t: Time) -> Time:
        return torch.sqrt(-self.beta(t) * torch.expm1(-2 * self.integral(t)))

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        # sigma / alpha = 2 sinh(B / 2)
        return self._time_of_integral(2 * torch.asinh(0.5 * sigma / alpha))


@dataclass(frozen=True)
class VE(Path):
    """Variance exploding: `alpha = 1`, `sigma = sigma_min (sigma_max / sigma_min)^t` (Song et al. 2021, eq. 30).

    It never reaches sigma = 0: samples end at `t_min = 0` with noise of size `sigma_min`.
    """

    value: ClassVar[bool] = True

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        _check_range("VE", sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @property
    def t_low(self) -> float:  # type: ignore[override]
        return self.t_min

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Time) -> Time:
        return torch.ones_like(t)

    def alpha_dot(self, t: Time) -> Time:
        return torch.zeros_like(t)

    def sigma(self, t: Time) -> Time:
        return self.sigma_min * torch.exp(self._log_ratio * t)

    def sigma_dot(self, t: Time) -> Time:
        return self._log_ratio * self.sigma(t)

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        return torch.log(sigma / alpha / self.sigma_min) / self._log_ratio

    def input_scale(self, t: Time) -> Time:
        return torch.rsqrt(1 + self.sigma(t).square())


@dataclass(frozen=True)
class Karras(Path):
    """`alpha = 1`, `sigma = t` (Karras et al. 2022): time is the noise level itself.

    `sigma_min` is the smallest level a network is called at; the last step goes from there to 0 in closed form.
    """

    value: ClassVar[bool] = True

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self):
        _check_range("Karras", sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @property
    def t_low(self) -> float:  # type: ignore[override]
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self.sigma_max

    @property
    def t_high(self) -> float:  # type: ignore[override]
        return self.sigma_max

    def alpha(self, t: Time) -> Time:
        return torch.ones_like(t)

    def alpha_dot(self, t: Time) -> Time:
        return torch.zeros_like(t)

    def sigma(self, t: Time) -> Time:
        return t

    def sigma_dot(self, t: Time) -> Time:
        return torch.ones_like(t)

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        return sigma / alpha

    def noise_label(self, t: Time) -> Time:
        return 0.25 * torch.log(t.clamp(min=self.sigma_min))

    def input_scale(self, t: Time) -> Time:
        return torch.rsqrt(1 + t.square())


@dataclass(frozen=True)
class _ReachingNoise(Path):
    """What Linear, Trig and Cosine share: alpha is exactly 0 at t = 1, so the log-SNR is kept to [t_low, t_high]."""

    t_low: float = 1e-3
    t_high: float = 1 - 1e-3

    def __post_init__(self):
        _check_range(type(self).__name__, t_low=self.t_low, t_high=self.t_high)
        if self.t_high > self.t_max:
            raise ArgumentError(f"{type(self).__name__}: given t_high={self.t_high:g}; expected at most {self.t_max:g}")


@dataclass(frozen=True)
class Linear(_ReachingNoise):
    """`alpha = 1 - t`, `sigma = t`: flow matching's straight line (Lipman et al. 2023; rectified flow)."""

    value: ClassVar[bool] = True

    def alpha(self, t: Time) -> Time:
        return 1 - t

    def alpha_dot(self, t: Time) -> Time:
        return -torch.ones_like(t)

    def sigma(self, t: Time) -> Time:
        return t

    def sigma_dot(self, t: Time) -> Time:
        return torch.ones_like(t)

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        return sigma / (alpha + sigma)


@dataclass(frozen=True)
class Trig(_ReachingNoise):
    """`alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`: the angle is proportional to t."""

    value: ClassVar[bool] = True

    def alpha(self, t: Time) -> Time:
        return torch.sin(0.5 * math.pi * (1 - t))

    def alpha_dot(self, t: Time) -> Time:
        return -0.5 * math.pi * self.sigma(t)

    def sigma(self, t: Time) -> Time:
        return torch.sin(0.5 * math.pi * t)

    def sigma_dot(self, t: Time) -> Time:
        return 0.5 * math.pi * self.alpha(t)

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        return torch.atan2(sigma, alpha) / (0.5 * math.pi)


@dataclass(frozen=True)
class Cosine(_ReachingNoise):
    """`alpha = cos(phi) / cos(phi_0)`, `phi = (t + s) / (1 + s) pi / 2` `sigma^2 = 1 - alpha^2`.

    Nichol and Dhariwal 2021, eq. 17, with their offset s.
    """

    value: ClassVar[bool] = True

    offset: float = 0.008

    def __post_init__(self):
        super().__post_init__()
        _check_range("Cosine", offset=self.offset, one=1.0)

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1 + self.offset)

    @property
    def _phi_0(self) -> float:
        return self.offset * self._rate

    def alpha(self, t: Time) -> Time:
        # cos(phi) = sin(pi / 2 - phi), exactly 0 at t = 1
        return torch.sin(self._rate * (1 - t)) / math.cos(self._phi_0)

    def alpha_dot(self, t: Time) -> Time:
        return -self._rate * torch.cos(self._rate * (1 - t)) / math.cos(self._phi_0)

    def sigma(self, t: Time) -> Time:
        # cos^2(phi_0) - cos^2(phi) = sin(phi - phi_0) sin(phi + phi_0): no cancellation near t = 0
        product = torch.sin(self._rate * t) * torch.sin(self._rate * t + 2 * self._phi_0)
        return torch.sqrt(product) / math.cos(self._phi_0)

    def variance_dot(self, t: Time) -> Time:
        return self._rate * torch.sin(2 * (self._rate * t + self._phi_0)) / math.cos(self._phi_0) ** 2

    def sigma_dot(self, t: Time) -> Time:
        return 0.5 * self.variance_dot(t) / self.sigma(t)

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        # sin(phi)^2 = sin(theta)^2 cos(phi_0)^2 + sin(phi_0)^2, and cos(phi) = cos(theta) cos(phi_0)
        theta = torch.atan2(sigma, alpha)
        sine = torch.hypot(torch.sin(theta) * math.cos(self._phi_0), torch.full_like(theta, math.sin(self._phi_0)))
        phi = torch.atan2(sine, torch.sin(0.5 * math.pi - theta) * math.cos(self._phi_0))
        return (phi - self._phi_0) / self._rate


PATHS: dict[str, type[Path]] = {
    "vp": VP,
    "ve": VE,
    "sub-vp": SubVP,
    "cosine": Cosine,
    "linear": Linear,
    "trig": Trig,
    "karras": Karras,
}
