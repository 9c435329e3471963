"""Data to latent and back along the probability flow; what lies between two data points, or around one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.shapes import pad_to
from undiffuse.fields import Denoiser
from undiffuse.solvers.adaptive import Tolerance
from undiffuse.solvers.base import Bound, Cond, rows_of
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.flow import flow
from undiffuse.solvers.pairs import PAIRS
from undiffuse.solvers.sampling import placed

Event = Float[Tensor, "b *event"]


def check_event(x: Tensor, batch: int) -> None:
    """Raises ArgumentError unless x is (B, *event) of finite floats, and batch at least 1."""
    if not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        raise ArgumentError(f"x is {x.dtype} of shape {tuple(x.shape)}: expected floats of shape (B, *event), B >= 1")
    if batch < 1:
        raise ArgumentError(f"batch is {batch}: expected at least 1")
    bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero()[:, 0]
    if len(bad):
        raise ArgumentError(f"x is infinite or NaN in {len(bad)} of {len(x)} samples (first: {int(bad[0])})")


def span(bound: Bound) -> tuple[float, float]:
    """The times between which a model's flow runs: where it first knows an answer, and the path's end."""
    return max(bound.path.t_min, bound.field.t_low), bound.path.t_max


def first_scale(bound: Bound) -> float:
    """alpha at the flow's first time: data is `x_t / alpha` there."""
    return float(bound.path.alpha(torch.tensor(span(bound)[0], dtype=torch.float64)))


def encode(
    denoiser: Denoiser,
    x: Event,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    cond: Cond = None,
    method: str = "dopri5",
    batch: int = 256,
) -> Event:
    """The latent of data: where the probability flow carries `alpha(t_low) x` from the model's t_low to t_max.

    It is what `sample(denoiser, noise=latent)` starts from. `decode` is the inverse, to the tolerance.

    Args:
        denoiser: the model.
        x: data, floats (B, *event); the flow is solved in their type.
        rtol, atol: error of a step in units of `x / hypot(alpha, sigma)`, by its length over all coordinates: of images
            a mean over them hides what one digit's edge is off, and the way back enlarges it.
        cond: the condition of each sample.
        method: "dopri5", "tsit5" or "bosh3".
        batch: samples at a time.

    Raises:
        ArgumentError: x that is no finite (B, *event). SamplingError: the tolerance cannot be met.
    """
    return _carried(denoiser, x, True, Tolerance(rtol, atol, length=True), cond, method, batch)


def decode(
    denoiser: Denoiser,
    z: Event,
    *,
    temperature: float = 1.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    cond: Cond = None,
    method: str = "dopri5",
    batch: int = 256,
) -> Event:
    """Data from latents: the flow from t_max to the model's t_low, over alpha there. The inverse of `encode`.

    Args:
        z: latents, (B, *event).
        temperature: z is multiplied by it first; below 1 it moves to where the prior is denser.
        denoiser, rtol, atol, cond, method, batch: as of `encode`.

    Raises:
        ArgumentError: z that is no finite (B, *event), temperature < 0. SamplingError: the tolerance cannot be met.
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ArgumentError(f"temperature is {temperature}: expected a finite number >= 0")
    return _carried(denoiser, z * temperature, False, Tolerance(rtol, atol, length=True), cond, method, batch)


def _carried(
    denoiser: Denoiser, x: Event, forward: bool, tolerance: Tolerance, cond: Cond, method: str, batch: int
) -> Event:
    choose(method, PAIRS, "method")
    check_event(x, batch)
    cond = placed(cond, len(x), x.device)
    parts = []
    with evaluating(denoiser):
        for rows in torch.arange(len(x), device=x.device).split(batch):
            bound = Bound(denoiser, rows_of(cond, rows))
            low, high = span(bound)
            scale = first_scale(bound)
            given = x[rows] * scale if forward else x[rows]
            t, s = (low, high) if forward else (high, low)
            moved = flow(bound, given, t, s, pair=PAIRS[method], tolerance=tolerance)[0]
            parts.append(moved if forward else moved / scale)
    return torch.cat(parts)


def _linear(a: Event, b: Event, w: Tensor) -> Event:
    return (1 - w) * a + w * b


def _spherical(a: Event, b: Event, w: Tensor) -> Event:
    """Along the great circle: `(sin((1 - w) phi) a + sin(w phi) b) / sin(phi)`, phi the angle between (Shoemake 1985).

    Where that says nothing (one direction, opposite ones, a zero) it is the straight line.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    phi = pad_to(torch.arccos(cosine.nan_to_num(nan=1.0).clamp(-1, 1)), a)
    flat = torch.sin(phi) < 1e-6
    sine = torch.where(flat, torch.ones_like(phi), torch.sin(phi))
    on_a = torch.where(flat, 1 - w, torch.sin((1 - w) * phi) / sine)
    on_b = torch.where(flat, w.expand_as(phi), torch.sin(w * phi) / sine)
    return on_a.to(a.dtype) * a + on_b.to(a.dtype) * b


WAYS = {"linear": _linear, "spherical": _spherical}


def interpolate(
    denoiser: Denoiser,
    x_a: Event,
    x_b: Event,
    weights: Sequence[float] | Float[Tensor, " w"],
    *,
    way: str = "spherical",
    cond: Cond = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Float[Tensor, "w b *event"]:
    """Data between x_a (weight 0) and x_b (weight 1): both are encoded, mixed, and decoded.

    Args:
        denoiser, cond, rtol, atol: as of `encode`.
        x_a, x_b: data of one shape (B, *event).
        weights: W numbers.
        way: "spherical", which keeps the length that latents have in many dimensions, or "linear".

    Raises:
        ArgumentError: unlike shapes, an unknown way, no weights.
    """
    mix = choose(way, WAYS, "way")
    if x_a.shape != x_b.shape:
        raise ArgumentError(f"x_a has shape {tuple(x_a.shape)} and x_b {tuple(x_b.shape)}: expected the same")
    table = torch.as_tensor(weights, dtype=torch.float64, device=x_a.device)
    if table.ndim != 1 or len(table) == 0:
        raise ArgumentError(f"weights has shape {tuple(table.shape)}: expected (W,), at least one")
    options = {"rtol": rtol, "atol": atol, "cond": cond}
    z_a, z_b = encode(denoiser, x_a, **options), encode(denoiser, x_b, **options)
    return torch.stack([decode(denoiser, mix(z_a, z_b, w).to(x_a.dtype), **options) for w in table])
