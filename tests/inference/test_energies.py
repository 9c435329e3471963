"""Denoising and out-of-distribution scores, on Gaussians where both are known."""

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.fields.energy import Energy, FunctionEnergy
from undiffuse.inference.energies import NearestClass, PosteriorEnergy, denoise, out_of_distribution
from undiffuse.solvers.langevin import MALA

F64 = torch.float64
MEAN, VARIANCE, SIGMA = 0.7, 1.7, 0.9


def gaussian(variance):
    """E of N(0.7, variance) in two dimensions."""
    return FunctionEnergy(lambda x: (x - MEAN).square().sum(1) / (2 * variance))


def posterior_mean(y):
    return (VARIANCE * y + SIGMA**2 * MEAN) / (VARIANCE + SIGMA**2)


def test_tweedie_on_the_energy_of_the_noisy_data():
    y = torch.randn(50, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    got = denoise(gaussian(VARIANCE + SIGMA**2), y, SIGMA)
    torch.testing.assert_close(got, posterior_mean(y), rtol=1e-12, atol=1e-12)


def test_tweedie_on_the_energy_of_the_clean_data_is_right_to_second_order():
    """The error falls as sigma^4: by 16 when sigma is halved."""
    y = torch.full((1, 2), 3.0, dtype=F64)
    error = []
    for sigma in (0.02, 0.01):
        exact = (VARIANCE * y + sigma**2 * MEAN) / (VARIANCE + sigma**2)
        error.append(float((denoise(gaussian(VARIANCE), y, sigma) - exact).norm()))
    assert error[0] / error[1] == pytest.approx(16, rel=0.01)


def test_a_chain_finds_the_posterior_mean_of_the_clean_energy():
    """8,000 chains from one y: their mean within 3.3 standard errors, and those below 1 % of the way it moves."""
    y = torch.full((8000, 2), 3.0, dtype=F64)
    rng = torch.Generator().manual_seed(1)
    got = denoise(gaussian(VARIANCE), y, SIGMA, kernel=MALA(0.3), steps=60, generator=rng)
    expected = float(posterior_mean(y)[0, 0])
    error = float(got.std()) / math.sqrt(got.numel())
    assert abs(float(got.mean()) - expected) < 3.3 * error  # false alarm 0.1 %
    assert 3.3 * error < 0.01 * (3.0 - expected)
    # The mean of many states is less spread than one of them.
    assert float(got.std()) < 0.7 * math.sqrt(VARIANCE * SIGMA**2 / (VARIANCE + SIGMA**2))


def test_the_posterior_s_score():
    y = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(3))
    precision = 1 / VARIANCE + 1 / SIGMA**2
    expected = -precision * (x - posterior_mean(y))
    torch.testing.assert_close(PosteriorEnergy(gaussian(VARIANCE), y, SIGMA).score(x), expected)
    with pytest.raises(ArgumentError, match="expected that of y"):
        PosteriorEnergy(gaussian(VARIANCE), y, SIGMA)(x[:3])


def test_scores_of_strangers():
    x = torch.randn(10, 2, dtype=F64, generator=torch.Generator().manual_seed(4))
    distance = (x - MEAN).norm(dim=1)
    torch.testing.assert_close(out_of_distribution(gaussian(VARIANCE), x, batch=3), distance**2 / (2 * VARIANCE))
    slope = out_of_distribution(gaussian(VARIANCE), x, statistic="score-norm", batch=4)
    torch.testing.assert_close(slope, distance / VARIANCE)
    assert out_of_distribution(gaussian(VARIANCE), x[:0]).shape == (0,)


class Classes(Energy):
    """E(x, k) = (x - m_k)^2 / 2 + c_k: three Gaussians whose constants say nothing."""

    def forward(self, x, cond=None):
        return (x[:, 0] - torch.tensor([-4.0, 0.0, 4.0])[cond]).square() / 2 + torch.tensor([7.0, -30.0, 0.5])[cond]


def test_the_nearest_class_is_measured_from_its_own_mean_in_its_own_spread():
    """Class k's energy is (x - m_k)^2 / 2 + c_k: at m_k +- 1, +- 2 its mean is 5/4 + c_k, its variance 3/4."""
    labels = torch.arange(3).repeat(4)
    x = torch.tensor([-4.0, 0.0, 4.0]).repeat(4) + torch.tensor([1.0, -1.0, 2.0, -2.0]).repeat_interleave(3)
    nearest = NearestClass.of(Classes(), x[:, None], labels, batch=5)
    torch.testing.assert_close(nearest.mean, torch.tensor([7.0, -30.0, 0.5]) + 1.25)
    torch.testing.assert_close(nearest.std, torch.full((3,), 0.75**0.5))
    at = torch.tensor([[-4.0], [0.0], [3.0], [9.0]])
    wanted = (torch.tensor([0.0, 0.0, 0.5, 12.5]) - 1.25) / 0.75**0.5
    torch.testing.assert_close(out_of_distribution(nearest, at), wanted)
    few = torch.tensor([0, 1, 2] * 3 + [0, 1, 3])
    for wrong, says in ((labels[:4], "expected 12 integers"), (few, "class 3 has 1 samples: 4 classes need two each")):
        with pytest.raises(ArgumentError, match=says):
            NearestClass.of(Classes(), x[:, None], wrong)
    with pytest.raises(ArgumentError, match="cond must be None"):
        nearest(at, labels[:4])


def test_a_condition_goes_with_its_row():
    class Shifted(FunctionEnergy):
        def forward(self, x, cond=None):
            return (x[:, 0] - cond).square()

    energy, cond = Shifted(lambda x: x), torch.arange(5.0)
    x = torch.arange(5.0)[:, None] + 2
    assert out_of_distribution(energy, x, batch=2, cond=cond).tolist() == [4.0] * 5


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: denoise(gaussian(1.0), torch.zeros(1, 2), 0.0), "sigma is 0"),
        (lambda: denoise(gaussian(1.0), torch.zeros(1, 2), 1.0, kernel=MALA(0.1), steps=1), "steps is 1"),
        (lambda: out_of_distribution(gaussian(1.0), torch.zeros(1, 2), statistic="enrgy"), "Did you mean 'energy'"),
        (lambda: out_of_distribution(gaussian(1.0), torch.zeros(1, 2), batch=0), "batch is 0"),
    ],
)
def test_what_is_wrong_is_named(call, says):
    with pytest.raises(ArgumentError, match=says):
        call()
