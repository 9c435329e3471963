"""Weights: how much each noise level counts. Defined once, on the error of the clean estimate, and translated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.fields import Coefficients
from undiffuse.paths import Path

Time = Float[Tensor, " b"]


class Weight(ABC):
    """`w(t)` in the loss `w(t) |D(x_t, t) - x_0|^2`.

    A network's own error is `|F - F*|^2 = |D - x_0|^2 / c_out^2`, so its weight is `w(t) c_out(t)^2`.
    """

    sums: bool = False  # likelihood-type weights sum over dimensions, the others average

    @abstractmethod
    def on_data(self, path: Path, t: Time) -> Time:
        """`w(t)`, the weight of the squared error of the clean estimate."""

    def on_output(self, path: Path, t: Time, coefficients: Coefficients) -> Time:
        """The weight of the squared error of the network's own output."""
        return self.on_data(path, t) * coefficients.c_out.square()


def _snr(path: Path, t: Tensor) -> Tensor:
    return (path.alpha(t) / path.sigma(t)).square()


@dataclass(frozen=True)
class Simple(Weight):
    """Every noise level counts alike in the network's own output: `w = 1 / c_out^2`.

    With a noise prediction it is DDPM's simple loss (Ho et al. 2020, eq. 14), with a velocity flow matching's.
    """

    def on_data(self, path: Path, t: Tensor) -> Tensor:
        raise ArgumentError("the simple weight depends on the prediction: ask on_output")

    def on_output(self, path: Path, t: Tensor, coefficients: Coefficients) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class SNR(Weight):
    """`w = alpha^2 / sigma^2`: the squared error of the noise, whatever is predicted."""

    def on_data(self, path: Path, t: Tensor) -> Tensor:
        return _snr(path, t)


@dataclass(frozen=True)
class MinSNR(Weight):
    """`w = min(alpha^2 / sigma^2, gamma)` (Hang et al. 2023, eq. 5)."""

    gamma: float = 5.0

    def __post_init__(self):
        if not self.gamma > 0:
            raise ArgumentError(f"min-snr weight: gamma is {self.gamma}, expected > 0")

    def on_data(self, path: Path, t: Tensor) -> Tensor:
        return _snr(path, t).clamp(max=self.gamma)


@dataclass(frozen=True)
class TruncatedSNR(Weight):
    """`w = max(alpha^2 / sigma^2, 1)` (Salimans and Ho 2022, section 4)."""

    def on_data(self, path: Path, t: Tensor) -> Tensor:
        return _snr(path, t).clamp(min=1.0)


@dataclass(frozen=True)
class Likelihood(Weight):
    """`g^2` on the squared error of the score, summed over dimensions (Song et al. 2021b, theorem 1).

    Half its integral over t bounds the negative log-likelihood in nats, up to a constant of the data. On the clean
    estimate `w = g^2 alpha^2 / sigma^4 = 2 alpha omega / sigma^3`, the form that is regular at alpha = 0.
    """

    sums = True

    def on_data(self, path: Path, t: Tensor) -> Tensor:
        return 2 * path.alpha(t) * path.omega(t) / path.sigma(t).pow(3)


@dataclass(frozen=True)
class EDM(Weight):
    """`w = (s^2 + sigma_data^2) / (s sigma_data)^2 = 1 / sigma_data^2 + alpha^2 / sigma^2`, s = sigma / alpha.

    With the EDM prediction of the same sigma_data every level counts alike (Karras et al. 2022, table 1).
    """

    sigma_data: float = 0.5

    def __post_init__(self):
        if not self.sigma_data > 0:
            raise ArgumentError(f"edm weight: sigma_data is {self.sigma_data}, expected > 0")

    def on_data(self, path: Path, t: Tensor) -> Tensor:
        return 1 / self.sigma_data**2 + _snr(path, t)


WEIGHTS: dict[str, type[Weight]] = {
    "simple": Simple,
    "snr": SNR,
    "min-snr": MinSNR,
    "truncated-snr": TruncatedSNR,
    "likelihood": Likelihood,
    "edm": EDM,
}
