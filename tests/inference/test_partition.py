"""Annealed importance sampling against log Z in closed form, and its weights against their own law."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import Energy, FunctionEnergy
from undiffuse.inference.annealing import Annealing, Geometric
from undiffuse.inference.partition import (
    annealed_importance_sampling,
    bracket_log_z,
    reverse_annealed_importance_sampling,
)
from undiffuse.oracles import Gaussian, GaussianMixture
from undiffuse.oracles.rbm import Bernoulli, BernoulliRBM, GaussianRBM
from undiffuse.solvers.gibbs import BlockGibbs
from undiffuse.solvers.hamiltonian import HMC
from undiffuse.solvers.langevin import MALA, Langevin
from undiffuse.solvers.markov import Kernel

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=seeded(seed))


def ring() -> GaussianMixture:
    angle = torch.arange(8, dtype=F64) * math.pi / 4
    return GaussianMixture(1.4 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.2, dtype=F64))


def shifted(law: GaussianMixture, by: float) -> Energy:
    """`-log p - by`: its log Z is `by`."""
    return FunctionEnergy(lambda x: -law.log_prob(x) - by)


def gaussian_rbm() -> GaussianRBM:
    return GaussianRBM(numbers(4, 6, seed=1), numbers(4, seed=2), numbers(6, seed=3), 0.7)


def binary_rbm() -> BernoulliRBM:
    return BernoulliRBM(numbers(12, 8, seed=1), numbers(12, seed=2), numbers(8, seed=3))


def cases() -> dict:
    """Energy, log Z, base, exact samples, kernel, temperatures, samples."""
    law, continuous, binary = ring(), gaussian_rbm(), binary_rbm()
    mixture = continuous.mixture()
    base = Gaussian(mixture.mean, covariance=mixture.covariance)
    wide = Gaussian(torch.zeros(2, dtype=F64), 1.1)
    return {
        "mixture-mala": (shifted(law, 3.7), 3.7, wide, law, MALA(0.04), 50, 2500),
        "mixture-hmc": (shifted(law, 3.7), 3.7, wide, law, HMC(0.25, 3), 40, 2500),
        "gaussian-rbm": (continuous, continuous.log_z, base, continuous, MALA(0.2), 60, 1000),
        "binary-rbm": (binary, binary.log_z, Bernoulli(binary.visible_bias.detach()), binary, BlockGibbs(), 150, 2000),
    }


@pytest.mark.parametrize("name", cases())
def test_the_bracket_holds_log_z_within_005_nats(name):
    """Standard errors are under 0.015: four of them are the criterion's 0.05 and more; false alarm 1 in 10,000."""
    energy, log_z, base, exact, kernel, temperatures, n = cases()[name]
    bracket = bracket_log_z(
        energy, base, exact.sample(n, seeded(1)), kernel=kernel, temperatures=temperatures, generator=seeded(2)
    )
    lower, upper = bracket.log_z
    for side in (bracket.lower, bracket.upper):
        assert abs(side.log_z - log_z) < 0.05
        assert abs(side.log_z - log_z) < 4 * side.standard_error
        assert 0.0005 < side.standard_error < 0.02
        assert 0.2 * n < side.ess <= n
        assert len(side.log_weights) == n
    assert lower - 3 * bracket.lower.standard_error <= log_z <= upper + 3 * bracket.upper.standard_error
    if bracket.lower.acceptance is not None:
        assert len(bracket.lower.acceptance) == temperatures - 1
        assert bool(((bracket.lower.acceptance > 0.5) & (bracket.lower.acceptance < 1)).all())


# ---------------------------------------------------------------- Gaussian to Gaussian: everything is known

MEAN, STD, SHIFT = 1.2, 0.4, 2.0  # the target exp(-(x - MEAN)^2 / (2 STD^2) + SHIFT) of a base N(0, 1)
LOG_Z = SHIFT + math.log(STD * math.sqrt(2 * math.pi))
TARGET = FunctionEnergy(lambda x: (x - MEAN).square().sum(1) / (2 * STD**2) - SHIFT)
BASE = Gaussian(torch.zeros(1, dtype=F64))


@dataclass(frozen=True)
class Fresh(Kernel):
    """An exact draw of the one-dimensional Gaussian that has the target's score."""

    exact = True

    def step(self, target, x, state, draw, cond=None):
        at_0, at_1 = target.score(torch.zeros_like(x)), target.score(torch.ones_like(x))
        variance = 1 / (at_0 - at_1)
        return at_0 * variance + variance.sqrt() * draw.normal(), state


