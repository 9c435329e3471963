"""Annealed Langevin dynamics: at each noise level a few steps towards p_t, then on to the next level (section 3.4.3).

In `y = x / alpha`, whose noise level is `l = sigma / alpha` on every affine path, a Langevin step of size eta is
`y + eta grad log p_l(y) + sqrt(2 eta) z`. With the score `(E[x_0 | y] - y) / l^2` and `r = eta / l^2`, in x again:

    x <- (1 - r) x + r alpha E[x_0 | x] + sigma sqrt(2 r) z.

NCSN (Song and Ermon 2019) writes `y + a / 2 score + sqrt(a) z`: its a is 2 eta. NCSNv2 writes eta itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.shapes import pad_to
from undiffuse.core.sums import combine
from undiffuse.paths import Path
from undiffuse.paths.levels import check_levels
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, scales
from undiffuse.solvers.exponential import exponential_coefficients
from undiffuse.solvers.grids import make_grid

# NCSN's: a = 2e-5 at sigma_1 = 0.01 (Song and Ermon 2019, section 5), so r = 1e-5 / 1e-4.
_ALONE = 0.1


def noise_variance(r: float, ratio: float, steps: int) -> float:
    """Variance, in units of l^2, of noise that came from level `ratio l`, after `steps` Langevin steps at level l.

    `(1 - r)^(2 K) (gamma^2 - v) + v` with the stationary variance `v = 2 / (2 - r)` (Song and Ermon 2020, proposition
    3): that of a law which is one point, the narrowest there is.
    """
    stationary = 2 / (2 - r)
    return (1 - r) ** (2 * steps) * (ratio**2 - stationary) + stationary


def settled_variance(r: float, ratio: float, steps: int) -> float:
    """What `noise_variance` is after many levels of one ratio: its fixed point `v (1 - rho) / (1 - gamma^2 rho)`.

    `rho = (1 - r)^(2 K)`. Infinite where `gamma^2 rho >= 1`: K steps then lose less noise than a level goes down.
    """
    rho = (1 - r) ** (2 * steps)
    return 2 / (2 - r) * (1 - rho) / (1 - ratio**2 * rho) if ratio**2 * rho < 1 else math.inf


def nearest_step(ratio: float, steps: int) -> float:
    """`r = eta / l^2` in (0, 1) that brings `noise_variance` closest to 1 (Song and Ermon 2020, technique 4).

    It stays above 1: a small r keeps noise of the level before, a large one adds its own. At the minimum the derivative
    `(1 - rho) 2 / (2 - r)^2 - 2 K (1 - r)^(2 K - 1) (gamma^2 - v)` is 0.
    """

    def slope(r: float) -> float:
        kept = (1 - r) ** (2 * steps - 1)
        return (1 - kept * (1 - r)) * 2 / (2 - r) ** 2 - 2 * steps * kept * (ratio**2 - 2 / (2 - r))

    return _root(slope, 0.0, 1.0)


def settled_step(ratio: float, steps: int) -> float:
    """r in (0, 1) with the least `settled_variance`; for K = 1 it is `sqrt(1 - 1 / gamma^2)`, of variance 1 + r.

    Technique 4 looks at one level and starts it from the right law. From the law that the chain itself left at the
    level before, a larger step is best: with K = 1 and gamma = 1.04, variance 1.27 instead of 2. The root of
    `(1 - rho) (1 - gamma^2 rho) - 2 K (1 - r)^(2 K - 1) (gamma^2 - 1) (2 - r)`.
    """

    def slope(r: float) -> float:
        kept = (1 - r) ** (2 * steps - 1)
        rho = kept * (1 - r)
        return (1 - rho) * (1 - ratio**2 * rho) - 2 * steps * kept * (ratio**2 - 1) * (2 - r)

    return _root(slope, 1 - ratio ** (-1 / steps), 1.0)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that is negative at low and positive at high crosses 0, by bisection."""
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return 0.5 * (low + high)


def langevin_step(levels: Float[Tensor, " n"], steps_per_level: int, *, settled: bool = False) -> float:
    """delta of `eta_l = delta sigma_l^2 / sigma_1^2` that leaves the right noise, in units of the data squared.

    On CIFAR-10 (232 levels from 0.01 to 50, K = 5) it is 6.2e-6, NCSNv2's.

    Args:
        levels: `sigma_1 < ... < sigma_L`; their mean ratio is used, which is that of all where they are geometric.
        steps_per_level: K.
        settled: by `settled_step`, as `AnnealedLangevin` chooses, instead of technique 4 (`nearest_step`).

    Raises:
        ArgumentError: levels that do not grow, or K < 1.
    """
    table = check_levels(levels)
    _check_count(steps_per_level)
    ratio = float(table[-1] / table[0]) ** (1 / (len(table) - 1))
    choose_step = settled_step if settled else nearest_step
    return choose_step(ratio, steps_per_level) * float(table[0]) ** 2


