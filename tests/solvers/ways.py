"""Ways of an adaptive solution whose closed form is known."""

from __future__ import annotations

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
