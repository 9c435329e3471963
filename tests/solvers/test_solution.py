"""The states between the steps of an adaptive solution, against a closed form."""

from __future__ import annotations

import pytest
import torch

from undiffuse.solvers.adaptive import Tolerance, solve
from undiffuse.solvers.pairs import PAIRS

F64 = torch.float64
RATES = torch.tensor([0.5, 1.0, 3.0, 0.0], dtype=F64)
ENDS = [(0.0, 1.5), (1.5, 0.2)]


def ways(start: float, end: float, rows: torch.Tensor | None = None, tolerance: float = 1e-9):
    """`y = exp(-k (position - start))` in two coordinates, k of each sample its own."""
    k = RATES if rows is None else RATES[rows]
    y = torch.ones(len(k), 2, dtype=F64)
    ran = solve(
        lambda t, y, rows: -k[rows, None] * y,
        y,
        start,
        end,
        PAIRS["dopri5"],
        Tolerance(tolerance, tolerance),
        keep=True,
    )
    assert ran.track is not None
    return ran


@pytest.mark.parametrize(("start", "end"), ENDS)
def test_each_sample_s_state_is_known_at_a_place_of_its_own(start, end):
    ran = ways(start, end)
    rows = torch.tensor([2, 0, 0, 1, 3, 2, 2])
    position = start + (end - start) * torch.tensor([0.3, 0.0, 1.0, 0.77, 0.5, 0.0, 1.0], dtype=F64)
    exact = torch.exp(-RATES[rows] * (position - start))
    assert torch.allclose(ran.track.at(position, rows), exact[:, None].expand(-1, 2), atol=1e-6)
