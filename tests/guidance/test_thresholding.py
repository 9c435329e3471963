"""Thresholds on E[x_0]: quantiles, noise and velocity of the bounded estimate, strongly guided samples in range."""

from __future__ import annotations

import pytest
import torch

import undiffuse as ud
from undiffuse.core.errors import ArgumentError
from undiffuse.guidance.thresholding import magnitude_quantile
from worlds import PATHS

F64 = torch.float64


class Says(ud.Denoiser):
    """Answers the same x_0 to everything; the noise follows from it."""

    def __init__(self, path, x_0):
        super().__init__(path)
        self.x_0 = x_0

    def forward(self, x_t, t, cond=None):
        return self.x_0


def ramp(scale: float) -> torch.Tensor:
    """Magnitudes of 0, 1, ..., 100 percent of `scale`, signs alternating, in no order; a second row half as large."""
    values = torch.linspace(0, scale, 101, dtype=F64) * (-1.0) ** torch.arange(101)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    return torch.stack([values[order], 0.5 * values[order]])


@pytest.mark.parametrize(("quantile", "share"), [(0.995, 0.995), (0.9, 0.9), (0.333, 0.333), (1.0, 1.0), (1e-9, 1e-9)])
def test_the_quantile_is_that_of_each_sample(quantile, share):
    # Equally spaced magnitudes: the quantile is the share of the largest.
    got = magnitude_quantile(ramp(8.0), quantile)
    assert torch.allclose(got, torch.tensor([8.0, 4.0], dtype=F64) * share, atol=1e-12)
    x = torch.randn(5, 3, 7, 11, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(magnitude_quantile(x, quantile), x.abs().flatten(1).quantile(quantile, dim=1), atol=1e-12)
    assert torch.equal(magnitude_quantile(x[:, :1, :1, :1], quantile), x[:, 0, 0, 0].abs())


def test_dynamic_thresholding_by_hand():
    """s = 0.9 x 4 = 3.6 in row 0, and the data's own limit in row 1."""
    x_0 = torch.cat([ramp(4.0)[:1], 0.1 * ramp(4.0)[1:]])
    x = torch.zeros_like(x_0)
    got = ud.DynamicThreshold(Says(ud.VP(), x_0), quantile=0.9)(x, 0.5)
    inside = x_0[0].abs() <= 3.6 + 1e-12
    assert int(inside.sum()) == 91
    assert torch.allclose(got[0, inside], x_0[0, inside] / 3.6, atol=1e-12)
    assert torch.allclose(got[0, ~inside], x_0[0, ~inside].sign(), atol=1e-12)
    assert torch.equal(got[1], x_0[1])
    # Data in [-2, 2]
    wide = ud.DynamicThreshold(Says(ud.VP(), x_0), quantile=0.9, limit=2.0)(x, 0.5)
    assert torch.allclose(wide[0], 2 * got[0], atol=1e-12)


def test_clipping_by_hand():
    x_0 = torch.tensor([[-3.0, -0.2, 0.1, 0.9]], dtype=F64)
    got = ud.Clipped(Says(ud.VP(), x_0), low=0.0, high=0.5)(torch.zeros_like(x_0), 0.5)
    assert torch.equal(got, torch.tensor([[0.0, 0.0, 0.1, 0.5]], dtype=F64))


BOUNDS = {"dynamic": lambda d: ud.DynamicThreshold(d, 0.8), "clip": lambda d: ud.Clipped(d, -0.7, 0.9)}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", PATHS)
def test_noise_score_and_velocity_are_those_of_the_new_x_0(name, bound):
    path = PATHS[name]
    law = ud.Gaussian(torch.tensor([0.0, 1.5, -2.0, 0.3], dtype=F64), std=0.8)
    generator = torch.Generator().manual_seed(2)
    t = torch.linspace(path.t_low, path.t_max, 40, dtype=F64)
    x = path.perturb(law.sample(40, generator), t, torch.randn(40, 4, dtype=F64, generator=generator))
    plain, model = law.denoiser(path), BOUNDS[bound](law.denoiser(path))
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    x_0, noise = model.estimate(x, t)
    assert torch.equal(x_0, model(x, t))
    assert (x_0 - plain(x, t)).abs().max() > 0.1
    assert float(x_0.abs().max()) <= 1 + 1e-12
    assert torch.allclose(alpha * x_0 + sigma * noise, x, rtol=1e-9, atol=1e-9)
    assert torch.allclose(model.score(x, t), -noise / sigma, rtol=1e-12)
    velocity = path.alpha_dot(t)[:, None] * x_0 + path.sigma_dot(t)[:, None] * noise
    assert torch.allclose(model.velocity(x, t), velocity, rtol=1e-12)


@pytest.mark.parametrize("bound", BOUNDS)
def test_at_sigma_0_what_is_in_range_keeps_its_noise(bound):
    law, path = ud.Gaussian(torch.zeros(3, dtype=F64), std=0.3), ud.Linear()
    x = torch.tensor([[0.1, -0.5, 0.2]], dtype=F64)
    for got, wanted in zip(BOUNDS[bound](law.denoiser(path)).estimate(x, 0.0), law.denoiser(path).estimate(x, 0.0)):
        assert torch.equal(got, wanted)


def test_the_condition_and_the_inner_t_low_pass_through():
    law = ud.GaussianMixture(
        torch.tensor([[0.2], [-0.4]], dtype=F64), torch.tensor([0.05, 0.05], dtype=F64), labels=torch.tensor([0, 1])
    )
    path, x = ud.VP(), torch.zeros(2, 1, dtype=F64)
    model, labels = ud.Clipped(law.denoiser(path)), torch.tensor([0, 1])
    assert torch.equal(model(x, 0.9, labels), law.denoiser(path)(x, 0.9, labels))
    assert model.t_low == law.denoiser(path).t_low == path.t_min


def squares() -> tuple[ud.GaussianMixture, torch.Tensor]:
    """Two classes of four pictures each, of 8 x 8 pixels in [-0.9, 0.9], and the deviation of their pixels."""
    pixels = torch.randn(8, 64, dtype=F64, generator=torch.Generator().manual_seed(5)).sign() * 0.7
    pixels += 0.2 * torch.randn(8, 64, dtype=F64, generator=torch.Generator().manual_seed(6)).clamp(-1, 1)
    return ud.GaussianMixture(pixels, torch.full((8,), 0.5, dtype=F64), labels=torch.arange(8) % 2), pixels


@pytest.mark.parametrize("path", [ud.VP(), ud.Linear()], ids=["vp", "linear"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "heun"])
def test_samples_guided_at_scale_7_5_stay_in_range(solver, path):
    law, _ = squares()
    guided = ud.ClassifierGuidance(law.denoiser(path), law.classifier(path), 7.5)
    options = {"solver": solver, "steps": 10, "cond": torch.arange(16) % 2, "seed": 3, "dtype": F64}
    free = ud.sample(guided, (16, 64), **options)
    # A law of standard deviation 0.5 in each pixel leaves [-1, 1] by itself; guidance leaves it further.
    assert float(free.abs().max()) > 1.5
    for bounded in (ud.DynamicThreshold(guided, 0.95), ud.Clipped(guided)):
        x = ud.sample(bounded, (16, 64), **options)
        assert float(x.abs().max()) <= 1 + 1e-9
        at_the_ends = float((x.abs() > 0.999).double().mean())
        # The dynamic one leaves at most its 5 % at the ends, in every sample; clipping leaves far more.
        if isinstance(bounded, ud.DynamicThreshold):
            assert at_the_ends <= 0.05 + 1 / 64
        else:
            assert at_the_ends > 0.1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: ud.DynamicThreshold(d, quantile=0.0), r"quantile is 0.0: expected a share in \(0, 1\]"),
        (lambda d: ud.DynamicThreshold(d, quantile=99.5), r"quantile is 99.5: expected a share in \(0, 1\]"),
        (lambda d: ud.DynamicThreshold(d, quantile=float("nan")), "quantile is nan"),
        (lambda d: ud.DynamicThreshold(d, limit=0.0), "limit is 0.0: expected the largest magnitude of the data, > 0"),
        (lambda d: ud.DynamicThreshold(d, limit=-1.0), "limit is -1.0"),
        (lambda d: ud.Clipped(d, low=1.0, high=1.0), "low is 1.0, high is 1.0: expected the range of the data"),
        (lambda d: ud.Clipped(d, high=float("inf")), "high is inf"),
    ],
)
def test_wrong_arguments_are_explained(make, says):
    with pytest.raises(ArgumentError, match=says):
        make(Says(ud.VP(), torch.zeros(1)))
