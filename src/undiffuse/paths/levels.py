"""Noise levels of a discrete chain: geometric ones, and NCSNv2's choice from the data.

Levels grow with time: `sigma_1 < ... < sigma_L`, ready for `Tabulated.from_sigmas`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError

Levels = Float[Tensor, " levels"]

# Song and Ermon say "about 0.5"; the number of levels of all five data sets in their table 3 follows from this one.
OVERLAP = 0.567


def check_levels(levels: Tensor) -> Levels:
    """Levels as float64 on the CPU.

    Raises:
        ArgumentError: not one-dimensional, fewer than 2, not finite and positive, or not growing (says where).
    """
    table = torch.as_tensor(levels).detach().to("cpu", torch.float64)
    if table.ndim != 1 or len(table) < 2:
        raise ArgumentError(f"levels have shape {tuple(table.shape)}: expected one dimension, 2 levels or more")
    if not bool((torch.isfinite(table) & (table > 0)).all()):
        raise ArgumentError(f"levels run from {table.min():g} to {table.max():g}: expected finite numbers above 0")
    falls = (table[1:] <= table[:-1]).nonzero()
    if len(falls):
        i = int(falls[0])
        hint = "; they all fall: give levels.flip(0)" if len(falls) == len(table) - 1 else ""
        raise ArgumentError(
            f"levels must grow, from data to noise: level {i + 2} is {table[i + 1]:g} after {table[i]:g}{hint}"
        )
    return table


def geometric_levels(smallest: float, largest: float, n: int) -> Levels:
    """`sigma_i = smallest (largest / smallest)^((i - 1) / (n - 1))`, i = 1 ... n, float64.

    Song and Ermon 2019, section 3: all neighbours have one ratio.

    Args:
        smallest, largest: sigma_1 and sigma_L, in units of the data.
        n: number of levels.

    Raises:
        ArgumentError: n < 2, or not 0 < smallest < largest.
    """
    _check_ends(smallest, largest)
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise ArgumentError(f"n is {n!r}: expected a whole number of levels, at least 2")
    levels = torch.exp(torch.linspace(math.log(smallest), math.log(largest), n, dtype=torch.float64))
    levels[0], levels[-1] = smallest, largest
    return levels


def largest_distance(x: Float[Tensor, "n *event"], block: int = 1024) -> float:
    """Largest Euclidean distance between two rows of x: technique 1's widest level (Song and Ermon 2020).

    Pairs are taken `block x block` at a time, so memory is O(block^2 + block dim) beside x; time is O(n^2 dim).

    Raises:
        ArgumentError: fewer than 2 rows, not finite, all rows equal, or block < 1.
    """
    if x.ndim < 2 or x.shape[0] < 2 or x[0].numel() == 0:
        raise ArgumentError(f"data have shape {tuple(x.shape)}: expected (n, *event) with at least 2 rows")
    if block < 1:
        raise ArgumentError(f"block is {block}: expected at least 1 row")
    if not x.is_floating_point():
        raise ArgumentError(f"data are {x.dtype}: expected floats, scaled as the model sees them")
    parts = x.detach().flatten(1).split(block)
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ArgumentError("data hold numbers that are infinite or NaN: their distances are not defined")
    found = 0.0
    for i, one in enumerate(parts):
        wide = one.to(torch.promote_types(one.dtype, torch.float32))
        for other in parts[i:]:
            found = max(found, float(torch.cdist(wide, other.to(wide.dtype)).max()))
    if found == 0:
        raise ArgumentError(f"all {len(x)} rows of the data are equal: no distance to choose a level from")
    return found


def overlap(ratio: float, dim: int) -> float:
    """Share of `N(0, sigma^2 I)` whose radius lies within three standard deviations of the next level's.

    `Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma)` for levels in ratio gamma, from the
    radius of a Gaussian being nearly `N(sqrt(D) sigma, sigma^2 / 2)` (Song and Ermon 2020, proposition 2).
    """
    centre = math.sqrt(2 * dim) * (ratio - 1)
    return 0.5 * (math.erf((centre + 3 * ratio) / math.sqrt(2)) - math.erf((centre - 3 * ratio) / math.sqrt(2)))


def level_ratio(dim: int, wanted: float = OVERLAP) -> float:
    """Ratio gamma > 1 of neighbouring levels whose `overlap` is `wanted` (Song and Ermon 2020, technique 2).

    Raises:
        ArgumentError: `wanted` not in (0, 0.99], or dim < 5, where levels of any ratio overlap by more.
    """
    if not 0 < wanted <= 0.99:
        raise ArgumentError(f"overlap is {wanted:g}: expected a share above 0, at most 0.99")
    slope = math.sqrt(2 * dim) - 3
    if slope <= 0:
        raise ArgumentError(
            f"the overlap rule says nothing in {dim} dimensions, only in 5 or more: "
            "choose the number of levels yourself, geometric_levels(smallest, largest, n)"
        )
    # The lower edge passes 10 standard deviations at the upper end, where nothing overlaps any more.
    low, high = 0.0, math.log((math.sqrt(2 * dim) + 10) / slope)
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if overlap(math.exp(middle), dim) > wanted else (low, middle)
    return math.exp(low)


def levels_from_data(
    x: Float[Tensor, "n *event"], smallest: float = 0.01, *, wanted: float = OVERLAP, block: int = 1024
) -> Levels:
    """NCSNv2's levels (Song and Ermon 2020, techniques 1 and 2): geometric, as many as overlap enough.

    From `smallest` to the largest distance between two data, in whole steps of `level_ratio`, stretched to meet both
    ends. On CIFAR-10 (D = 3072, largest 50): 232 levels.

    Args:
        x: data, scaled as the model sees them.
        smallest: sigma_1, in units of the data: too small to be seen.
        wanted: overlap of neighbours.
        block: see `largest_distance`.

    Raises:
        ArgumentError: as `largest_distance` and `level_ratio`, or `smallest` not below the largest distance.
    """
    largest = largest_distance(x, block)
    _check_ends(smallest, largest)
    return geometric_levels(smallest, largest, count_levels(smallest, largest, x[0].numel(), wanted))


def count_levels(smallest: float, largest: float, dim: int, wanted: float = OVERLAP) -> int:
    """Levels from smallest to largest by the overlap rule: 1 + whole steps of `level_ratio`, at least 2."""
    _check_ends(smallest, largest)
    return 1 + max(1, math.floor(math.log(largest / smallest) / math.log(level_ratio(dim, wanted))))


def _check_ends(smallest: float, largest: float) -> None:
    if not (math.isfinite(largest) and 0 < smallest < largest):
        raise ArgumentError(f"levels from {smallest:g} to {largest:g}: expected 0 < smallest < largest, finite")
