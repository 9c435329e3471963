"""Chain diagnostics against values worked out by hand and against autoregressions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics.chains import effective_sample_size, split_r_hat

F64 = torch.float64


def autoregression(rho: float, n: int, chains: int, coordinates: int, seed: int = 0) -> torch.Tensor:
    """x' = rho x + sqrt(1 - rho^2) z, stationary N(0, 1): worth n (1 - rho) / (1 + rho) independent draws."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(chains, coordinates, dtype=F64, generator=generator)
    states = []
    for z in torch.randn(n, chains, coordinates, dtype=F64, generator=generator):
        x = rho * x + math.sqrt(1 - rho**2) * z
        states.append(x)
    return torch.stack(states)


def test_r_hat_by_hand():
    """One chain 0, 1, 2, 3, 9: halves (0, 1) and (2, 3), the 9 left out. W = 1/2, B/N = 2, var+ = 1/4 + 2."""
    value = split_r_hat(torch.tensor([0.0, 1, 2, 3, 9])[:, None], rank_normalised=False)
    assert float(value) == pytest.approx(math.sqrt(4.5), rel=1e-12)


def test_rank_normalised_r_hat_by_hand():
    """exp and a shift keep ranks: 0, 1, 2, 3 have ranks 1 ... 4, scores -b, -a, a, b; the folded values tie in pairs.

    With scores, W = (b - a)^2 / 2, B/N = (a + b)^2 / 2; the folded halves (1.5, 0.5), (0.5, 1.5) have equal means, so
    their value is sqrt(1/2) and the maximum is the first.
    """
    a, b = stats.norm.ppf((3 - 0.375) / 4.25), stats.norm.ppf((4 - 0.375) / 4.25)
    within, between = (b - a) ** 2 / 2, (a + b) ** 2 / 2
    values = torch.tensor([0.0, 1, 2, 3], dtype=F64)[:, None]
    for samples in (values, values.mul(9).exp() - 5):
        expected = math.sqrt((within / 2 + between) / within)
        assert float(split_r_hat(samples)) == pytest.approx(expected, rel=1e-9)


def test_effective_size_by_hand():
    """Halves (1, 0, 0, 1) and (0, 1, 1, 0), both of mean 1/2: W = var+ 4/3 = 1/3, var+ = 1/4.

    Autocovariances over N = 4, times 4/3: lag 1 is (-1 + 1 - 1) / 16 * 4/3 = -1/12, lag 2 is -2/16 * 4/3 = -1/6, lag 3
    is 1/16 * 4/3 = 1/12. rho_1 = 1 - (1/3 + 1/12) / (1/4) = -2/3, rho_2 = -1, rho_3 = 0: pairs 1/3 and -1, the second
    cut off, tau = -1 + 2/3 < 0, so the bound 1 / log10(8) holds: 8 log10(8).
    """
    chain = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0], dtype=F64)[:, None]
    assert float(effective_sample_size(chain, rank_normalised=False)) == pytest.approx(8 * math.log10(8), rel=1e-12)
    # Halves (0, 0, 1, 1), four of them: rho_1 = 1 - (1/3 - 1/12) / (1/4) = 0, rho_2 = 1 - (1/3 + 1/6) / (1/4) = -1.
    # One pair, of sum 1: tau = 1.
    chains = torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1], dtype=F64)[:, None].repeat(1, 2)
    assert float(effective_sample_size(chains, rank_normalised=False)) == pytest.approx(16.0, rel=1e-12)


def test_the_monotone_sequence():
    """A chain of period 6 has autocorrelations that come back: the pair sums are held down, then cut off.

    Halves (2, 1, -1, -2, -1, 1) of mean 0 twice: sums of products at lags 0 ... 5 are 12, 4, -5, -6, -1, 2.
    W = 12/5, var+ = 2, autocovariances times 6/5 are those sums over 5. rho_t = 1 - (12 - sum_t) / 10:
    1, 0.2, -0.7, ...: pairs 1.2, then negative. tau = 1.4.
    """
    chain = torch.tensor([2.0, 1, -1, -2, -1, 1] * 2, dtype=F64)[:, None]
    assert float(effective_sample_size(chain, rank_normalised=False)) == pytest.approx(12 / 1.4, rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, -0.4])
@pytest.mark.parametrize("rank_normalised", [True, False])
def test_effective_size_of_autoregressions(rho, rank_normalised):
    """Mean over 40 coordinates of 4 chains of 4,000. The spread of single values gives the standard error, below 1 %
    here; Geyer's rule adds a bias of a per cent or so (noise above 0 stays in the sum). Bound 3 %."""
    samples = autoregression(rho, 4000, 4, 40)
    size = effective_sample_size(samples, rank_normalised=rank_normalised)
    tau = samples.shape[0] * 4 / size
    assert float(tau.mean()) == pytest.approx((1 + rho) / (1 - rho), rel=0.03)
    assert float(split_r_hat(samples, rank_normalised=rank_normalised).max()) < 1.02


def test_chains_that_disagree():
    samples = autoregression(0.3, 1000, 4, 3)
    samples[:, 0, 1] += 3  # one chain elsewhere
    samples[:, 0, 2] *= 5  # one chain wider: only the folded ranks see it
    value = split_r_hat(samples)
    assert float(value[0]) < 1.01
    assert float(value[1]) > 1.2
    assert float(value[2]) > 1.1
    assert float(split_r_hat(samples, rank_normalised=False)[2]) < 1.02
    assert float(effective_sample_size(samples)[1]) < 20


def test_heavy_tails_do_not_hide_anything():
    """Cauchy values have no variance; ranks do not care: the same answer as for the normals of the same ranks."""
    normal = autoregression(0.6, 800, 3, 2)
    cauchy = torch.tan(math.pi * (torch.special.ndtr(normal) - 0.5))
    assert torch.allclose(effective_sample_size(cauchy), effective_sample_size(normal), rtol=1e-9)
    assert torch.allclose(split_r_hat(cauchy), split_r_hat(normal), rtol=1e-3)


def test_shapes_and_refusals():
    samples = torch.randn(8, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    assert split_r_hat(samples).shape == (2, 5)
    alone = effective_sample_size(samples[:, :, 1, 4])
    assert torch.equal(effective_sample_size(samples)[1, 4], alone)
    assert bool(split_r_hat(torch.ones(8, 3)).isnan())
    assert bool(effective_sample_size(torch.ones(8, 3)).isnan())
    for f in (split_r_hat, effective_sample_size):
        with pytest.raises(ArgumentError, match="n >= 4"):
            f(samples[:3])
        with pytest.raises(ArgumentError, match="diverged"):
            f(samples.log())
