"""The energy distance between two sets of points, and whether it is more than chance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import hash_key
from undiffuse.metrics.rows import Others, Points, Rows, pair, squared_distances


class EnergyTest(NamedTuple):
    """Result of `energy_test`.

    distance: between the two sets, as `energy_distance`.
    quantile: of the distances between random halves of both sets put together, at `level`.
    p_value: share of those at least as large as `distance`, itself counted.
    """

    distance: float
    quantile: float
    p_value: float


def _distances(samples: Points, reference: Others) -> tuple[Float[Tensor, "n n"], int]:
    """Distances between all rows of both sets, (n + m, n + m), and n."""
    first, second = pair(samples, reference, least=2)
    rows = Rows(torch.cat([first.x.double(), second.x.to(first.x.device).double()]), "both sets")
    block = Rows(rows.x, rows.name, centre=rows.mean()).block(slice(0, rows.n))
    return squared_distances(block, block).clamp_(min=0).sqrt_().fill_diagonal_(0.0), first.n


def _of_groups(distances: Float[Tensor, "n n"], member: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Energy distance between members (1) and others (0), for each column of `member`."""
    n = member.sum(0)
    m = len(member) - n
    to_members = distances @ member
    within = (member * to_members).sum(0)
    between = to_members.sum(0) - within
    others = distances.sum() - within - 2 * between
    return 2 * between / (n * m) - within / (n * (n - 1)) - others / (m * (m - 1))


def energy_distance(samples: Points, reference: Others) -> float:
    """`2 E|X - Y| - E|X - X'| - E|Y - Y'|`, unbiased, over all pairs (Szekely and Rizzo 2013).

    0 for equal laws only; an estimate of that is negative about half of the time. All pairs are in memory at once:
    8 (n + m)^2 bytes.

    Args:
        samples: (n, *event).
        reference: (m, *event).

    Returns:
        The distance in units of the data.

    Raises:
        ArgumentError: fewer than 2 rows, different event shapes, a value that is not finite.
    """
    distances, n = _distances(samples, reference)
    member = torch.zeros(len(distances), 1, dtype=torch.float64, device=distances.device)
    member[:n] = 1
    return float(_of_groups(distances, member))


def energy_test(
    samples: Points, reference: Others, *, level: float = 0.99, permutations: int = 500, seed: int = 0
) -> EnergyTest:
    """The energy distance and its null: the same distance between random splits of both sets put together.

    Where the laws are equal, all splits are equally likely: `distance` exceeds `quantile` with probability 1 - level.

    Args:
        samples, reference: as in `energy_distance`.
        level: of the quantile, in (0, 1).
        permutations: splits drawn.
        seed: of the splits.

    Raises:
        ArgumentError: a level outside (0, 1), fewer than 1 / (1 - level) permutations, or as `energy_distance`.
    """
    if not 0 < level < 1 or permutations * (1 - level) < 1:
        raise ArgumentError(
            f"level {level} of {permutations} permutations: expected a level in (0, 1) and at least 1 / (1 - level)"
        )
    distances, n = _distances(samples, reference)
    generator = torch.Generator().manual_seed(hash_key(seed, "energy test") >> 1)
    member = torch.zeros(len(distances), permutations + 1, dtype=torch.float64)
    member[:n, 0] = 1
    for k in range(1, permutations + 1):
        member[torch.randperm(len(distances), generator=generator)[:n], k] = 1
    values = _of_groups(distances, member.to(distances.device)).cpu()
    distance, null = float(values[0]), values[1:]
    p_value = float(((null >= distance).sum() + 1) / (permutations + 1))
    return EnergyTest(distance, float(null.quantile(level)), p_value)
