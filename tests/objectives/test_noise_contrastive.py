"""Noise-contrastive estimation on Gaussians: its value by quadrature, its fixed point, and the log Z that it learns."""

import math

import pytest
import torch
from torch import nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import Energy
from undiffuse.objectives.noise_contrastive import NoiseContrastive
from undiffuse.oracles import Gaussian

F64 = torch.float64
MEAN, STD = 0.5, 0.8


class Parabola(Energy):
    """E = a x^2 / 2 - b x: the Gaussian of mean b / a and variance 1 / a, log Z = b^2 / (2 a) + log(2 pi / a) / 2."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (a, b))

    def forward(self, x, cond=None):
        return 0.5 * self.a * x[:, 0].square() - self.b * x[:, 0]


TRUE = (1 / STD**2, MEAN / STD**2)
LOG_Z = MEAN**2 / (2 * STD**2) + 0.5 * math.log(2 * math.pi * STD**2)


def noise(std=1.5):
    return Gaussian(torch.zeros(1, dtype=F64), std)


def data(n, seed=0):
    return MEAN + STD * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=F64)


def objective(ratio, log_z=0.0):
    return NoiseContrastive(noise(), ratio, log_z).double()


@pytest.mark.parametrize("ratio", [1, 3])
def test_expected_loss_by_quadrature(ratio):
    """E_p softplus(-G) + ratio E_q softplus(G), away from the minimum."""
    u = torch.linspace(-15, 15, 20_001, dtype=F64)
    log_p = -0.5 * ((u - MEAN) / STD) ** 2 - math.log(STD) - 0.5 * math.log(2 * math.pi)
    log_q = -0.5 * (u / 1.5) ** 2 - math.log(1.5) - 0.5 * math.log(2 * math.pi)
    odds = -(0.5 * 1.2 * u**2 - 0.3 * u) - 0.7 - log_q - math.log(ratio)
    plus = nn.functional.softplus
    expected = torch.trapezoid(log_p.exp() * plus(-odds) + ratio * log_q.exp() * plus(odds), u)
    n = 1_000_000
    loss = objective(ratio, 0.7)(Parabola(1.2, 0.3), data(n), None, torch.Generator().manual_seed(1)).detach().double()
    error = 3.3 * loss.std() / math.sqrt(n)  # false alarm 0.1 %
    assert abs(loss.mean() - expected) < error < 0.01 * expected


@pytest.mark.parametrize("ratio", [1, 3])
def test_at_the_truth_the_gradient_vanishes(ratio):
    rng, found = torch.Generator().manual_seed(2), []
    model, nce = Parabola(*TRUE), objective(ratio, LOG_Z)
    wanted = [*model.parameters(), nce.log_z]
    for k in range(100):
        found.append(torch.stack(torch.autograd.grad(nce(model, data(10_000, k), None, rng).mean(), wanted)))
    found = torch.stack(found)
    assert bool((found.mean(0).abs() < 3.3 * found.std(0) / 10).all())  # 0.3 % of all seeds fail
    # And a log Z that is 1 % off would be seen.
    off = objective(ratio, 1.01 * LOG_Z)
    slope = torch.autograd.grad(off(model, data(1_000_000), None, rng).mean(), off.log_z)[0]
    assert float(slope.abs()) > 3.3 * float(found[:, 2].std()) / 10


class Quantiles:
    """N(0, 1.5^2) by its quantiles instead of random draws: expectations without noise."""

    def sample(self, n, generator=None):
        return 1.5 * quantiles(n)

    def log_prob(self, x):
        return noise().log_prob(x)


def quantiles(n):
    """n equally likely points of N(0, 1)."""
    return torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)[:, None]


@pytest.mark.parametrize("ratio", [1, 3])
def test_learns_the_normalising_constant(ratio):
    """On quantiles, so that nothing is random: log Z and both parameters within 0.2 %, by L-BFGS."""
    x, model = MEAN + STD * quantiles(20_000), Parabola(1.0, 0.0)
    nce = NoiseContrastive(Quantiles(), ratio).double()
    wanted = [*model.parameters(), nce.log_z]
    optimizer = torch.optim.LBFGS(wanted, max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nce(model, x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(nce.log_z.detach()) == pytest.approx(LOG_Z, rel=0.002)
    assert float(model.a.detach()) == pytest.approx(TRUE[0], rel=0.002)
    assert float(model.b.detach()) == pytest.approx(TRUE[1], rel=0.002)
    assert nce.diagnostics()["log_z"] == float(nce.log_z.detach())


def test_streams_make_a_row_its_own():
    nce, model, x = objective(2), Parabola(1.0, 0.2), data(10)
    whole = nce(model, x, None, Streams.of(7, 10))
    torch.testing.assert_close(nce(model, x[4:7], None, Streams.of(7, 3, first=4)), whole[4:7])


def test_accuracy_counts_both_kinds():
    x = torch.zeros(5, 1)
    for log_z, share in ((-1e4, 0.25), (1e4, 0.75)):  # everything is called data, which one of four is; or noise
        nce = NoiseContrastive(noise(), 3, log_z)
        nce(Parabola(0.0, 0.0), x, None, torch.Generator().manual_seed(0))
        assert nce.diagnostics()["noise_accuracy"] == share


def test_ratio_must_be_positive():
    with pytest.raises(ArgumentError, match="ratio is 0"):
        NoiseContrastive(noise(), 0)
