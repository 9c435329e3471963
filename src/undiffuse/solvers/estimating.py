"""`model_statistics`: what DPM-Solver-v3 needs to know of a model, estimated once, from noisy data.

With `u = x / alpha` and lambda the half log-SNR, `u = E[x_0] + e^-lambda E[eps]` and the flow is
`du/dlambda = E[x_0] - u = -l u - f`, `f = (sigma E[eps] - l x) / alpha = (1 - l) u - E[x_0]`, whatever l is. Zheng et
al. (2023) choose for each coordinate

    l = E[diag(sigma dE[eps]/dx)] = E[1 - alpha diag(dE[x_0]/dx)],    after which f depends least on x;
    s, b: the least squares of `df/dlambda`, along the flow, by `s f + b`.

Expectations are over `x = alpha x_0 + sigma eps`. The diagonal is estimated by `v (dE[x_0]/dx v)`, v random signs, the
derivative of E[x_0] along the flow by a central difference. As f is a sum of u and E[x_0], and its derivative one of
these and that difference, their first and second moments give s and b for any l.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.autodiff import jvp
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.base import Cond, rows_of
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.sampling import placed
from undiffuse.solvers.statistics import ModelStatistics
from undiffuse.solvers.tuned import prediction_of, profile_of

# Beyond these sigma / alpha all is noise, and all is data.
_MOST, _LEAST = 200.0, 1e-3
# E[x_0] is followed along the flow over so much of the half log-SNR to both sides, a power of the rounding of its
# numbers: 0.019 for float32, 0.00012 for float64.
_NEAR = 0.25
# Where a remainder varies by less than this share of the terms that it is made of, it is one number with rounding.
_ROUNDING = 1e-10
# s is kept between these. Where l is the mean over two coordinates of a Gaussian, s = -2 + l_1 + 2 l_2 is in [-2, 1].
# Others are met where a remainder is next to nothing (the ring in much noise: 5 to 11), and are hard to estimate there.
_SCALINGS = (-3.0, 1.0)


class Moments(NamedTuple):
    """Means over samples, at one half log-SNR, of `z = (u, E[x_0], dE[x_0]/dlambda)` and of their products.

    Attributes:
        slope: of `alpha diag(dE[x_0]/dx)`, (*event).
        first: of z, (3, *event).
        second: of z z^T, (3, 3, *event).
    """

    slope: Tensor
    first: Tensor
    second: Tensor


def model_statistics(
    denoiser: Denoiser,
    x_0: Float[Tensor, "n *event"],
    *,
    cond: Cond = None,
    places: int = 64,
    shared: bool = False,
    seed: int = 0,
    batch: int = 64,
    callback: Callable[[int, int], object] | None = None,
) -> ModelStatistics:
    """l, s and b of a denoiser, for `DPMv3`.

    A sample costs about five calls at each place. The noise of a sample is the same at all places, so that errors of
    the estimate change smoothly along the path.

    Args:
        denoiser: any denoiser; guided ones too, with samples of their own for x_0.
        x_0: data, or samples of the model itself, on the device of the denoiser.
        cond: for all n of them.
        places: half log-SNRs, equal steps between sigma / alpha = 200 and 0.001 where the path has these.
        shared: one number for all coordinates instead of one for each.
        seed: of noise and probes.
        batch: samples in a call.
        callback: called with how many samples, times places, are done, and of how many.

    Raises:
        ArgumentError: x_0 or cond of another shape or type, fewer than 2 samples or places, or a denoiser that returns
            numbers that are not finite.
    """
    path, event = denoiser.path, tuple(x_0.shape[1:])
    if not x_0.is_floating_point() or x_0.ndim < 2:
        raise ArgumentError(f"x_0 is {x_0.dtype} of shape {tuple(x_0.shape)}: expected floats, (n, *event)")
    for name, value, least in (("places", places, 2), ("batch", batch, 1)):
        if not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name} is {value!r}: expected a whole number of at least {least}")
    if len(x_0) < 2:
        raise ArgumentError(f"x_0 holds {len(x_0)} samples: expected at least 2, better some hundreds")
    x_0 = x_0.to(torch.promote_types(x_0.dtype, torch.float32))  # differences are taken of it
    cond = placed(cond, len(x_0), x_0.device)
    half_log_snr = _places(path, places, 1.1 * _near(x_0))
    found = measured(denoiser, x_0, half_log_snr, cond=cond, seed=seed, batch=batch, callback=callback)
    values = fitted(half_log_snr, _pooled(found) if shared else found)
    if not all(bool(v.isfinite().all()) for v in values):
        raise ArgumentError("the denoiser returned numbers that are infinite or NaN: it has no statistics")
    about = {"n": len(x_0), "seed": seed, "shared": shared}
    return ModelStatistics(half_log_snr, *values, profile_of(path), repr(path), event, prediction_of(denoiser), about)


def measured(
    denoiser: Denoiser,
    x_0: Float[Tensor, "n *event"],
    half_log_snr: Float[Tensor, " k"],
    *,
    cond: Cond = None,
    seed: int = 0,
    batch: int = 64,
    callback: Callable[[int, int], object] | None = None,
) -> Moments:
    """Moments at places, stacked, in float64 on the CPU; arguments as of `model_statistics`."""
    n, event = len(x_0), tuple(x_0.shape[1:])
    streams = Streams.of(seed, n)
    noise, sign = (streams.normal((n, *event), dtype=x_0.dtype, device=x_0.device) for _ in range(2))
    noise = noise - noise.mean(0)  # its mean is known; in much noise b would be little else
    sums = [_zero(event) for _ in half_log_snr]
    done = 0
    with evaluating(denoiser):
        for rows in torch.arange(n).split(batch):
            some, drawn = rows.to(x_0.device), rows_of(cond, rows)
            for i, place in enumerate(half_log_snr.tolist()):
                found = _moments(denoiser, x_0[some], noise[some], sign[some].sign(), place, drawn)
                sums[i] = Moments(*(a + b / n for a, b in zip(sums[i], found)))
                done += len(rows)
                if callback is not None:
                    callback(done, n * len(half_log_snr))
    return Moments(*(torch.stack(part) for part in zip(*sums)))


def fitted(
    half_log_snr: Float[Tensor, " k"], moments: Moments, linear: Float[Tensor, "k *event"] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(l, s, b) at the places of the moments, each (k, *event).

    Args:
        half_log_snr: the places.
        moments: at each of them, stacked.
        linear: l, where it is not to be the best one.
    """
    linear = 1 - moments.slope if linear is None else linear
    rate = torch.einsum("ij,j...->i...", _differences(half_log_snr), linear)
    rest, zero = 1 - linear, torch.zeros_like(linear)
    # f = (1 - l) u - E[x_0], and its derivative -l' u + (1 - l) (E[x_0] - u) - dE[x_0]/dlambda.
    f = torch.stack([rest, zero - 1, zero], 1)
    change = torch.stack([-rate - rest, rest, zero - 1], 1)
    mean, mean_change = ((c * moments.first).sum(1) for c in (f, change))
    covariance = moments.second - moments.first[:, :, None] * moments.first[:, None]
    spread = torch.einsum("ka...,kab...,kb...->k...", f, covariance, f)
    together = torch.einsum("ka...,kab...,kb...->k...", f, covariance, change)
    size = (f.square() * torch.stack([moments.second[:, a, a] for a in range(3)], 1)).sum(1)
    varies = spread > _ROUNDING * size
    scaling = torch.where(varies, together / torch.where(varies, spread, 1.0), 0.0).clamp(*_SCALINGS)
    return linear, scaling, mean_change - scaling * mean


