"""Discrete chains of noise levels, DDPM's and NCSN's, as continuous paths."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.paths.base import Path, Time


class Tabulated(Path):
    """A discrete chain of N levels as a path: level i sits at `t = i / N`, the half log-SNR is linear between levels.

    Below the first level sigma goes linearly to 0 at t = 0. If the last level has alpha = 0 (zero terminal SNR),
    alpha goes linearly to it. `from_betas` keeps `alpha^2 + sigma^2 = 1` (DDPM), `from_sigmas` keeps `alpha = 1`
    (NCSN). Derivatives are those of the piece to the right of a level.

    Args:
        half_log_snr: of levels 1 ... N, strictly decreasing; the last may be minus infinity.
        variance_preserving: which of the two families.

    Raises:
        ArgumentError: fewer than 2 levels, or levels that do not decrease.
    """

    value: ClassVar[bool] = True

    def __init__(self, half_log_snr: Tensor, *, variance_preserving: bool = True):
        table = half_log_snr.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2:
            raise ArgumentError(f"a table needs at least 2 levels in one dimension: given shape {tuple(table.shape)}")
        if not bool((table[1:] < table[:-1]).all()) or not bool(torch.isfinite(table[:-1]).all()):
            raise ArgumentError("the levels must grow noisier from one to the next: the half log-SNR must decrease")
        self.table = table
        self.variance_preserving = variance_preserving
        self.reaches_noise = bool(torch.isinf(table[-1]))
        if self.reaches_noise and not variance_preserving:
            raise ArgumentError("a table with alpha = 1 cannot end in an infinite sigma")
        n = len(table)
        self.t_low = 1 / n
        self.t_high = (n - 1) / n if self.reaches_noise else 1.0
        self._finite = table[:-1] if self.reaches_noise else table
        first = self._from_snr(table[:1])
        self._first_sigma = float(first[1])
        self._last_alpha = float(self._from_snr(self._finite[-1:])[0])

    def __repr__(self) -> str:
        family = "from_betas" if self.variance_preserving else "from_sigmas"
        ends = f"{float(self.table[0]):.4g} ... {float(self.table[-1]):.4g}"
        return f"Tabulated.{family}(<{len(self.table)} levels, half log-SNR {ends}>)"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Tabulated)
            and self.variance_preserving == other.variance_preserving
            and torch.equal(self.table, other.table)
        )

    def __hash__(self) -> int:
        return hash((self.variance_preserving, *self.table.tolist()))

    @classmethod
    def from_betas(cls, betas: Tensor) -> Tabulated:
        """DDPM's chain: `alpha_i^2 = prod_{j <= i} (1 - beta_j)` (Ho et al. 2020), step variances beta in (0, 1]."""
        betas = torch.as_tensor(betas).to("cpu", torch.float64)
        if betas.ndim != 1 or not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
            raise ArgumentError("betas must be one-dimensional, in (0, 1), the last at most 1")
        log_signal = torch.log1p(-betas).cumsum(0)  # log alpha^2
        return cls(0.5 * (log_signal - torch.log(-torch.expm1(log_signal))), variance_preserving=True)

    @classmethod
    def from_sigmas(cls, sigmas: Tensor) -> Tabulated:
        """NCSN's chain: `x_i = x_0 + sigma_i eps` with growing sigmas (ours: noise grows with time)."""
        sigmas = torch.as_tensor(sigmas).to("cpu", torch.float64)
        if sigmas.ndim != 1 or not bool((sigmas > 0).all()) or not bool(torch.isfinite(sigmas).all()):
            raise ArgumentError("sigmas must be one-dimensional, finite and positive")
        return cls(-torch.log(sigmas), variance_preserving=False)

    def _from_snr(self, half_log_snr: Tensor) -> tuple[Tensor, Tensor]:
        if self.variance_preserving:
            return torch.sigmoid(2 * half_log_snr).sqrt(), torch.sigmoid(-2 * half_log_snr).sqrt()
        return torch.ones_like(half_log_snr), torch.exp(-half_log_snr)

    def _piece(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Half log-SNR and its slope in t (of the middle pieces), and masks of the first and the last piece."""
        n = len(self.table)
        table = self._finite.to(t.device, t.dtype)
        u = t * n
        k = u.floor().clamp(1, len(table) - 1).long()
        left, right = table[k - 1], table[k]
        slope = right - left
        value = left + (u - k) * slope
        return value, slope * n, u < 1, (u > n - 1) & self.reaches_noise

    def _rest(self, kept: Tensor) -> Tensor:
        """`sqrt(1 - kept^2)`: the other scale of a variance-preserving pair."""
        return ((1 - kept) * (1 + kept)).clamp(min=0).sqrt()

    def alpha(self, t: Time) -> Time:
        if not self.variance_preserving:
            return torch.ones_like(t)
        value, _, first, last = self._piece(t)
        alpha = torch.where(first, self._rest(self._first_sigma * t * len(self.table)), self._from_snr(value)[0])
        return torch.where(last, self._last_alpha * (1 - t) * len(self.table), alpha)

    def sigma(self, t: Time) -> Time:
        value, _, first, last = self._piece(t)
        sigma = torch.where(first, self._first_sigma * t * len(self.table), self._from_snr(value)[1])
        return torch.where(last, self._rest(self._last_alpha * (1 - t) * len(self.table)), sigma)

    def alpha_dot(self, t: Time) -> Time:
        if not self.variance_preserving:
            return torch.zeros_like(t)
        _, slope, first, last = self._piece(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        n = len(self.table)
        dot = torch.where(first, -sigma * self._first_sigma * n / alpha, alpha * sigma.square() * slope)
        return torch.where(last, torch.full_like(t, -self._last_alpha * n), dot)

    def sigma_dot(self, t: Time) -> Time:
        _, slope, first, last = self._piece(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        n = len(self.table)
        inside = -sigma * slope * (alpha.square() if self.variance_preserving else 1.0)
        dot = torch.where(first, torch.full_like(t, self._first_sigma * n), inside)
        return torch.where(last, alpha * self._last_alpha * n / sigma, dot)

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        n = len(self.table)
        table = self._finite.to(sigma.device, sigma.dtype)
        norm = torch.hypot(alpha, sigma) if self.variance_preserving else alpha
        scaled_sigma, scaled_alpha = sigma / norm, alpha / norm
        in_first = scaled_sigma < self._first_sigma
        in_last = (scaled_alpha < self._last_alpha) & self.reaches_noise
        # 1 stands in where the piece is another one, so that no logarithm of 0 is taken.
        middle = torch.where(in_first | in_last, torch.ones_like(sigma), alpha / sigma)
        value = torch.log(middle).clamp(float(table[-1]), float(table[0]))
        k = torch.searchsorted(-table, -value.contiguous()).clamp(1, len(table) - 1)
        left, right = table[k - 1], table[k]
        t = (k + (value - left) / (right - left)) / n
        t = torch.where(in_first, scaled_sigma / self._first_sigma / n, t)
        return torch.where(in_last, 1 - scaled_alpha / self._last_alpha / n, t)

    def input_scale(self, t: Time) -> Time:
        if self.variance_preserving:
            return torch.ones_like(t)
        return torch.rsqrt(1 + self.sigma(t).square())