def expected_work(betas: torch.Tensor, down: bool) -> tuple[float, float]:
    """Mean and variance of log w where every x_k is a fresh draw: sums over k of `(beta_k - beta_{k-1}) (E_0 - E)(x)`.

    x is from step k - 1 forward, k - 1 too in reverse except at k = K, where the step follows the target itself.
    """
    mean = variance = 0.0
    for k in range(1, len(betas)):
        beta = float(betas[k] if down else betas[k - 1])
        precision = (1 - beta) + beta / STD**2
        m, v = beta * MEAN / STD**2 / precision, 1 / precision
        # (E_0 - E)(x) = a x^2 + b x + c
        a, b, c = 0.5 * (1 - STD**-2), MEAN / STD**2, 0.5 * math.log(2 * math.pi) - MEAN**2 / (2 * STD**2) + SHIFT
        step = float(betas[k] - betas[k - 1])
        mean += step * (a * (m * m + v) + b * m + c)
        variance += step**2 * (2 * a * a * v * v + (2 * a * m + b) ** 2 * v)
    return mean, variance


@pytest.mark.parametrize("betas", [torch.tensor([0, 0.2, 1.0]), torch.tensor([0, 0.05, 0.15, 0.4, 0.7, 1.0])], ids=len)
def test_the_work_of_fresh_draws_is_that_of_its_closed_form(betas):
    """Mean within 4.5 standard errors, variance within 4 %, of 200,000 chains; up and down.

    Down, rung k moves at beta_k before it weighs; the last weight (k = K) is of the target's own samples.
    """
    n = 200_000
    way = Annealing(TARGET, BASE, Fresh(), betas, 1)
    up, _ = way.walk(BASE.sample(n, seeded(0)), seeded(1), down=False)
    samples = MEAN + STD * torch.randn(n, 1, dtype=F64, generator=seeded(2))
    down, _ = way.walk(samples, seeded(3), down=True)
    for log_weights, backwards in ((up, False), (down, True)):
        mean, variance = expected_work(betas.double(), backwards)
        assert abs(float(log_weights.mean()) - mean) < 4.5 * math.sqrt(variance / n)
        assert float(log_weights.var()) == pytest.approx(variance, rel=0.04)
        # what 1 % of the gap to log Z would be is seen, so this test can tell
        assert 0.01 * abs(mean - LOG_Z) > 1.5 * math.sqrt(variance / n) or len(betas) > 3


def test_exp_of_the_bound_is_unbiased_for_few_and_wrong_temperatures():
    """`E[w] = Z` and `E[1 / w] = 1 / Z` exactly: 400,000 chains of four rungs, one poor MALA step each."""
    n, betas = 400_000, torch.tensor([0, 0.1, 0.3, 0.6, 1.0])
    below = annealed_importance_sampling(TARGET, BASE, kernel=MALA(0.05), temperatures=betas, n=n, generator=seeded(0))
    assert below.standard_error < 0.003
    assert abs(below.log_z - LOG_Z) < 4 * below.standard_error
    wide = FunctionEnergy(lambda x: x.square().sum(1) / 4.5 - SHIFT)  # N(0, 1.5^2): 1 / w has a variance
    samples = 1.5 * torch.randn(n, 1, dtype=F64, generator=seeded(2))
    above = reverse_annealed_importance_sampling(
        wide, BASE, samples, kernel=MALA(0.3), temperatures=betas, generator=seeded(1)
    )
    assert above.standard_error < 0.003
    log_z = SHIFT + math.log(1.5 * math.sqrt(2 * math.pi))
    assert abs(above.log_z - log_z) < 4 * above.standard_error


def test_one_rung_is_importance_sampling_with_its_known_variance():
    """K = 1, target N(0, s^2), base N(0, 1), r = 1 / s^2: `Var[w] / E[w]^2 = r / sqrt(2 r - 1) - 1`, no kernel."""
    r, n = 1.5, 400_000
    energy = FunctionEnergy(lambda x: r * x.square().sum(1) / 2)
    found = annealed_importance_sampling(energy, BASE, kernel=MALA(0.1), temperatures=1, n=n, generator=seeded(0))
    relative = r / math.sqrt(2 * r - 1) - 1
    assert found.standard_error == pytest.approx(math.sqrt(relative / n), rel=0.005)
    assert found.ess == pytest.approx(n / (1 + relative), rel=0.002)
    assert found.log_z == pytest.approx(0.5 * math.log(2 * math.pi / r), abs=4.5 * math.sqrt(relative / n))
    assert found.acceptance is None
    assert found.betas.tolist() == [0, 1]