def langevin_coefficients(r: float, alpha: float, sigma: float) -> tuple[float, float, float]:
    """Weights of x, of `E[x_0 | x]` and of the noise in a step of relative size r."""
    return 1 - r, r * alpha, sigma * math.sqrt(2 * r)


def snr_relative_step(snr: float, pull: Event, z: Event, sigma: float) -> Float[Tensor, " b"]:
    """r of each sample by the corrector's rule `eta = 2 (snr |z| / |score|)^2`, `score = pull / sigma^2`; at most 1.

    In x and in x / alpha it is the same step. The bound keeps a sample where the score vanishes.
    """
    share = z.flatten(1).square().sum(1) / pull.flatten(1).square().sum(1)
    return (2 * snr**2 * sigma**2 * share).clamp(max=1)


def fixed_langevin(field: Field, x: Event, t: Scalar, r: float, noise: Noise) -> Event:
    """x after one step of relative size r at time t."""
    z, denoised = noise(), field(x, t)
    on_x, on_denoised, on_noise = langevin_coefficients(r, *scales(field, t))
    return combine(x, on_x, denoised, on_denoised).add_(z, alpha=on_noise)


def snr_langevin(field: Field, x: Event, t: Scalar, snr: float, noise: Noise) -> Event:
    """x after one step at time t, its size by `snr_relative_step`."""
    alpha, sigma = scales(field, t)
    z, denoised = noise(), field(x, t)
    pull = combine(x, -1.0, denoised, alpha)
    own = pad_to(snr_relative_step(snr, pull, z, sigma), x)
    return x + own * pull + sigma * (2 * own).sqrt() * z


def _check_count(steps_per_level: int) -> None:
    if not isinstance(steps_per_level, int) or isinstance(steps_per_level, bool) or steps_per_level < 1:
        raise ArgumentError(f"steps_per_level is {steps_per_level!r}: expected a whole number of at least 1")


