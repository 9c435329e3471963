"""Hamiltonian Monte Carlo: the leapfrog's symmetries and order, and the law it leaves invariant."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from solvers.transitions import F64, Chosen, Spread, Wavy, affine_map, cumulative, invariance_defect, slope
from undiffuse.core.errors import ArgumentError
from undiffuse.solvers.hamiltonian import HMC
from undiffuse.solvers.langevin import MALA
from undiffuse.solvers.metropolis import Point, Root, leapfrog, log_ratio

MOMENTS = {"mean": lambda x: x, "square": lambda x: x.square(), "cosine": lambda x: torch.cos(1.3 * x)}
MATRIX = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=F64)


def start(preconditioner=None, n: int = 64):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, n, 3, dtype=F64, generator=generator)
    energy, score = Wavy().energy_and_score(x)
    return x, w, Point(Root(preconditioner, x), energy, score, energy)


@pytest.mark.parametrize("preconditioner", [None, MATRIX.diagonal(), MATRIX], ids=["none", "diagonal", "matrix"])
def test_the_leapfrog_leads_back(preconditioner):
    x, w, point = start(preconditioner)
    y, v, energy, score = leapfrog(Wavy(), x, w, point, 0.2, 9)
    back, u, _, _ = leapfrog(Wavy(), y, -v, point._replace(energy=energy, score=score), 0.2, 9)
    assert torch.allclose(back, x, atol=1e-12)
    assert torch.allclose(u, -w, atol=1e-12)


def test_the_leapfrog_keeps_volume():
    energy, kernel = Spread(1.3), HMC(0.7, 4)

    def flow(v, z):
        x, w = v.chunk(2, 1)
        x, w, _, _ = leapfrog(energy, x, w, kernel.init(energy, x), 0.7, 4)
        return torch.cat([x, w], 1)

    assert float(torch.det(affine_map(flow, 2, 0)[0])) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("preconditioner", [None, MATRIX], ids=["none", "matrix"])
def test_the_energy_error_is_of_second_order(preconditioner):
    """Over a time of 1.6; any kick or move 1 % off leaves an error that no step removes."""
    x, w, point = start(preconditioner)
    counts, errors = [32, 64, 128], []
    for count in counts:
        _, v, energy, _ = leapfrog(Wavy(), x, w, point, 1.6 / count, count)
        errors.append(float(log_ratio(point.energy, w, energy, v).square().mean().sqrt()))
    assert slope([1.6 / n for n in counts], errors) == pytest.approx(2.0, abs=0.05)


def test_the_trajectory_on_a_gaussian():
    """On N(0, 1) a time of pi / 2 turns x into the momentum, to O(step^2)."""
    x, w, _ = start()
    energy = Spread(1.0, 1.0, 1.0)
    steps = 400
    kernel = HMC(math.pi / 2 / steps, steps)
    moved, state = kernel.step(energy, x, kernel.init(energy, x), Chosen(w))
    assert torch.allclose(moved, w, atol=2e-5)
    assert float(kernel.acceptance(state).detach().min()) > 0.9999


@pytest.mark.parametrize("kernel", [HMC(0.4, 3), HMC(1.1, 2), HMC(0.3, 2, preconditioner=torch.tensor([2.0]))])
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_target_is_left_invariant(kernel, moment):
    assert abs(invariance_defect(kernel, Wavy(), MOMENTS[moment])) < 2e-5


def test_one_leapfrog_step_is_mala():
    x, w, _ = start()
    ends = []
    for kernel in (HMC(0.6, 1), MALA(0.18)):
        moved, state = kernel.step(Wavy(), x, kernel.init(Wavy(), x), Chosen(w, uniform=0.7))
        ends.append((moved, kernel.acceptance(state)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_kolmogorov_smirnov():
    """100,000 independent chains from a far start; false alarm 0.001."""
    generator = torch.Generator().manual_seed(5)
    x = 3 + torch.randn(100_000, 1, generator=generator)
    run = HMC(0.5, 3).run(Wavy(), x, 20, generator=generator)
    assert stats.kstest(run.x[:, 0].double().numpy(), cumulative(Wavy())).pvalue > 1e-3
    assert run.evals == 1 + 20 * 3
    assert 0.9 < float(run.acceptance.mean()) < 1.0


def test_bad_settings_are_refused():
    for make in (lambda: HMC(0.0, 3), lambda: HMC(0.1, 0), lambda: HMC(0.1, 2.5)):
        with pytest.raises(ArgumentError, match="expected a"):
            make()