def test_in_expectation_below_and_above():
    """Few chains, few rungs: the means of 100 brackets lie on their sides, by more than 3 standard errors."""
    lower, upper = [], []
    for seed in range(100):
        samples = MEAN + STD * torch.randn(4, 1, dtype=F64, generator=seeded(seed))
        bracket = bracket_log_z(TARGET, BASE, samples, kernel=MALA(0.05), temperatures=2, generator=seeded(1000 + seed))
        lower.append(bracket.log_z[0])
        upper.append(bracket.log_z[1])
    for values, sign in ((lower, -1), (upper, 1)):
        off = sign * (torch.tensor(values) - LOG_Z)
        assert float(off.mean()) > 3 * float(off.std()) / math.sqrt(100)


def test_the_standard_error_is_the_spread_of_repeated_estimates():
    """2000 chains, 200 times: a standard deviation of 200 numbers is known to 5 %; four of them allow 20 %."""
    found = [
        annealed_importance_sampling(TARGET, BASE, kernel=Fresh(), temperatures=3, n=2000, generator=seeded(seed))
        for seed in range(200)
    ]
    spread = float(torch.tensor([f.log_z for f in found]).std())
    claimed = sum(f.standard_error for f in found) / len(found)
    assert claimed == pytest.approx(spread, rel=0.2)


def test_the_geometric_path_is_a_weighted_mean_of_energies_and_scores():
    law, wide, x = ring(), Gaussian(torch.zeros(2, dtype=F64), 1.1), numbers(20, 2, seed=4)
    between = Geometric(shifted(law, 3.7), wide, 0.3)
    plain = Energy.energy_and_score(between, x)
    value, score = between.energy_and_score(x)
    assert torch.allclose(value, plain[0])
    assert torch.allclose(score, plain[1])
    expected = -0.3 * (law.log_prob(x) + 3.7) - 0.7 * wide.log_prob(x)
    assert torch.allclose(value, expected)


# ---------------------------------------------------------------- Gibbs


def test_block_gibbs_leaves_the_machine_invariant_and_is_reversible():
    """On all 2^4 states: 400,000 chains from the exact law; pairs (before, after) and (after, before) are as frequent.

    A frequency's standard error is at most 0.0008 and typically 0.0001; 4.5 of its own for each of 256 pairs.
    """
    n = 400_000
    machine = BernoulliRBM(numbers(4, 3, seed=1), numbers(4, seed=2), numbers(3, seed=3))
    x = machine.sample(n, seeded(0))
    y = BlockGibbs().run(machine, x, 1, generator=seeded(1)).x
    place = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64)
    pairs = torch.bincount(((x @ place) * 16 + y @ place).long(), minlength=256).reshape(16, 16).double()
    states = (torch.arange(16)[:, None] >> torch.arange(4) & 1).double()
    exact = machine.log_prob(states).exp()
    after = pairs.sum(0) / n
    assert bool(((after - exact).abs() < 4.5 * (exact * (1 - exact) / n).sqrt()).all())
    gap = (pairs - pairs.mT).abs()
    assert bool((gap <= 4.5 * (pairs + pairs.mT).sqrt() + 1).all())
    assert float(pairs.diagonal().sum()) < 0.9 * n


def test_the_machine_between_has_scaled_weights():
    machine, base = binary_rbm(), Bernoulli(numbers(12, seed=7))
    x = base.sample(50, seeded(0))
    assert torch.allclose(machine.anneal(base, 1.0)(x), machine(x))
    assert torch.allclose(machine.anneal(base, 0.0)(x), base(x) - 8 * math.log(2))
    inputs = 0.25 * (machine.hidden_bias + x @ machine.weight)
    bias = 0.75 * base.bias + 0.25 * machine.visible_bias
    expected = -x @ bias - torch.log1p(inputs.exp()).sum(1)
    assert torch.allclose(machine.anneal(base, 0.25)(x), expected)


# ---------------------------------------------------------------- streams, modes, refusals


def test_with_streams_a_chain_does_not_depend_on_its_neighbours():
    law, wide = ring(), Gaussian(torch.zeros(2, dtype=F64), 1.1)
    options = {"kernel": MALA(0.04), "temperatures": 10}
    many = annealed_importance_sampling(shifted(law, 0.0), wide, n=6, generator=Streams.of(3, 6), **options)
    few = annealed_importance_sampling(shifted(law, 0.0), wide, n=3, generator=Streams.of(3, 3), **options)
    torch.testing.assert_close(many.log_weights[:3], few.log_weights, rtol=1e-12, atol=1e-12)
    assert many.log_weights.unique().numel() == 6