@dataclass(frozen=True)
class AnnealedLangevin(Solver):
    """Annealed Langevin dynamics (Song and Ermon 2019, algorithm 1), on any affine path.

    The times of the grid are the levels, widest first, all of them run. From t to s: K Langevin steps at level t, then
    x / alpha is carried to s as it is. The last step, to sigma = 0, is Tweedie's: `alpha_s E[x_0 | x_t]`. A grid that
    ends in noise (as on VE) has a level there too, and x keeps its noise. A step out of alpha = 0, where x is all
    noise, is DDIM's. Network calls: K for each level, and 1 for the last denoising.

    It converges slowly, since unadjusted steps leave `2 / (2 - r)` times the variance of a level's noise, or more. With
    more levels in equal ratios gamma, r is about `sqrt(2 log(gamma) / K)`, the variance 1 + r: order 1/2. Where `delta`
    or `snr` holds r fixed, more levels do not help beyond `2 / (2 - r)`: order 0.

    The relative step r = eta / l^2 at level `l = sigma / alpha` is one of three:

    - neither `delta` nor `snr`: the `settled_step` of each level, from its ratio to the level before and K. It looks at
      the noise alone: shares of distant modes settle slower (two modes of 0.8 and 0.2 came out as 0.77 in 500 to 1,000
      calls, and within 0.01 with r = 0.2 to 0.3);
    - `delta`: `eta_l = delta l^2 / l_1^2`, so r = delta / l_1^2 at all levels, l_1 the path's smallest (at its t_low);
    - `snr`: `eta = 2 (snr |z| / |score|)^2` for each draw (Song et al. 2021, algorithm 4), for each sample by itself
      where they take means over the batch, so that a sample does not depend on its neighbours; without their factor
      1 - beta_i on VP; never above l^2. A rule for many dimensions: in few, |score| varies so much that the step
      depends on x, and the law is wrong.

    Args:
        steps_per_level: K.
        delta: eta at l_1, in units of (x / alpha)^2. NCSN: 1e-5 (half its a = 2e-5); NCSNv2: 6.2e-6; both for
            l_1 = 0.01. Too small a one for the grid keeps the noise of its widest levels, see `settled_variance`.
        snr: in (0, 1). Score SDE uses 0.16; r is about 2 snr^2.
        denoise: end with Tweedie's step; else x / alpha of the last level is returned with its noise.
    """

    stochastic: ClassVar[bool] = True
    steps_per_level: int = 5
    delta: float | None = None
    snr: float | None = None
    denoise: bool = True

    def __post_init__(self):
        _check_count(self.steps_per_level)
        if self.delta is not None and self.snr is not None:
            raise ArgumentError(f"delta = {self.delta:g} and snr = {self.snr:g} are two rules for one step: give one")
        if self.delta is not None and not (self.delta > 0 and math.isfinite(self.delta)):
            raise ArgumentError(f"delta is {self.delta}: expected a step above 0, or None for the one that fits")
        if self.snr is not None and not 0 < self.snr < 1:
            raise ArgumentError(f"snr is {self.snr}: expected 0 < snr < 1; a step of 2 snr^2 >= 2 diverges. Try 0.16")

    @property
    def order(self) -> float:  # type: ignore[override]
        """Weak order in the number of levels."""
        return 0.5 if self.delta is None and self.snr is None else 0.0

    @property
    def evals_per_step(self) -> int:  # type: ignore[override]
        return self.steps_per_level

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """`steps` levels in equal ratios: of the path's own where it has that many, else at any time."""
        grid = make_grid(path, steps, "half-log-snr")
        table = getattr(path, "table", None)
        count = 0 if table is None else int(torch.isfinite(table).sum())
        if table is None or steps > count:
            return grid
        # Own levels nearest to those of the grid, no two alike.
        place, rank = (grid[:-1].flip(0) * len(table)).round().long() - 1, torch.arange(steps)
        place = torch.cummax(place - rank, 0).values + rank
        place = torch.minimum(place, count - steps + rank)
        grid[:-1] = (place.flip(0) + 1) / len(table)
        grid[0] = path.t_max
        return grid

    def init(self, field: Field, x: Event, t: Scalar) -> Any:
        """No level came before. Raises ArgumentError where delta is so large that every level would diverge."""
        if self.delta is not None:
            smallest = _smallest_level(field.path)
            if self.delta >= 2 * smallest**2:
                raise ArgumentError(
                    f"delta is {self.delta:g}, {self.delta / smallest**2:.3g} times the square of the path's smallest "
                    f"level {smallest:g}: from 2 on Langevin dynamics diverges at every level. Try "
                    f"{_ALONE * smallest**2:.2g}, or leave delta out"
                )
        return None

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        (alpha, sigma), (alpha_s, sigma_s) = scales(field, t), scales(field, s)
        if alpha == 0:
            on_x, on_denoised, _ = exponential_coefficients(field, t, s)
            return combine(x, on_x, field(x, t), on_denoised), None
        level, next_level = sigma / alpha, sigma_s / alpha_s
        # The first level has none before it: its noise is right, and the ratio to the next stands in.
        before = state if state is not None else level * (level / next_level) if next_level > 0 else None
        x = self._relax(field, x, t, before, noise)
        if next_level == 0 and self.denoise:
            return field(x, t) * alpha_s, level
        x = x * (alpha_s / alpha)
        if next_level > 0 and float(s) == _end(field):
            x = self._relax(field, x, s, level, noise)
        return x, level

    def _relax(self, field: Field, x: Event, t: Scalar, before: float | None, noise: Noise) -> Event:
        """K Langevin steps at time t; `before` is the level that x comes from."""
        alpha, sigma = scales(field, t)
        r = self._relative_step(field.path, sigma / alpha, before)
        for _ in range(self.steps_per_level):
            if self.snr is None:
                x = fixed_langevin(field, x, t, r, noise)
            else:
                x = snr_langevin(field, x, t, self.snr, noise)
        return x

    def _relative_step(self, path: Path, level: float, before: float | None) -> float:
        if self.delta is not None:
            return self.delta / _smallest_level(path) ** 2
        return _ALONE if before is None else settled_step(before / level, self.steps_per_level)


def _smallest_level(path: Path) -> float:
    """sigma / alpha at the path's t_low."""
    t = torch.tensor(path.t_low, dtype=torch.float64)
    return float(path.sigma(t) / path.alpha(t))


def _end(field: Field) -> float:
    """The last time of the run."""
    grid = getattr(field, "grid", None)
    return field.path.t_min if grid is None else float(grid[-1])
