"""Divergences of section 1.1 against closed forms and quadrature. Seeds are fixed; bounds are 4 standard errors, and
those are below 1 % of the value, so that a coefficient 1 % off is seen (false-alarm rate 6e-5 per figure)."""

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics.divergences import F_DIVERGENCES, f_divergence, fisher_divergence
from undiffuse.oracles import Gaussian, GaussianMixture

N = 2_000_000


def gaussian(mean: float, std: float) -> Gaussian:
    return Gaussian(torch.tensor([mean], dtype=torch.float64), std)


def by_quadrature(p, q, kind: str) -> float:
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)[:, None]
    log_p, log_q = p.log_prob(x), q.log_prob(x)
    dense_p, dense_q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    integrand = {
        "kl": dense_p * (log_p - log_q),
        "reverse-kl": dense_q * (log_q - log_p),
        "jensen-shannon": 0.5 * (dense_p * (log_p - log_m) + dense_q * (log_q - log_m)),
        "total-variation": 0.5 * (dense_p - dense_q).abs(),
        "squared-hellinger": 0.5 * (dense_p.sqrt() - dense_q.sqrt()).square(),
    }[kind]
    return float(torch.trapezoid(integrand, x[:, 0]))


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_f_divergences_by_quadrature(kind):
    p = GaussianMixture(torch.tensor([[-1.5], [1.0]], dtype=torch.float64), torch.tensor([0.6, 1.0]))
    q = gaussian(0.7, 1.4)
    estimate = f_divergence(p, q, N, kind, torch.Generator().manual_seed(0))
    truth = by_quadrature(p, q, kind)
    assert abs(estimate.value - truth) < 4 * estimate.std_error < 0.01 * truth


def test_closed_forms():
    p, q = gaussian(0.0, 1.0), gaussian(1.5, 2.0)
    truth = math.log(2) + (1 + 1.5**2) / (2 * 4) - 0.5
    found = f_divergence(p, q, N, "kl", torch.Generator().manual_seed(1))
    assert abs(found.value - truth) < 4 * found.std_error < 0.01 * truth
    # Equal widths, means d apart: total variation 2 Phi(d / 2) - 1, squared Hellinger 1 - exp(-d^2 / 8).
    p, q, d = gaussian(0.0, 1.0), gaussian(2.0, 1.0), 2.0
    found = f_divergence(p, q, N, "total-variation", torch.Generator().manual_seed(2))
    assert abs(found.value - math.erf(d / 2 / math.sqrt(2))) < 4 * found.std_error < 0.01 * found.value
    found = f_divergence(p, q, N, "squared-hellinger", torch.Generator().manual_seed(2))
    assert abs(found.value - (1 - math.exp(-(d**2) / 8))) < 4 * found.std_error < 0.01 * found.value


def test_forward_kl_is_cross_entropy_less_entropy():
    """Lemma 1.1.1: the two differ by the entropy of the data, which no parameter of the model changes."""
    p, generator = gaussian(0.0, 1.0), torch.Generator().manual_seed(3)
    x = p.sample(N, generator)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    for q in (gaussian(0.5, 1.0), gaussian(0.0, 2.0)):
        kl = f_divergence(p, q, N, "kl", generator)
        cross = -q.log_prob(x)
        error = 4 * (kl.std_error + float(cross.std()) / N**0.5)
        assert abs(kl.value - (float(cross.mean()) - entropy)) < error


def test_disjoint_supports_are_finite_where_they_should_be():
    p, q = gaussian(-1e4, 1.0), gaussian(1e4, 1.0)
    assert f_divergence(p, q, 100, "jensen-shannon").value == pytest.approx(math.log(2), rel=1e-12)
    assert f_divergence(p, q, 100, "total-variation").value == 1.0
    assert f_divergence(p, q, 100, "squared-hellinger").value == 1.0
    assert f_divergence(p, q, 100, "kl").value == pytest.approx(2e8, rel=1e-3)


def test_fisher_divergence_of_gaussians():
    p, q = gaussian(0.0, 1.0), gaussian(1.5, 2.0)
    # scores -x and -(x - 1.5) / 4: E (0.75 x + 0.375)^2
    truth = 0.75**2 + 0.375**2
    found = fisher_divergence(p, q, p.sample(N, torch.Generator().manual_seed(4)))
    assert abs(found.value - truth) < 4 * found.std_error < 0.01 * truth
    # Not symmetric: under q, x = 1.5 + 2 z.
    found = fisher_divergence(q, p, q.sample(N, torch.Generator().manual_seed(5)))
    truth = (0.75 * 2) ** 2 + (0.75 * 1.5 + 0.375) ** 2
    assert abs(found.value - truth) < 4 * found.std_error < 0.01 * truth


def test_errors():
    p = gaussian(0.0, 1.0)
    with pytest.raises(ArgumentError, match="jensen-shannon"):
        f_divergence(p, p, 10, "jensen")
    with pytest.raises(ArgumentError, match="at least 2"):
        f_divergence(p, p, 1)
    with pytest.raises(ArgumentError, match="at least 2"):
        fisher_divergence(p, p, p.sample(1))

    class Broken:
        def sample(self, n, generator=None):
            return torch.zeros(n, 1, dtype=torch.float64)

        def log_prob(self, x):
            return torch.full((len(x),), torch.nan, dtype=torch.float64)

    with pytest.raises(ArgumentError, match="NaN at 10 of 10"):
        f_divergence(Broken(), p, 10)