def test_a_network_is_evaluated_in_evaluation_mode_and_without_gradients():
    class Noisy(Energy):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x, cond=None):
            return self.scale * x.square().sum(1) / 2 + (100.0 if self.training else 0.0)

    energy = Noisy().train()
    found = annealed_importance_sampling(energy, BASE, kernel=MALA(0.1), temperatures=4, n=200, generator=seeded(0))
    assert found.log_z == pytest.approx(0.5 * math.log(2 * math.pi), abs=1e-9)  # all weights equal
    assert energy.training
    assert not found.log_weights.requires_grad


def test_the_kernel_takes_all_its_steps_and_more_of_them_help():
    """The variance of log w falls with the number of steps between weighings, to that of fresh draws."""
    spread = {}
    for steps in (1, 40):
        found = annealed_importance_sampling(
            TARGET,
            BASE,
            kernel=MALA(0.1),
            temperatures=10,
            n=4000,
            steps_per_temperature=steps,
            generator=seeded(0),
        )
        spread[steps] = float(found.log_weights.var())
    fresh = expected_work(torch.arange(11) / 10, False)[1]
    assert spread[40] == pytest.approx(fresh, rel=0.12)
    assert spread[1] > 1.5 * spread[40]


def test_what_is_refused():
    energy, options = shifted(ring(), 0.0), {"kernel": MALA(0.04)}
    wide = Gaussian(torch.zeros(2, dtype=F64), 1.1)
    with pytest.raises(ArgumentError, match=r"events of shape \(4,\), the base of shape \(2,\)"):
        annealed_importance_sampling(gaussian_rbm(), wide, **options)
    with pytest.raises(ArgumentError, match="Langevin leaves no density exactly invariant"):
        annealed_importance_sampling(energy, wide, kernel=Langevin(0.01))
    for betas in ([0.0, 0.5, 0.5, 1.0], [0.1, 1.0], [0.0, 0.9], [1.0, 0.0], [0.0], [0.0, math.nan, 1.0]):
        with pytest.raises(ArgumentError, match="betas that increase from 0 to 1"):
            annealed_importance_sampling(energy, wide, temperatures=torch.tensor(betas), **options)
    with pytest.raises(ArgumentError, match="temperatures is 0"):
        annealed_importance_sampling(energy, wide, temperatures=0, **options)
    with pytest.raises(ArgumentError, match="n is 1: a standard error needs at least 2"):
        annealed_importance_sampling(energy, wide, n=1, **options)
    with pytest.raises(ArgumentError, match="1 samples: a standard error"):
        reverse_annealed_importance_sampling(energy, wide, torch.zeros(1, 2, dtype=F64), **options)
    with pytest.raises(ArgumentError, match=r"samples have shape \(5, 3\): expected \(n, 2\)"):
        reverse_annealed_importance_sampling(energy, wide, torch.zeros(5, 3, dtype=F64), **options)
    with pytest.raises(ArgumentError, match="BlockGibbs moves machines of two binary layers"):
        annealed_importance_sampling(gaussian_rbm(), gaussian_rbm().mixture(), kernel=BlockGibbs(), temperatures=2)
    with pytest.raises(ArgumentError, match=r"must be a Bernoulli of 12 units: given BernoulliRBM"):
        annealed_importance_sampling(binary_rbm(), binary_rbm(), kernel=BlockGibbs(), temperatures=2)
    with pytest.raises(ArgumentError, match=r"returned shape \(5, 2\) for x of shape \(5, 2\)"):
        reverse_annealed_importance_sampling(
            FunctionEnergy(lambda x: x), wide, numbers(5, 2), temperatures=1, **options
        )


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_weights_that_are_not_finite_are_counted_and_named(bad):
    hole = FunctionEnergy(lambda x: torch.where(x[:, 0] > 2, bad, x.square().sum(1) / 2))
    samples = numbers(10, 1).clamp(max=1.5)
    samples[[3, 7]] = 2.5
    with pytest.raises(SamplingError, match=r"2 of 10 weights are not finite at beta = 1: chains 3, 7\."):
        reverse_annealed_importance_sampling(hole, BASE, samples, kernel=MALA(0.1), temperatures=1)


def test_a_chain_that_meets_a_number_that_is_none_is_named():
    hole = FunctionEnergy(lambda x: torch.where(x[:, 0] > 2, math.nan, x.square().sum(1) / 2))
    samples = torch.full((4, 1), -3.0, dtype=F64)
    samples[1] = 1.99999
    with pytest.raises(SamplingError, match=r"1 of 4 chains met an energy that is no number at beta = 0.\d+: chains 1"):
        reverse_annealed_importance_sampling(
            hole, BASE, samples, kernel=MALA(0.02), temperatures=60, generator=seeded(0)
        )
