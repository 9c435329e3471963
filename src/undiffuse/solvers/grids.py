"""Grids: the times a run visits, float64, strictly decreasing, from the path's `t_max` to its `t_min`.

`steps` steps need `steps + 1` times. No network is called between `t_min` and `t_low`: where equal steps would put a
time there, the last one before `t_min` is `t_low`, and the step from it to sigma = 0 is a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.paths import Path, for_values

Grid = Float[Tensor, " n"]
Map = Callable[[Path, Tensor], Tensor]


@dataclass(frozen=True)
class Spacing:
    """Equal steps in `coordinate(path, t)`, whose inverse is `time(path, c)`.

    `in_level`: the coordinate is a function of the log-SNR, finite between t_low and t_high only; those then take the
    place of the ends, t_max is put for t_high, and t_min is appended.
    """

    coordinate: Map
    time: Map
    in_level: bool = False

    def between(self, path: Path, start: float, end: float, points: int) -> list[float]:
        """`points` times from start to end, the ends exact where there are two."""
        first, last = self.coordinate(path, torch.tensor([start, end], dtype=torch.float64)).tolist()
        equal = torch.linspace(0, 1, points, dtype=torch.float64).mul_(last - first).add_(first)
        inner = self.time(path, equal).tolist()[1:-1]
        return [start, *inner, end][:points]


def canonical_time(path: Path, t: Tensor) -> Tensor:
    """`sigma / (alpha + sigma)` in [0, 1]: the time of equal noise on the path `Linear` (Prop. 6.3.3)."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return sigma / (alpha + sigma)


def _of_canonical(path: Path, tau: Tensor) -> Tensor:
    # Angles are the coordinate in which every path gives its inverse, ends included.
    return path.time_of_angle(torch.atan2(tau, 1 - tau))


# Measured, see `Solver.default_grid`.
_CANONICAL = 1.5
# Halvings of an interval of angles: it is as wide as rounding then.
_HALVINGS = 60


def karras(rho: float = 7.0) -> Spacing:
    """Equal steps in `(sigma / alpha)^(1 / rho)` (Karras et al. 2022, eq. 5): 1 is equal in the level, infinity in its
    logarithm; their sampler has 7.

    Raises:
        ArgumentError: rho not above 0, or infinite (that is "half-log-snr").
    """
    if not 0 < rho < math.inf:
        raise ArgumentError(f"rho is {rho}: expected a number above 0; for the limit of large ones take half-log-snr")

    def to(path: Path, t: Tensor) -> Tensor:
        return torch.exp(-path.half_log_snr(t) / rho)

    return Spacing(to, lambda path, c: path.time_of(-rho * c.log()), in_level=True)


def mixed(first: str | Spacing, second: str | Spacing, share: float = 0.5) -> Spacing:
    """Of n steps `share` n are spent as `second` spends them, the others as `first`: the densities of times are mixed.

    With u_i a coordinate scaled to 0 at the start of the path and 1 at its end, steps are equal in

        c(t) = (1 - share) u_1(t) + share u_2(t).

    Share 0 is `first` and share 1 `second`, themselves. Where either is a function of the log-SNR that is infinite at
    the ends, the ends are t_high and t_low for both. The inverse is found by halving, to rounding.

    Raises:
        ArgumentError: share outside [0, 1], or an unknown name.
    """
    if not 0 <= share <= 1:
        raise ArgumentError(f"share is {share}: expected a number in [0, 1], how much is spent as the second does")
    one, two = (choose(kind, GRIDS, "grid") if isinstance(kind, str) else kind for kind in (first, second))
    if share in (0, 1):
        return two if share else one
    in_level = one.in_level or two.in_level

    def ends(path: Path) -> Tensor:
        given = (path.t_high, path.t_low) if in_level else (path.t_max, path.t_min)
        return torch.tensor(given, dtype=torch.float64)

    def to(path: Path, t: Tensor) -> Tensor:
        total = torch.zeros_like(t)
        for spacing, weight in ((one, 1 - share), (two, share)):
            start, end = spacing.coordinate(path, ends(path))
            total = total + weight * (spacing.coordinate(path, t) - start) / (end - start)
        return total

    def back(path: Path, c: Tensor) -> Tensor:
        # Angles are a coordinate in which every path gives its inverse; c falls with them.
        high, low = (angle.expand_as(c) for angle in path.angle(ends(path)))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            before = to(path, path.time_of_angle(middle)) < c
            low, high = torch.where(before, low, middle), torch.where(before, middle, high)
        return path.time_of_angle((low + high) / 2)

    return Spacing(to, back, in_level)


