"""Langevin kernels against closed forms and noise-free stationary laws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from solvers.transitions import (
    F64,
    Chosen,
    Spread,
    Wavy,
    affine_map,
    cumulative,
    expectation,
    invariance_defect,
    slope,
    stationary_covariance,
    stationary_mean,
)
from undiffuse.core.errors import ArgumentError
from undiffuse.fields.energy import FunctionEnergy
from undiffuse.solvers.langevin import MALA, Langevin, Underdamped

STEPS = [0.02, 0.04, 0.08]
MOMENTS = {"mean": lambda x: x, "square": lambda x: x.square(), "cosine": lambda x: torch.cos(1.3 * x)}


def langevin_step(kernel: Langevin, energy):
    return lambda v, z: kernel.step(energy, v, kernel.init(energy, v), Chosen(z))[0]


def underdamped_step(kernel: Underdamped, energy):
    """(x, w) -> (x, w), both of the event's size."""

    def step(v, z):
        x, w = v.chunk(2, 1)
        x, state = kernel.step(energy, x, kernel.init(energy, x)._replace(w=w), Chosen(z))
        return torch.cat([x, state.w], 1)

    return step


@pytest.mark.parametrize("step", [0.1, 0.5, 1.5])
def test_unadjusted_variance_on_a_gaussian(step):
    """N(0, v): the variance is v / (1 - step / (2 v)), from the affine map itself."""
    variance = 1.3
    a, c = affine_map(langevin_step(Langevin(step), Spread(variance)), 1, 1)
    assert stationary_covariance(a, c).item() == pytest.approx(variance / (1 - step / (2 * variance)), rel=1e-12)


