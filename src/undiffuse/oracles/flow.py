"""The probability flow, solved to rounding: what solvers are measured against."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.shapes import as_time
from undiffuse.fields import Denoiser
from undiffuse.oracles.law import Cond, Event

# Columns of the extrapolation table: substeps 2, 4, ..., 14 give order 14 in 50 evaluations.
_COLUMNS = 7
_MAX_STEPS = 10_000


def exact_flow(
    denoiser: Denoiser, x: Event, t: float | Tensor, s: float | Tensor, rtol: float = 1e-11, cond: Cond = None
) -> Event:
    """The PF-ODE map from time t to time s, either way, in float64.

    In the angle `theta = atan2(sigma, alpha)` the curve `y = x / hypot(alpha, sigma)` obeys

        dy / dtheta = cos(theta) E[eps | x] - sin(theta) E[x_0 | x],

    regular at both ends (Prop. 6.3.3 with the trigonometric path). Gragg-Bulirsch-Stoer extrapolation (Hairer,
    Norsett and Wanner 1993, section II.9), steps of adapted length. The step is shared by the batch and accepted when
    its worst sample is within the tolerance.

    Args:
        denoiser: smooth in x and t; an oracle's, which answers without dividing by sigma.
        x: state at time t, (B, *event).
        t, s: scalars on the path.
        rtol: local error per step, relative to the root mean square of y, per sample.

    Raises:
        ArgumentError: a time off the path, rtol below 1e-14, or a field too rough to integrate.
    """
    path = denoiser.path
    start, end = (torch.as_tensor(v, dtype=torch.float64).reshape(()) for v in (t, s))
    path.check_time(torch.stack([start, end]))
    if not rtol >= 1e-14:
        raise ArgumentError(f"rtol is {rtol}: expected at least 1e-14, the rounding of float64")

    def slope(theta: float, y: Tensor) -> Tensor:
        time = path.time_of_angle(torch.tensor(theta, dtype=torch.float64)).clamp(path.t_min, path.t_max)
        # Scales from the time itself, so that its rounding near an end is seen by all alike.
        alpha, sigma = float(path.alpha(time)), float(path.sigma(time))
        norm = math.hypot(alpha, sigma)
        x_0, noise = denoiser.estimate(y * norm, as_time(time, y), cond)
        return (alpha / norm) * noise - (sigma / norm) * x_0

    norms = [float(torch.hypot(path.alpha(v), path.sigma(v))) for v in (start, end)]
    angles = [float(path.angle(v)) for v in (start, end)]
    with torch.no_grad():
        return _integrate(slope, x.double() / norms[0], angles[0], angles[1], rtol) * norms[1]


def _integrate(slope: Callable[[float, Tensor], Tensor], y: Tensor, start: float, end: float, rtol: float) -> Tensor:
    position, step = start, 0.25 * (end - start)
    for _ in range(_MAX_STEPS):
        if position == end:
            return y
        if abs(end - position) <= abs(step) * (1 + 1e-9):
            step = end - position
        proposal, error = _extrapolated(slope, y, position, step)
        ratio = error / rtol
        if ratio <= 1:
            y, position = proposal, end if step == end - position else position + step
        # The error of the last but one entry of the table is of order h^(2 K - 1).
        factor = 0.9 * (max(ratio, 1e-16) ** (-1 / (2 * _COLUMNS - 1)) if math.isfinite(ratio) else 0.0)
        step *= min(4.0, max(0.1, factor))
    raise ArgumentError(
        f"exact_flow stopped at angle {position:.6g} of [{start:.6g}, {end:.6g}] after {_MAX_STEPS} steps: "
        "the field is not smooth there (dropout? a point mass at sigma = 0?)"
    )


def _extrapolated(slope: Callable[[float, Tensor], Tensor], y: Tensor, position: float, step: float):
    """One step, and the worst sample's error relative to its size."""
    first = slope(position, y)
    row: list[Tensor] = []
    for column in range(1, _COLUMNS + 1):
        # Modified midpoint rule with 2 * column substeps: an expansion in even powers of the substep.
        h = step / (2 * column)
        before, now = y, y + h * first
        for k in range(1, 2 * column):
            before, now = now, before + 2 * h * slope(position + k * h, now)
        # Neville's scheme in h^2, towards h = 0.
        new = [now]
        for j, older in enumerate(row, start=1):
            growth = (column / (column - j)) ** 2 - 1
            new.append(new[-1] + (new[-1] - older) / growth)
        row = new
    gap, size = (v.flatten(1).square().mean(1).sqrt() for v in (row[-1] - row[-2], row[-1]))
    worst = (gap / size.clamp(min=torch.finfo(size.dtype).tiny)).max()
    return row[-1], float(worst)