@lru_cache(maxsize=64)
def curved_angle(scale: float = 1.0, start: float = 20.0, power: float | None = None) -> Spacing:
    """Equal steps in `atan(sigma / (scale alpha))^(1 / power)`, for data of that spread.

    From sigma / (scale alpha) = `start` where the path begins in alpha = 0. The power is 1.75 + 0.75 log10(scale)
    where none is given, chosen for `Multistep()` by its error on a ring of 8 modes and 1,000 digits (scale 1) and on a
    small network of CIFAR-10 (scale 10).
    """
    if not (0 < scale < math.inf and 0 < start < math.inf):
        raise ArgumentError(f"scale is {scale} and start is {start}: expected numbers above 0")
    power = 1.75 + 0.75 * math.log10(scale) if power is None else power
    if not 0 < power < math.inf:
        raise ArgumentError(f"power is {power}: expected a number above 0; that of the scale {scale} is none")

    def to(path: Path, t: Tensor) -> Tensor:
        alpha = path.alpha(t)
        theta = torch.atan2(path.sigma(t), scale * alpha)
        return torch.where(alpha > 0, theta, math.atan(start)) ** (1 / power)

    def back(path: Path, c: Tensor) -> Tensor:
        theta = c**power
        return path.time_of_angle(torch.atan2(scale * torch.sin(theta), torch.cos(theta)))

    return Spacing(to, back)


GRIDS: dict[str, Spacing] = {
    "time": Spacing(lambda path, t: t, lambda path, c: c),
    "quadratic": Spacing(lambda path, t: (t - path.t_min).sqrt(), lambda path, c: path.t_min + c.square()),
    "angle": Spacing(lambda path, t: path.angle(t), lambda path, c: path.time_of_angle(c)),
    "curved-angle": curved_angle(),
    "canonical": Spacing(
        lambda path, t: canonical_time(path, t) ** (1 / _CANONICAL),
        lambda path, c: _of_canonical(path, c**_CANONICAL),
    ),
    "half-log-snr": Spacing(lambda path, t: path.half_log_snr(t), lambda path, c: path.time_of(c), in_level=True),
    "karras": karras(),
}
GRIDS["mixed"] = mixed("angle", "half-log-snr")


def make_grid(path: Path, steps: int, kind: str | Spacing = "karras") -> Grid:
    """`steps + 1` times from t_max to t_min, strictly decreasing.

    Args:
        path: the path to walk.
        steps: number of steps.
        kind: what the steps are equal in: "time" t; "quadratic" sqrt(t - t_min); "angle" atan2(sigma, alpha);
            "canonical" (sigma / (alpha + sigma))^(2 / 3); "half-log-snr" log(alpha / sigma); "karras"
            (sigma / alpha)^(1 / 7); "curved-angle" see there; "mixed" half of the angle and half of half log-SNR; or
            a `Spacing`: `karras(rho)`, `mixed(first, second, share)`, `curved_angle(scale)`.

    Raises:
        ArgumentError: steps < 1, an unknown kind, or so many steps that two times coincide.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ArgumentError(f"steps is {steps!r}: expected a whole number of at least 1")
    spacing = choose(kind, GRIDS, "grid") if isinstance(kind, str) else kind
    times = _times(path, steps, spacing)
    if not all(s < t for t, s in pairwise(times)):
        raise ArgumentError(f"{steps} steps of the grid {kind!r} cannot be told apart on {path}: take fewer")
    return torch.tensor(times, dtype=torch.float64)


@for_values
def _times(path: Path, steps: int, spacing: Spacing) -> tuple[float, ...]:
    if steps == 1:
        return path.t_max, path.t_min
    start = path.t_high if spacing.in_level else path.t_max
    cut = spacing.in_level and path.t_min < path.t_low
    times = [] if cut else spacing.between(path, start, path.t_min, steps + 1)
    if cut or times[-2] < path.t_low:
        times = [*spacing.between(path, start, path.t_low, steps), path.t_min]
    return path.t_max, *times[1:]


def check_grid(path: Path, grid: Tensor) -> Grid:
    """A caller's times as float64 on the CPU.

    Raises:
        ArgumentError: not a one-dimensional float tensor of 2 times or more, not strictly decreasing, off the path.
    """
    if not isinstance(grid, Tensor) or not grid.is_floating_point() or grid.ndim != 1 or len(grid) < 2:
        given = f"{grid.dtype} of shape {tuple(grid.shape)}" if isinstance(grid, Tensor) else type(grid).__name__
        raise ArgumentError(f"grid is {given}: expected a name, or a one-dimensional float tensor of 2 or more times")
    # The ends of the path, rounded to the dtype of the grid, are its ends.
    slack = torch.finfo(grid.dtype).eps * max(abs(path.t_min), abs(path.t_max))
    times = grid.detach().to("cpu", torch.float64)
    low, high = float(times.min()), float(times.max())
    if not (math.isfinite(low) and low >= path.t_min - slack and high <= path.t_max + slack):
        raise ArgumentError(
            f"grid spans {low:g} to {high:g}: expected times in [{path.t_min:g}, {path.t_max:g}] of {path}"
        )
    times = times.clamp(path.t_min, path.t_max)
    rises = (times[1:] >= times[:-1]).nonzero()
    if len(rises):
        i = int(rises[0])
        raise ArgumentError(
            f"grid must decrease strictly, from noise to data: time {i + 1} is {times[i + 1]:g} after {times[i]:g}"
        )
    return times