def test_unadjusted_variance_from_a_run():
    """The same closed form by simulation: 200,000 chains, standard error 0.32 %, bound 4 of them (false alarm 6e-5)."""
    step, variance, n = 0.8, 1.0, 200_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=generator)
    end = Langevin(step).run(Spread(variance), x, 20, generator=generator).x
    assert float(end.var()) == pytest.approx(variance / (1 - step / (2 * variance)), rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize("moment", ["mean", "square"])
def test_the_bias_of_the_unadjusted_sampler_is_of_first_order(moment):
    """On a density that is no Gaussian; a coefficient 1 % off leaves a bias that no step removes."""
    energy, f = Wavy(), MOMENTS[moment]
    truth = expectation(energy, f)
    errors = [stationary_mean(langevin_step(Langevin(h), energy), f, 1, 30, 60) - truth for h in STEPS]
    assert slope(STEPS, errors) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("moment", ["mean", "square"])
def test_the_bias_of_underdamped_is_of_second_order(moment):
    energy, f, steps = Wavy(0.5, 1.0), MOMENTS[moment], [0.2, 0.3, 0.45]
    truth = expectation(energy, f)
    errors = [stationary_mean(underdamped_step(Underdamped(h), energy), f, 2, 16, 28) - truth for h in steps]
    assert slope(steps, errors) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("friction", [0.3, 2.0])
def test_underdamped_on_a_gaussian(friction):
    """x has the exact variance for any stable step; kicks and moves keep volume, so det A is the decay of friction."""
    step, variance = 0.7, 1.3
    kernel = Underdamped(step, friction)
    a, c = affine_map(underdamped_step(kernel, Spread(variance)), 2, 1)
    covariance = stationary_covariance(a, c)
    assert covariance[0, 0].item() == pytest.approx(variance, rel=1e-12)
    assert float(torch.det(a)) == pytest.approx(math.exp(-friction * step), rel=1e-12)
    # The trace of a step of the harmonic oscillator of frequency 1 / sqrt(v), (1 + decay) (1 - step^2 / (2 v)).
    assert float(a.trace()) == pytest.approx(
        (1 + math.exp(-friction * step)) * (1 - step**2 / (2 * variance)), rel=1e-9
    )


@pytest.mark.parametrize("step", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("moment", MOMENTS)
def test_mala_leaves_the_target_invariant(step, scale, moment):
    preconditioner = None if scale is None else torch.tensor([scale], dtype=F64)
    kernel = MALA(step, preconditioner=preconditioner)
    assert abs(invariance_defect(kernel, Wavy(), MOMENTS[moment])) < 2e-5


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_mala_proposes_the_unadjusted_step(scale):
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 50, 3, dtype=F64, generator=generator)
    preconditioner = torch.tensor([scale, 1.0, 0.2], dtype=F64)
    proposed = [
        kernel.step(Wavy(), x, kernel.init(Wavy(), x), Chosen(z))[0]
        for kernel in (Langevin(0.1, preconditioner=preconditioner), MALA(0.1, preconditioner=preconditioner))
    ]
    assert torch.allclose(*proposed, rtol=1e-12, atol=1e-12)


def test_mala_takes_a_proposal_as_often_as_it_says():
    """Accepted exactly where the uniform number is below the stated probability."""
    generator = torch.Generator().manual_seed(2)
    x, z = torch.randn(2, 400, 1, dtype=F64, generator=generator)
    kernel = MALA(1.5)
    for uniform in (0.2, 0.6, 0.9):
        moved, state = kernel.step(Wavy(), x, kernel.init(Wavy(), x), Chosen(z, uniform=uniform))
        assert torch.equal((moved != x)[:, 0], kernel.acceptance(state) > uniform)
        energy, score = Wavy().energy_and_score(moved)
        assert torch.equal(state.energy, energy)
        assert torch.equal(state.score, score)


@pytest.mark.parametrize(
    ("kernel", "passes"),
    [(MALA(0.5), True), (Underdamped(0.2), True), (Langevin(0.5), False)],
    ids=["mala", "underdamped", "unadjusted"],
)
def test_kolmogorov_smirnov(kernel, passes):
    """100,000 independent chains from a far start; p < 0.001 is the alarm. The unadjusted sampler must raise it."""
    energy, n = Wavy(), 100_000
    generator = torch.Generator().manual_seed(3)
    x = 2 + torch.randn(n, 1, generator=generator)
    end = kernel.run(energy, x, 60, generator=generator).x[:, 0].double().numpy()
    assert (stats.kstest(end, cumulative(energy)).pvalue > 1e-3) == passes


def test_separate_noise_and_clip():
    """Short-run form: x + step s + noise z, each element of s between -clip and clip."""
    x, z = torch.tensor([[3.0, -0.5]], dtype=F64), torch.tensor([[0.4, -1.0]], dtype=F64)
    kernel = Langevin(10.0, noise=0.005, clip=0.03)
    moved, _ = kernel.step(Spread(1.0, 25.0), x, kernel.init(Spread(1.0, 25.0), x), Chosen(z))
    # Scores -3 (clipped to -0.03) and 0.5 / 25 = 0.02.
    assert torch.allclose(moved, torch.tensor([[3 - 0.3 + 0.002, -0.5 + 0.2 - 0.005]], dtype=F64), atol=1e-14)
    bounded = Langevin(10.0, noise=0.005, clip=0.03, bounds=(-0.5, 2.5))
    moved, _ = bounded.step(Spread(1.0, 25.0), x, bounded.init(Spread(1.0, 25.0), x), Chosen(z))
    assert torch.allclose(moved, torch.tensor([[2.5, -0.305]], dtype=F64), atol=1e-14)
    assert float(Langevin(0.1, noise=0.0, bounds=(0.9, 2.0)).run(Spread(1.0), torch.ones(1, 1), 3).x) == pytest.approx(
        0.9
    )
    ascent = Langevin(0.1, noise=0.0).run(Spread(1.0), torch.ones(1, 1), 3)
    assert float(ascent.x) == pytest.approx(0.9**3)


def test_calls_of_the_target():
    x, energy = torch.zeros(4, 2), FunctionEnergy(lambda x: x.square().sum(1))
    assert Langevin(0.1).run(energy, x, 10).evals == 10
    assert MALA(0.1).run(energy, x, 10).evals == 11
    assert Underdamped(0.1).run(energy, x, 10).evals == 11


@pytest.mark.parametrize(
    "make",
    [
        lambda: Langevin(0.0),
        lambda: Langevin(0.1, bounds=(1.0, 1.0)),
        lambda: Langevin(math.nan),
        lambda: Langevin(0.1, noise=-1.0),
        lambda: Langevin(0.1, clip=0.0),
        lambda: MALA(-0.1),
        lambda: Underdamped(0.1, 0.0),
        lambda: Underdamped(-1.0),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ArgumentError, match="expected a"):
        make()
