"""Posterior cumulants against moments of the posterior itself: components in closed form, and quadrature."""

from __future__ import annotations

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.oracles import Empirical, Gaussian, GaussianMixture
from undiffuse.oracles.cumulants import posterior_cumulants
from undiffuse.paths import VE, VP, Cosine, Karras, Linear, Path, SubVP, Trig

F64 = torch.float64
PATHS = [VP(), VE(), SubVP(), Cosine(), Linear(), Trig(), Karras()]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def middle(path: Path) -> torch.Tensor:
    return path.time_of(torch.tensor(-0.2, dtype=F64))


def from_central(mean, second, third, fourth) -> torch.Tensor:
    """The first four cumulants of a mean and three central moments."""
    return torch.stack([mean, second, third, fourth - 3 * second**2], 1)


def of_components(law: GaussianMixture, path: Path, t: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The posterior is a mixture of Gaussians, by Bayes for each component; so is `v . x_0`, with known moments."""
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    flat, along = x.flatten(1), v.expand(x.shape).flatten(1)
    centres, spread = law.flat_means, law.variances.expand(law.flat_means.shape)
    evidence = alpha**2 * spread + sigma**2
    offset = flat[:, None] - alpha * centres
    log_share = law.weights.log() - 0.5 * (offset**2 / evidence + evidence.log()).sum(2)
    share = log_share.softmax(1)
    means = ((centres + alpha * spread * offset / evidence) * along[:, None]).sum(2)
    variances = (spread * sigma**2 / evidence * along[:, None] ** 2).sum(2)
    mean = (share * means).sum(1)
    d = means - mean[:, None]
    second = (share * (d**2 + variances)).sum(1)
    third = (share * (d**3 + 3 * d * variances)).sum(1)
    fourth = (share * (d**4 + 6 * d**2 * variances + 3 * variances**2)).sum(1)
    return from_central(mean, second, third, fourth)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_mixture_s_cumulants_are_those_of_its_components(path):
    law = GaussianMixture(numbers(4, 2, 3, seed=1), 0.3 + numbers(4, seed=2).abs(), torch.tensor([1.0, 2, 3, 4]))
    t = middle(path)
    x_t = path.perturb(law.sample(5, Streams.of(1, 5)), t, numbers(5, 2, 3, seed=3))
    for v in (numbers(2, 3, seed=4), numbers(5, 2, 3, seed=5)):
        got, truth = posterior_cumulants(law, path, t, x_t, v), of_components(law, path, t, x_t, v)
        assert torch.allclose(got, truth, rtol=1e-8, atol=1e-8)
        assert truth.abs().amin() > 1e-3


@pytest.mark.parametrize(
    "law",
    [
        GaussianMixture(torch.tensor([[-1.0], [0.5], [2.0]], dtype=F64), torch.tensor([0.3, 0.2, 0.6], dtype=F64)),
        Empirical(torch.tensor([[-1.0], [0.1], [0.3], [1.6]], dtype=F64), std=0.25),
    ],
    ids=lambda law: type(law).__name__,
)
def test_cumulants_are_those_of_quadrature(law):
    path, t = VP(), torch.tensor(0.35, dtype=F64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    x_0, x = torch.linspace(-9, 9, 20_001, dtype=F64), torch.tensor([-1.3, -0.2, 0.4, 1.7], dtype=F64)
    posterior = law.log_prob(x_0[:, None]).exp() * torch.exp(-0.5 * ((x[:, None] - alpha * x_0) / sigma) ** 2)
    posterior = posterior / posterior.sum(1, keepdim=True)
    mean = posterior @ x_0
    central = [(posterior * (x_0 - mean[:, None]) ** n).sum(1) for n in (2, 3, 4)]
    got = posterior_cumulants(law, path, t, x[:, None], torch.ones(1, dtype=F64))
    assert torch.allclose(got, from_central(mean, *central), atol=1e-9)


def test_the_first_two_are_the_laws_own_and_orders_scale():
    """Mean and covariance of the oracle; `kappa_n(c v) = c^n kappa_n(v)` up to order 6."""
    law, path = GaussianMixture(numbers(3, 4, seed=6), 0.4 + numbers(3, 4, seed=7).abs()), Linear()
    x_t, v, t = 1.5 * numbers(6, 4, seed=8), numbers(4, seed=9), torch.tensor(0.55, dtype=F64)
    got = posterior_cumulants(law, path, t, x_t, v, order=6)
    assert torch.allclose(got[:, 0], law.denoiser(path)(x_t, t) @ v, atol=1e-12)
    assert torch.allclose(got[:, 1], law.posterior_covariance(x_t, path, t) @ v @ v, atol=1e-12)
    twice = posterior_cumulants(law, path, t, x_t, 2 * v, order=6)
    assert torch.allclose(twice, got * 2.0 ** torch.arange(1, 7), rtol=1e-7, atol=1e-10)


def test_two_points_have_the_cumulants_of_a_coin():
    """Data at -1 and 1: x_0 given x_t is a sign, with cumulants m, 1 - m^2, -2 m (1 - m^2), (1 - m^2)(6 m^2 - 2)."""
    path, t = Karras(), torch.tensor(0.8, dtype=F64)
    x_t = torch.tensor([[-0.9], [0.1], [0.6]], dtype=F64)
    m = torch.tanh(x_t[:, 0] / 0.64)
    rest = 1 - m**2
    truth = torch.stack([m, rest, -2 * m * rest, rest * (6 * m**2 - 2)], 1)
    law = Empirical(torch.tensor([[-1.0], [1.0]], dtype=F64))
    assert torch.allclose(posterior_cumulants(law, path, t, x_t, torch.ones(1, dtype=F64)), truth, atol=1e-11)


def test_a_gaussian_has_two():
    root = numbers(3, 3, seed=10)
    law, path, t = Gaussian(numbers(3, seed=11), covariance=root @ root.mT), VE(), torch.tensor(0.5, dtype=F64)
    x_t, v = numbers(4, 3, seed=12), numbers(3, seed=13)
    got = posterior_cumulants(law, path, t, x_t, v, order=5)
    assert torch.allclose(got[:, 1], law.posterior_covariance(x_t, path, t) @ v @ v, rtol=1e-10)
    assert torch.allclose(got[:, 2:], torch.zeros(4, 3, dtype=F64), atol=1e-12)


def test_labels_noiseless_times_and_float32():
    law = GaussianMixture(
        torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.5, 0.7], dtype=F64), labels=torch.tensor([0, 1])
    )
    path, one, x_t = Linear(), torch.ones(1, dtype=F64), torch.tensor([[0.3], [-0.4]], dtype=F64)
    t = torch.tensor(0.5, dtype=F64)
    got = posterior_cumulants(law, path, t, x_t, one, cond=torch.tensor([1, 1]))
    alone = GaussianMixture(torch.tensor([[1.0]], dtype=F64), torch.tensor([0.7], dtype=F64))
    assert torch.allclose(got, posterior_cumulants(alone, path, t, x_t, one), atol=1e-12)
    still = posterior_cumulants(law, path, 0.0, x_t, 2 * one)
    assert torch.allclose(still, torch.cat([2 * x_t, torch.zeros(2, 3, dtype=F64)], 1), atol=1e-14)
    narrow = posterior_cumulants(law, path, t, x_t.float(), one.float())
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow, posterior_cumulants(law, path, t, x_t, one).float(), rtol=1e-5, atol=1e-6)
    assert not math.isnan(float(narrow.sum()))


def test_errors():
    law, x_t = Gaussian(torch.zeros(2, dtype=F64)), numbers(3, 2)
    v = torch.ones(2, dtype=F64)
    with pytest.raises(ArgumentError, match="order is 0"):
        posterior_cumulants(law, Linear(), 0.5, x_t, v, order=0)
    with pytest.raises(ArgumentError, match="direction has shape"):
        posterior_cumulants(law, Linear(), 0.5, x_t, torch.ones(3, dtype=F64))
    with pytest.raises(ArgumentError, match="alpha = 0 at t = 1"):
        posterior_cumulants(law, Linear(), 1.0, x_t, v)
