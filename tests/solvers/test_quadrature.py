"""Integrals along the ways of an adaptive solution, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from solvers.ways import ENDS, F64, RATES, ways
from undiffuse.core.errors import SamplingError
from undiffuse.solvers.adaptive import Tolerance
from undiffuse.solvers.pairs import PAIRS
from undiffuse.solvers.quadrature import integrate_along
from undiffuse.solvers.solution import Track


def even(start: float, end: float, steps: int = 6, rows: int = 4) -> Track:
    """Samples that stand still, in equal steps."""
    n, length = rows * steps, (end - start) / steps
    index = torch.arange(n)
    return Track(
        index // steps,
        start + length * (index % steps).double(),
        torch.full((n,), length, dtype=F64),
        torch.ones(n, 1, dtype=F64),
        torch.zeros(7, n, 1, dtype=F64),
        PAIRS["dopri5"],
    )


@pytest.mark.parametrize("steps", [1, 6, 7, 20])
def test_a_panel_is_six_steps_and_nine_points_integrate_polynomials_of_degree_nine(steps):
    """A tolerance that anything meets leaves each panel with its first nine points."""
    for degree in range(10):
        value, evals = integrate_along(
            lambda t, y, rows, d=degree: t**d * (rows + 1), even(0.5, 1.5, steps, 3), Tolerance(1e9), at_once=100
        )
        exact = (1.5 ** (degree + 1) - 0.5 ** (degree + 1)) / (degree + 1)
        assert torch.allclose(value, exact * torch.tensor([1.0, 2.0, 3.0], dtype=F64), rtol=1e-13, atol=0)
        assert evals.tolist() == [9 * math.ceil(steps / 6)] * 3


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("frequency", [1.0, 20.0, 80.0])
@pytest.mark.parametrize(("start", "end"), ENDS)
def test_an_integral_is_found_to_the_tolerance_at_what_it_takes(start, end, frequency, tolerance):
    """`cos(w t + shift)`, each sample with its w: few places where it is slow, doublings and cuts where it is fast."""
    w = torch.tensor([1.0, 0.7, 0.3, 0.1], dtype=F64) * frequency
    calls = []

    def integrand(t, y, rows):
        calls.append(rows)
        return torch.cos(w[rows] * t + rows)

    value, evals = integrate_along(integrand, even(start, end), Tolerance(0.0, tolerance), at_once=50)
    row = torch.arange(4)
    exact = (torch.sin(w * end + row) - torch.sin(w * start + row)) / w
    assert float((value - exact).abs().max()) < tolerance
    assert torch.equal(torch.bincount(torch.cat(calls)), evals)
    assert max(len(rows) for rows in calls) <= 50
    assert evals.tolist() == sorted(evals.tolist(), reverse=True)


def test_the_states_along_the_way_are_what_is_integrated():
    """The integral of k y is 1 - exp(-k)."""
    ran = ways(0.0, 1.0)
    value, _ = integrate_along(
        lambda t, y, rows: (RATES[rows, None] * y).mean(1), ran.track, Tolerance(1e-9), at_once=64
    )
    assert torch.allclose(value, 1 - torch.exp(-RATES), atol=1e-7)


def test_a_kink_is_closed_in_on():
    c = 0.437
    value, evals = integrate_along(lambda t, y, rows: (t - c).abs(), even(0.0, 1.0), Tolerance(0.0, 1e-7), at_once=64)
    assert float((value - 0.5 * (c**2 + (1 - c) ** 2)).abs().max()) < 1e-6
    assert 100 < int(evals.max()) < 2000


def test_a_sample_s_integral_does_not_know_who_shares_its_batch():
    def integrand(t, y, rows):
        return torch.cos(40 * t) + y[:, 0] ** 2

    together = integrate_along(integrand, ways(0.0, 1.5).track, Tolerance(1e-8, 1e-8), at_once=1000)
    for row in range(4):
        alone = integrate_along(integrand, ways(0.0, 1.5, torch.tensor([row])).track, Tolerance(1e-8, 1e-8), at_once=7)
        assert float((alone[0] - together[0][row]).abs()) < 1e-13
        assert int(alone[1]) == int(together[1][row])


def test_a_tolerance_is_relative_to_the_whole():
    """Twice the integrand with a relative tolerance takes the same places."""
    ran = ways(0.0, 1.5)
    plain = integrate_along(lambda t, y, rows: torch.sin(9 * t) + 1, ran.track, Tolerance(1e-6, 0.0), at_once=64)
    large = integrate_along(
        lambda t, y, rows: 1e3 * (torch.sin(9 * t) + 1), ran.track, Tolerance(1e-6, 0.0), at_once=64
    )
    assert torch.allclose(large[0], 1e3 * plain[0], rtol=1e-12)
    assert torch.equal(large[1], plain[1])
    strict = integrate_along(lambda t, y, rows: torch.sin(9 * t) + 1, ran.track, Tolerance(1e-14, 0.0), at_once=64)
    assert bool((strict[1] > plain[1]).all())


def test_gradients_reach_what_is_integrated():
    """d/dk of the integral of cos(k t) from 0 to 1."""
    ran, k = ways(0.0, 1.0), torch.tensor(30.0, dtype=F64, requires_grad=True)
    value, _ = integrate_along(lambda t, y, rows: torch.cos(k * t), ran.track, Tolerance(0.0, 1e-9), at_once=64)
    (slope,) = torch.autograd.grad(value[0], k)
    assert float(slope.detach()) == pytest.approx(math.cos(30) / 30 - math.sin(30) / 900, abs=1e-6)


def test_what_cannot_be_integrated_is_named():
    ran = ways(0.0, 1.0)
    with pytest.raises(SamplingError, match=r"infinite or NaN along the way of 2 of 4 samples \(first: 1\)"):
        integrate_along(
            lambda t, y, rows: torch.where((rows % 2 == 1) & (t > 0.3), torch.nan, t),
            ran.track,
            Tolerance(),
            at_once=64,
        )
    noise = torch.Generator().manual_seed(0)
    with pytest.raises(SamplingError, match="did not find the divergence's integral for 4 of 4 samples"):
        integrate_along(
            lambda t, y, rows: torch.rand(t.shape, generator=noise, dtype=F64), ran.track,
            Tolerance(0.0, 1e-9, max_steps=500), at_once=64,
        )  # fmt: skip
