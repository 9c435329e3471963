"""Keeping E[x_0] in the range of the data, which strong guidance leaves."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.shapes import as_time, pad_to
from undiffuse.fields import Denoiser

Event = Float[Tensor, "b *event"]
Time = Float[Tensor, ""] | Float[Tensor, " b"] | float
Cond = Tensor | dict[str, Tensor] | None


class _Bounded(Denoiser):
    """A denoiser whose x_0 is changed after the call; noise, score and velocity are those of the changed x_0.

    It has kinks, and an infinite slope where the data themselves leave the range: no field for adaptive solvers.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser.path)
        self.denoiser = denoiser

    @property
    def t_low(self) -> float:
        return self.denoiser.t_low

    def bounded(self, x_0: Event) -> Event:
        """What takes the place of x_0."""
        raise NotImplementedError

    def forward(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        return self.bounded(self.denoiser(x_t, t, cond))

    def estimate(self, x_t: Event, t: Time, cond: Cond = None) -> tuple[Event, Event]:
        x_0, noise = self.denoiser.estimate(x_t, t, cond)
        time, kept = as_time(t, x_t), self.bounded(x_0)
        moved = x_0 - kept
        # Where nothing moves the noise is the denoiser's own, where sigma = 0 too.
        on_noise = pad_to(self.path.alpha(time) / self.path.sigma(time), x_t) * moved
        return kept, noise + torch.where(moved == 0, torch.zeros_like(moved), on_noise)


class Clipped(_Bounded):
    """E[x_0 | x_t] clipped to [low, high], static thresholding; `eps = (x_t - alpha x_0) / sigma` of the clipped x_0.

    For data of known range only, such as pixels in [-1, 1]: in it clipping brings every estimate nearer to the truth.
    It costs a pass over x_0. A solver that starts in noise then ends in the range on its last step, where that is a
    closed form, but saturated: under strong guidance many pixels are at the ends (see `DynamicThreshold`).

    Args:
        denoiser: guided or not.
        low, high: the range.

    Raises:
        ArgumentError: not `low < high`, both finite.
    """

    def __init__(self, denoiser: Denoiser, low: float = -1.0, high: float = 1.0):
        super().__init__(denoiser)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ArgumentError(f"low is {low}, high is {high}: expected the range of the data, low < high")
        self.low, self.high = low, high

    def bounded(self, x_0: Event) -> Event:
        return x_0.clamp(self.low, self.high)


class DynamicThreshold(_Bounded):
    """E[x_0 | x_t] clipped to [-s, s] and scaled back, `limit clip(x_0, -s, s) / s` (Saharia et al. 2022, section 2.3).

    s is the `quantile` of |x_0| over the entries of each sample (linear between the two nearest, `torch.quantile`'s),
    at least `limit`. Where more than a share `1 - quantile` of the entries is beyond the limit, all of them move
    inwards, so that few are left at the ends. Noise, score and velocity are those of the new x_0.

    For data in [-limit, limit] only, such as pixels in [-1, 1]: of data without a range it moves right answers too, and
    no longer follows any score. A sample in which nothing is beyond the limit is as without it. It costs the choice of
    the `1 - quantile` largest entries of each sample, some twenty passes over x_0.

    Args:
        denoiser: guided or not.
        quantile: in (0, 1]; 1 is the maximum.
        limit: largest magnitude of the data.

    Raises:
        ArgumentError: quantile or limit out of range.
    """

    def __init__(self, denoiser: Denoiser, quantile: float = 0.995, limit: float = 1.0):
        super().__init__(denoiser)
        if not 0 < quantile <= 1:
            raise ArgumentError(f"quantile is {quantile}: expected a share in (0, 1], such as 0.995")
        if not (limit > 0 and math.isfinite(limit)):
            raise ArgumentError(f"limit is {limit}: expected the largest magnitude of the data, > 0, such as 1")
        self.quantile, self.limit = quantile, limit

    def bounded(self, x_0: Event) -> Event:
        s = magnitude_quantile(x_0, self.quantile).clamp(min=self.limit)
        s = pad_to(s, x_0)
        return x_0.clamp(-s, s) * (self.limit / s)


def magnitude_quantile(x: Event, quantile: float) -> Float[Tensor, " b"]:
    """The quantile of |x| over the entries of each sample, linear between the two nearest; samples of any size."""
    size = x.abs().reshape(len(x), -1)
    place = quantile * (size.shape[1] - 1)
    below = min(int(place), size.shape[1] - 1)
    # Only what lies above is sorted. torch.quantile sorts everything, and takes 2^24 entries at most.
    largest = size.topk(size.shape[1] - below, dim=1).values
    lower, upper = largest[:, -1], largest[:, max(-2, -largest.shape[1])]
    return torch.lerp(lower, upper, place - below)
