"""The exact flow against the two closed forms there are: Gaussians, and one dimension."""

from __future__ import annotations

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.oracles import Empirical, Gaussian, GaussianMixture, exact_flow
from undiffuse.paths import VE, VP, Cosine, Karras, Linear, Tabulated, change_of_path

F64 = torch.float64
PATHS = [VP(), VE(), Cosine(), Linear(), Karras()]
TABLE = Tabulated.from_betas(torch.linspace(1e-3, 0.2, 50, dtype=F64))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def ring() -> GaussianMixture:
    angle = torch.arange(8, dtype=F64) * math.pi / 4
    return GaussianMixture(1.4 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.1, dtype=F64))


@pytest.mark.parametrize("path", [*PATHS, TABLE], ids=str)
def test_gaussians_keep_their_standard_score(path):
    root = numbers(6, 6, seed=1)
    law = Gaussian(numbers(2, 3, seed=2), covariance=root @ root.mT)
    x = numbers(5, 2, 3, seed=3) * path.prior_std
    exact = law.flow(path, x, path.t_max, path.t_min)
    decoded = exact_flow(law.denoiser(path), x, path.t_max, path.t_min)
    assert float((decoded - exact).norm() / exact.norm()) < 1e-9
    encoded = exact_flow(law.denoiser(path), decoded, path.t_min, path.t_max)
    assert float((encoded - x).norm() / x.norm()) < 1e-9


@pytest.mark.parametrize("path", [VP(), Linear(), Karras()], ids=str)
def test_in_one_dimension_the_flow_keeps_the_distribution_function(path):
    law = GaussianMixture(
        torch.tensor([[-1.0], [0.3], [1.1]], dtype=F64),
        torch.tensor([0.2, 0.1, 0.4], dtype=F64),
        torch.tensor([1.0, 2.0, 3.0]),
    )

    def rank(x, t):
        marginal = law.perturbed(path, t)
        z = (x - marginal.flat_means[:, 0]) / marginal.variances[:, 0].sqrt()
        return (marginal.weights * 0.5 * torch.erfc(-z / math.sqrt(2))).sum(1)

    x = path.prior_std * numbers(40, 1, seed=4)
    middle = 0.5 * path.t_max
    for s in (middle, path.t_min):
        y = exact_flow(law.denoiser(path), x, path.t_max, s)
        assert torch.allclose(rank(y, s), rank(x, path.t_max), atol=1e-10)


def test_all_paths_share_one_flow():
    # Prop. 6.3.3: x_t on the target is scale * x_tau on the source.
    law, source, target = ring(), Linear(), VP()
    start, end = torch.tensor(0.9, dtype=F64), torch.tensor(0.05, dtype=F64)
    (tau_start, scale_start), (tau_end, scale_end) = (change_of_path(source, target, t) for t in (start, end))
    x = numbers(20, 2, seed=5)
    on_target = exact_flow(law.denoiser(target), x, start, end)
    on_source = exact_flow(law.denoiser(source), x / scale_start, tau_start, tau_end)
    assert torch.allclose(on_target, scale_end * on_source, atol=1e-9)


def test_the_tolerance_is_kept():
    denoiser, x = ring().denoiser(Linear()), numbers(20, 2, seed=6)
    fine = exact_flow(denoiser, x, 1.0, 0.0, rtol=1e-12)
    for rtol in (1e-5, 1e-9):
        error = (exact_flow(denoiser, x, 1.0, 0.0, rtol=rtol) - fine).norm(dim=1).max()
        assert float(error) < 1e3 * rtol  # local error times the growth along this flow


def test_points_are_reached():
    law = Empirical(numbers(5, 3, seed=1))
    out = exact_flow(law.denoiser(Linear()), numbers(10, 3, seed=2), 1.0, 0.0, rtol=1e-8)
    assert float(torch.cdist(out, law.data).min(1).values.max()) < 1e-6


def test_bad_input_is_refused():
    denoiser, x = ring().denoiser(VP()), numbers(2, 2)
    with pytest.raises(ArgumentError, match="outside the path"):
        exact_flow(denoiser, x, 1.2, 0.0)
    with pytest.raises(ArgumentError, match="rtol"):
        exact_flow(denoiser, x, 1.0, 0.0, rtol=0.0)