def _near(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps ** _NEAR


def _places(path: Path, places: int, free: float) -> Float[Tensor, " k"]:
    """Equal steps; so much is left free at the ends of the path."""
    ends = path.half_log_snr(torch.tensor([path.t_high, path.t_low], dtype=torch.float64)).tolist()
    first, last = max(ends[0] + free, -math.log(_MOST)), min(ends[1] - free, -math.log(_LEAST))
    return torch.linspace(first, last, places, dtype=torch.float64)


def _differences(places: Float[Tensor, " k"]) -> Float[Tensor, "k k"]:
    """The matrix of derivatives at the places, of the polynomial through the nearest five."""
    k = len(places)
    reach = min(5, k)
    found = torch.zeros(k, k, dtype=torch.float64)
    for i, place in enumerate(places):
        first = min(max(i - reach // 2, 0), k - reach)
        powers = (places[first : first + reach] - place) ** torch.arange(reach)[:, None]
        wanted = torch.zeros(reach, dtype=torch.float64)
        wanted[1] = 1.0
        found[i, first : first + reach] = torch.linalg.solve(powers, wanted)
    return found


def _zero(event: tuple[int, ...]) -> Moments:
    return Moments(*(torch.zeros(*lead, *event, dtype=torch.float64) for lead in ((), (3,), (3, 3))))


def _moments(denoiser: Denoiser, x_0: Tensor, noise: Tensor, sign: Tensor, place: float, cond: Cond) -> Moments:
    """Sums over a batch, in float64 on the CPU."""

    def level(half_log_snr: float) -> tuple[Tensor, float]:
        t = denoiser.path.time_of(torch.tensor(half_log_snr, dtype=torch.float64))
        return t.to(x_0), float(denoiser.path.alpha(t))

    t, alpha = level(place)
    u = x_0 + math.exp(-place) * noise
    value, pushed = jvp(lambda x: denoiser(x, t, cond), alpha * u, alpha * sign)
    ends, near = [], _near(u)
    for gap in (near, -near):
        t, alpha = level(place + gap)
        ends.append(denoiser(alpha * (u + gap * (value - u)), t, cond))
    z = torch.stack([u, value, (ends[0] - ends[1]) / (2 * near)], 1).to("cpu", torch.float64)
    slope = (sign * pushed).sum(0).to("cpu", torch.float64)
    return Moments(slope, z.sum(0), torch.einsum("na...,nb...->ab...", z, z))


def _pooled(moments: Moments) -> Moments:
    """Means over the coordinates too, each coordinate counted as so many samples."""
    event = moments.slope.ndim - 1
    return Moments(*(m.mean(tuple(range(m.ndim - event, m.ndim)), keepdim=True) for m in moments))
