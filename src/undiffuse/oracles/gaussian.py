"""A Gaussian: the one law whose probability flow is a formula."""

from __future__ import annotations

import math
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.oracles.law import Event, Law, scales_of
from undiffuse.paths import Path


class Gaussian(Law):
    """`N(mean, covariance)` on events of any shape.

    It is kept as the spectrum of its covariance, `Q diag(variances) Q^T`, in which every noisy marginal is diagonal.

    Args:
        mean: (*event).
        std: a number or (*event): independent coordinates; 1 where neither std nor covariance is given.
        covariance: (D, D) of the flattened event, positive semi-definite.

    Raises:
        ArgumentError: std and covariance together, a negative std, or a covariance that is none.
    """

    def __init__(
        self, mean: Float[Tensor, "*event"], std: Tensor | float | None = None, covariance: Tensor | None = None
    ):
        super().__init__()
        if std is not None and covariance is not None:
            raise ArgumentError("Gaussian: give std or covariance, not both")
        if covariance is None:
            spread = torch.as_tensor(1.0 if std is None else std, dtype=mean.dtype, device=mean.device)
            if spread.shape not in ((), mean.shape) or bool((spread < 0).any()):
                raise ArgumentError(
                    f"Gaussian: std has shape {tuple(spread.shape)}, least value {float(spread.min())}: "
                    f"expected a number or shape {tuple(mean.shape)}, not negative"
                )
            self._keep(mean, spread.expand(mean.shape).reshape(-1).square(), None)
        else:
            self._keep(mean, *_spectrum(covariance, mean))

    def _keep(self, mean: Tensor, variances: Tensor, basis: Tensor | None) -> None:
        self.event = tuple(mean.shape)
        self.register_buffer("flat_mean", mean.detach().reshape(-1).clone())
        self.register_buffer("variances", variances.clone())
        self.register_buffer("basis", basis)

    flat_mean: Tensor
    variances: Tensor
    basis: Tensor | None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.flat_mean.dtype

    @property
    def mean(self) -> Float[Tensor, "*event"]:
        return self.flat_mean.reshape(self.event)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Of the flattened event."""
        return self._dense(self.variances)

    def _dense(self, diagonal: Tensor) -> Tensor:
        """`Q diag Q^T` for diagonals of shape (..., D)."""
        if self.basis is None:
            return torch.diag_embed(diagonal)
        basis = self.basis.to(diagonal.dtype)
        return (basis * diagonal.unsqueeze(-2)) @ basis.mT

    def _into(self, x: Tensor) -> Tensor:
        """Coordinates in the eigenbasis."""
        return x if self.basis is None else x @ self.basis.to(x.dtype)

    def _out_of(self, x: Tensor) -> Tensor:
        return x if self.basis is None else x @ self.basis.to(x.dtype).mT

    def posterior_means(self, x, alpha, sigma, cond):
        self.unlabelled(cond)
        mean, spread = self.flat_mean.to(x.dtype), self.variances.to(x.dtype)
        pull = self._into(x - alpha * mean) / (alpha.square() * spread + sigma.square())
        return mean + self._out_of(alpha * spread * pull), self._out_of(pull)

    def flat_posterior_covariance(self, x, alpha, sigma, cond):
        self.unlabelled(cond)
        spread = self.variances.to(x.dtype)
        rest = spread * sigma.square() / (alpha.square() * spread + sigma.square())
        return self._dense(rest.expand(x.shape[0], -1))

    def flat_log_prob(self, x, alpha, sigma, cond):
        self.unlabelled(cond)
        spread = alpha.square() * self.variances.to(x.dtype) + sigma.square()
        if bool((spread == 0).any()):
            raise ArgumentError("this Gaussian has no density: some direction has variance 0")
        squares = self._into(x - alpha * self.flat_mean.to(x.dtype)).square() / spread
        return -0.5 * (squares.sum(1) + spread.log().sum(-1) + x.shape[1] * math.log(2 * math.pi))

    def sample(self, n: int, generator: Generator = None) -> Event:
        noise = random.normal((n, *self.event), generator, dtype=self.dtype, device=self.flat_mean.device)
        return (self.flat_mean + self._out_of(noise.reshape(n, -1) * self.variances.sqrt())).reshape(n, *self.event)

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Self:
        law = type(self).__new__(type(self))
        Law.__init__(law)
        mean = float(alpha) * self.mean
        law._keep(mean, float(alpha) ** 2 * self.variances + float(sigma) ** 2, self.basis)
        return law

    def flow(self, path: Path, x: Event, t: float | Tensor, s: float | Tensor) -> Event:
        """The PF-ODE from t to s, either way: each eigendirection keeps its number of standard deviations.

        `x_s = alpha_s m + sqrt((alpha_s^2 C + sigma_s^2) / (alpha_t^2 C + sigma_t^2)) (x_t - alpha_t m)`.
        """
        flat = self.flat(x)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales_of(path, t, flat), scales_of(path, s, flat)
        mean, spread = self.flat_mean.to(flat.dtype), self.variances.to(flat.dtype)
        before = alpha_t.square() * spread + sigma_t.square()
        after = alpha_s.square() * spread + sigma_s.square()
        moved = self._out_of((after / before).sqrt() * self._into(flat - alpha_t * mean))
        return (alpha_s * mean + moved).to(x.dtype).reshape(x.shape)


def _spectrum(covariance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Variances and basis of a covariance, checked."""
    size = mean.numel()
    if covariance.shape != (size, size):
        raise ArgumentError(f"Gaussian: covariance has shape {tuple(covariance.shape)}: expected ({size}, {size})")
    exact = covariance.to(mean.device, torch.float64)
    slack = 16 * torch.finfo(covariance.dtype).eps * size * float(exact.abs().max())  # rounding of D-term sums
    variances, basis = torch.linalg.eigh(0.5 * (exact + exact.mT))
    if float((exact - exact.mT).abs().max()) > slack or float(variances.min()) < -slack:
        raise ArgumentError("Gaussian: covariance must be symmetric and positive semi-definite")
    return variances.clamp(min=0).to(mean.dtype), basis.to(mean.dtype)
