"""The states between the steps of an adaptive solution, against a closed form."""

from __future__ import annotations

import pytest
import torch

from solvers.ways import ENDS, F64, RATES, ways


@pytest.mark.parametrize(("start", "end"), ENDS)
def test_each_sample_s_state_is_known_at_a_place_of_its_own(start, end):
    ran = ways(start, end)
    rows = torch.tensor([2, 0, 0, 1, 3, 2, 2])
    position = start + (end - start) * torch.tensor([0.3, 0.0, 1.0, 0.77, 0.5, 0.0, 1.0], dtype=F64)
    exact = torch.exp(-RATES[rows] * (position - start))
    assert torch.allclose(ran.track.at(position, rows), exact[:, None].expand(-1, 2), atol=1e-6)
