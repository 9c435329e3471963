"""Encoding, decoding and what lies between, against flows that are known."""

from __future__ import annotations

import math

import pytest
import torch

import undiffuse as ud
from undiffuse.core.errors import ArgumentError

F64 = torch.float64
STD = torch.tensor([1.0, 0.5, 0.2], dtype=F64)
LAW = ud.Gaussian(torch.tensor([0.7, -0.4, 0.2], dtype=F64), std=STD)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def drawn(n: int, seed: int = 0) -> torch.Tensor:
    return LAW.sample(n, ud.Streams.of(seed, n))


def test_the_latent_of_a_gaussian_is_its_standard_score():
    """On a path that ends in pure noise of std 1, x = mean + std z."""
    x, field = drawn(5), LAW.denoiser(ud.Linear())
    z = (x - LAW.flat_mean) / STD
    assert torch.allclose(ud.encode(field, x, **TIGHT), z, atol=1e-6)
    assert torch.allclose(ud.decode(field, z, **TIGHT), x, atol=1e-6)
    # Of colder latents the data has that share of the standard deviations.
    cold = ud.decode(field, z, temperature=0.7, **TIGHT)
    assert torch.allclose(cold, LAW.flat_mean + 0.7 * STD * z, atol=1e-6)


@pytest.mark.parametrize("path", [ud.VP(), ud.VE(), ud.Cosine()], ids=["vp", "ve", "cosine"])
def test_decoding_undoes_encoding_and_agrees_with_sampling(path):
    means = torch.tensor([[-1.0, 0.2], [0.9, 0.6]], dtype=F64)
    law = ud.GaussianMixture(means, torch.tensor([0.3, 0.4], dtype=F64))
    field, x = law.denoiser(path), law.sample(7, ud.Streams.of(3, 7))
    z = ud.encode(field, x, rtol=1e-8, atol=1e-8, batch=3)
    assert float((ud.decode(field, z, rtol=1e-8, atol=1e-8, batch=2) - x).abs().max()) < 1e-5
    assert float((ud.sample(field, noise=z, solver=ud.Adaptive(rtol=1e-8, atol=1e-8)) - x).abs().max()) < 1e-5


def test_between_two_points_latents_are_mixed():
    a, b, field = drawn(4, 1), drawn(4, 2), LAW.denoiser(ud.Linear())
    weights = [0.0, 0.25, 1.0]
    mixed = ud.interpolate(field, a, b, weights, way="linear", **TIGHT)
    for w, x in zip(weights, mixed):
        assert torch.allclose(x, (1 - w) * a + w * b, atol=1e-6)  # the flow of a Gaussian is affine
    z_a, z_b = (ud.encode(field, x, **TIGHT) for x in (a, b))
    z = ud.encode(field, ud.interpolate(field, a, b, [0.25], **TIGHT)[0], **TIGHT)
    for one, two, got in zip(z_a, z_b, z):
        # Shoemake's point, from the plane of the two: a quarter of the angle along.
        phi = math.acos(float(one @ two / (one.norm() * two.norm())))
        side = (two / two.norm() - math.cos(phi) * one / one.norm()) / math.sin(phi)
        unit = {"a": one / one.norm(), "side": side}
        along = float(one.norm()) * math.sin(0.75 * phi) / math.sin(phi)
        across = float(two.norm()) * math.sin(0.25 * phi) / math.sin(phi)
        wanted = along * unit["a"] + across * (math.cos(phi) * unit["a"] + math.sin(phi) * unit["side"])
        assert torch.allclose(got, wanted, atol=1e-5)
    same = ud.interpolate(field, a, a, [0.5], **TIGHT)[0]
    assert torch.allclose(same, a, atol=1e-6)


def test_a_great_circle_keeps_the_length():
    field = LAW.denoiser(ud.Linear())
    z = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(5))
    z = 2 * z / z.norm(dim=1, keepdim=True)
    a, b = ud.decode(field, z[:1], **TIGHT), ud.decode(field, z[1:], **TIGHT)
    between = ud.interpolate(field, a, b, [0.1, 0.5, 0.8], **TIGHT)[:, 0]
    assert torch.allclose(ud.encode(field, between, **TIGHT).norm(dim=1), torch.full((3,), 2.0, dtype=F64), atol=1e-5)


def test_between_opposite_latents_is_the_line():
    law = ud.Gaussian(torch.zeros(1, dtype=F64), std=torch.ones(1, dtype=F64))
    a, b = torch.tensor([[1.0], [0.0]], dtype=F64), torch.tensor([[-0.5], [0.7]], dtype=F64)
    mixed = ud.interpolate(law.denoiser(ud.Linear()), a, b, [0.3], **TIGHT)[0]
    assert torch.allclose(mixed, 0.7 * a + 0.3 * b, atol=1e-6)


def test_wrong_arguments_are_explained():
    field, x = LAW.denoiser(ud.Linear()), drawn(2)
    with pytest.raises(ArgumentError, match="temperature is -1"):
        ud.decode(field, x, temperature=-1)
    with pytest.raises(ArgumentError, match="Did you mean 'linear'"):
        ud.interpolate(field, x, x, [0.5], way="linaer")
    with pytest.raises(ArgumentError, match="expected the same"):
        ud.interpolate(field, x, x[:1], [0.5])
    with pytest.raises(ArgumentError, match="at least one"):
        ud.interpolate(field, x, x, [])
    with pytest.raises(ArgumentError, match="B >= 1"):
        ud.encode(field, x[:0])
    with pytest.raises(ArgumentError, match="one row for each of 2 samples"):
        ud.encode(field, x, cond=torch.arange(5))
    with pytest.raises(ArgumentError, match="batch is 0"):
        ud.encode(field, x, batch=0)


@pytest.mark.parametrize("path", [ud.VP(), ud.Linear()], ids=["vp", "linear"])
def test_a_flow_that_starts_at_rest_from_sharp_data_is_followed_from_its_start(path):
    """Data of width 1e-3: where sigma = 0 the flow stands still; a first step of a thousandth jumps over it."""
    law = ud.Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), std=torch.full((2,), 1e-3, dtype=torch.float64))
    x = law.sample(16, ud.Streams.of(0, 16))
    end = torch.tensor(path.t_max, dtype=torch.float64)
    alpha, sigma = path.alpha(end), path.sigma(end)
    true = alpha * law.mean + (x - law.mean) * torch.hypot(alpha * 1e-3, sigma) / 1e-3
    assert float((ud.encode(law.denoiser(path), x) - true).abs().max()) < 0.01


@pytest.mark.parametrize("size", [4, 400])
def test_the_tolerance_is_that_of_all_coordinates_together(size):
    """By the closed form of a Gaussian; by their root mean square 400 are off by 16 times the tolerance."""
    law, path = ud.Gaussian(torch.zeros(size, dtype=F64), std=torch.full((size,), 0.3, dtype=F64)), ud.Linear()
    x = 0.3 * torch.randn(5, size, dtype=F64, generator=torch.Generator().manual_seed(0))
    z = ud.encode(law.denoiser(path), x, rtol=1e-4, atol=1e-4)
    assert float((z - law.flow(path, x, 0.0, 1.0)).norm(dim=1).max()) < 5e-4
    assert float((ud.decode(law.denoiser(path), z, rtol=1e-4, atol=1e-4) - x).norm(dim=1).max()) < 5e-4
