"""Tweedie of first and second order: oracles' closed forms, a network's own Jacobian, and products alone."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser, NetworkDenoiser, tweedie
from undiffuse.fields.tweedie import (
    covariance_diagonal,
    covariance_eigenpairs,
    covariance_product,
    posterior_covariance,
    posterior_mean,
)
from undiffuse.oracles import Empirical, Gaussian, GaussianMixture
from undiffuse.paths import VE, VP, Cosine, Karras, Linear, Path, SubVP, Trig

F64 = torch.float64
PATHS = [VP(), VE(), SubVP(), Cosine(), Linear(), Trig(), Karras()]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def laws() -> list:
    root = numbers(6, 6, seed=3)
    return [
        Gaussian(numbers(2, 3, seed=1), covariance=root @ root.mT / 6 + 0.05 * torch.eye(6, dtype=F64)),
        GaussianMixture(numbers(4, 2, 3, seed=4), 0.3 + numbers(4, seed=5).abs(), weights=torch.tensor([1.0, 2, 3, 4])),
    ]


def middle(path: Path) -> torch.Tensor:
    """A time with about as much noise as signal."""
    return path.time_of(torch.tensor(-0.2, dtype=F64))


def draws(law, path: Path, n: int = 4) -> torch.Tensor:
    return path.perturb(law.sample(n, Streams.of(1, n)), middle(path), numbers(n, *law.event, seed=6))


@pytest.mark.parametrize("law", laws(), ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_form_is_the_oracles_covariance(law, path):
    t, x_t, denoiser = middle(path), draws(law, path), law.denoiser(path)
    truth = law.posterior_covariance(x_t, path, t)
    close = {"rtol": 0, "atol": 1e-10 * float(truth.abs().max())}
    assert torch.allclose(posterior_covariance(denoiser, x_t, t), truth, **close)
    diagonal = posterior_covariance(denoiser, x_t, t, form="diagonal")
    assert torch.allclose(diagonal.flatten(1), truth.diagonal(dim1=1, dim2=2), **close)
    v = numbers(4, 2, 3, seed=7)
    image = (truth @ v.flatten(1)[:, :, None]).reshape(v.shape)
    assert torch.allclose(covariance_product(denoiser, x_t, t, v), image, rtol=0, atol=10 * close["atol"])
    values, vectors = posterior_covariance(denoiser, x_t, t, form="low-rank", rank=2, generator=Streams.of(0, 4))
    assert torch.allclose(values, torch.linalg.eigvalsh(truth).flip(1)[:, :2], **close)
    flat = vectors.flatten(2)
    assert torch.allclose(truth @ flat.mT, flat.mT * values[:, None], rtol=0, atol=1e-8)
    assert torch.allclose(flat @ flat.mT, torch.eye(2, dtype=F64), atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_mean_from_a_score_is_the_oracles(path):
    law = laws()[1]
    x_t = draws(law, path)
    for t in (middle(path), middle(path) * torch.tensor([0.5, 0.9, 1.0, 0.7], dtype=F64)):
        denoiser = law.denoiser(path)
        assert torch.allclose(posterior_mean(denoiser.score(x_t, t), x_t, path, t), denoiser(x_t, t), atol=1e-10)


def test_a_time_for_each_row_is_a_row_at_its_time():
    law, path = laws()[1], Linear()
    x_t, t = draws(law, path), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=F64)
    truth = law.posterior_covariance(x_t, path, t)
    denoiser = law.denoiser(path)
    assert torch.allclose(posterior_covariance(denoiser, x_t, t), truth, atol=1e-12)
    values, _ = covariance_eigenpairs(denoiser, x_t, t, 3)
    assert torch.allclose(values, torch.linalg.eigvalsh(truth).flip(1)[:, :3], atol=1e-12)


class Net(nn.Module):
    """A small network whose Jacobian has no symmetry."""

    def __init__(self, size: int, hidden: int = 16):
        super().__init__()
        self.inner = nn.Parameter(numbers(hidden, size, seed=11) / math.sqrt(size))
        self.outer = nn.Parameter(numbers(size, hidden, seed=12) / math.sqrt(hidden))

    def forward(self, x, c_noise, cond):
        shift = 0 if cond is None else 0.3 * cond[:, None]
        hidden = torch.tanh(x.flatten(1) @ self.inner.mT + c_noise[:, None] + shift)
        return (hidden @ self.outer.mT).reshape(x.shape)


@pytest.mark.parametrize("path", [VP(), Cosine(), Karras()], ids=str)
@pytest.mark.parametrize("prediction", ["noise", "data", "v"])
def test_a_network_s_covariance_is_its_jacobian(path, prediction):
    """Against `torch.autograd.functional.jacobian`; products take J itself, the other forms its symmetric part."""
    denoiser = NetworkDenoiser(Net(8), path, prediction)
    x_t, t, cond = numbers(3, 2, 4, seed=13), middle(path), torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    rows = []
    for row, label in zip(x_t, cond):
        jacobian = torch.autograd.functional.jacobian(
            lambda y, label=label: denoiser(y.reshape(1, 2, 4), t, label[None]).flatten(), row.flatten()
        )
        rows.append(float(path.sigma(t)) ** 2 / float(path.alpha(t)) * jacobian)
    skew = torch.stack(rows)
    truth = 0.5 * (skew + skew.mT)
    assert (skew - truth).abs().max() > 0.05
    v = numbers(3, 2, 4, seed=14)
    product = covariance_product(denoiser, x_t, t, v, cond)
    assert torch.allclose(product.flatten(1), (skew @ v.flatten(1)[:, :, None])[:, :, 0], atol=1e-10)
    assert torch.allclose(posterior_covariance(denoiser, x_t, t, cond=cond), truth, atol=1e-10)
    diagonal = posterior_covariance(denoiser, x_t, t, form="diagonal", cond=cond)
    assert torch.allclose(diagonal.flatten(1), truth.diagonal(dim1=1, dim2=2), atol=1e-10)
    values, vectors = posterior_covariance(denoiser, x_t, t, form="low-rank", rank=3, cond=cond)
    assert torch.allclose(values, torch.linalg.eigvalsh(truth).flip(1)[:, :3], atol=1e-10)
    assert torch.allclose(truth @ vectors.flatten(2).mT, vectors.flatten(2).mT * values[:, None], atol=1e-8)


def test_a_product_can_be_trained_through():
    """The derivative of `v . C v` by a weight, against a central difference."""
    denoiser, t = NetworkDenoiser(Net(4), Linear(), "data"), torch.tensor(0.4, dtype=F64)
    x_t, v = numbers(2, 4, seed=15), numbers(2, 4, seed=16)
    weight = denoiser.net.inner

    def form():
        return (v * covariance_product(denoiser, x_t, t, v)).sum()

    slope = torch.autograd.grad(form(), weight)[0][3, 2]
    with torch.no_grad():
        weight[3, 2] += 1e-5
        above = form()
        weight[3, 2] -= 2e-5
        below = form()
    assert float(slope) == pytest.approx(float(above - below) / 2e-5, rel=1e-6)


class Linearised(Denoiser):
    """`D(x) = x A^T`, any A: the covariance is `sigma^2 / alpha` times A."""

    def __init__(self, matrix: torch.Tensor, path: Path):
        super().__init__(path)
        self.matrix = matrix
        self.calls = 0

    def forward(self, x_t, t, cond=None):
        self.calls += 1
        return x_t @ self.matrix.to(x_t).mT


@pytest.mark.parametrize(
    "spectrum",
    [
        torch.linspace(1, 2, 120, dtype=F64),
        torch.cat([torch.full((5,), 3.0, dtype=F64), torch.ones(115, dtype=F64)]),
        0.9 ** torch.arange(120, dtype=F64),
        torch.full((120,), 0.7, dtype=F64),
        torch.cat([torch.tensor([1.0], dtype=F64), torch.zeros(119, dtype=F64)]),
    ],
    ids=["crowded", "repeated", "decaying", "isotropic", "rank one"],
)
def test_low_rank_finds_the_top_of_any_spectrum_by_products_alone(spectrum):
    basis = torch.linalg.qr(numbers(120, 120, seed=17)).Q
    skew = numbers(120, 120, seed=18)
    path, t = Linear(), torch.tensor(0.5, dtype=F64)
    denoiser = Linearised(basis @ torch.diag(spectrum) @ basis.mT + skew - skew.mT, path)
    truth = 0.5 * spectrum.sort(descending=True).values[:4]
    values, vectors = covariance_eigenpairs(denoiser, numbers(2, 120, seed=19), t, 4, generator=Streams.of(2, 2))
    assert torch.allclose(values, truth.expand(2, 4), rtol=0, atol=1e-9)
    symmetric = 0.5 * (basis @ torch.diag(spectrum) @ basis.mT)
    assert torch.allclose(vectors @ symmetric, values[:, :, None] * vectors, rtol=0, atol=1e-8)
    assert torch.allclose(vectors @ vectors.mT, torch.eye(4, dtype=F64).expand(2, 4, 4), atol=1e-10)


def test_low_rank_keeps_no_more_than_a_few_blocks():
    """The largest tensor made on the way holds 5 r columns of D numbers for each sample, not D x D."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    size, rank = 400, 2
    std = 0.98 ** torch.arange(size, dtype=F64)
    law = Gaussian(torch.zeros(size, dtype=F64), std=std)
    x_t, t = numbers(3, size, seed=20), torch.tensor(0.5, dtype=F64)
    with Watch():
        values, _ = covariance_eigenpairs(law.denoiser(Linear()), x_t, t, rank)
    assert largest <= 3 * size * 5 * rank
    truth = (std.square() / (std.square() + 1))[:rank]
    assert torch.allclose(values, truth.expand(3, rank), atol=1e-9)


def test_a_spectrum_too_crowded_says_what_is_left(monkeypatch):
    """The residual that the warning names bounds the error of the eigenvalues."""
    monkeypatch.setattr(tweedie, "_RESTARTS", 1)
    spectrum = torch.linspace(1, 2, 120, dtype=F64)
    denoiser, t = Linearised(torch.diag(spectrum), Linear()), torch.tensor(0.5, dtype=F64)
    with pytest.warns(UserWarning, match="the residual is up to .* in 2 of 2 samples") as caught:
        values, _ = covariance_eigenpairs(denoiser, numbers(2, 120, seed=19), t, 2, generator=Streams.of(2, 2))
    named = float(re.search(r"up to (\S+) in", str(caught[0].message))[1])
    error = (values - 0.5 * spectrum.flip(0)[:2]).abs().max()
    assert 1e-4 < float(error) < 1.01 * named


def test_a_row_does_not_depend_on_who_shares_the_batch():
    law, path = laws()[1], Linear()
    x_t, t = draws(law, path), middle(path)
    together = covariance_eigenpairs(law.denoiser(path), x_t, t, 2, generator=Streams.of(5, 4))
    alone = covariance_eigenpairs(law.denoiser(path), x_t[:1], t, 2, generator=Streams.of(5, 1))
    assert torch.allclose(together[0][:1], alone[0], atol=1e-14)
    assert torch.allclose(together[1][:1], alone[1], atol=1e-12)


def test_random_signs_estimate_the_diagonal_with_the_variance_they_state():
    n, probes = 20_000, 3
    matrix = numbers(5, 5, seed=21)
    matrix = matrix + matrix.mT
    path, t = Linear(), torch.tensor(0.5, dtype=F64)
    x_t = numbers(1, 5, seed=22).expand(n, 5)
    drawn = covariance_diagonal(Linearised(matrix, path), x_t, t, probes=probes, generator=Streams.of(9, n))
    covariance = 0.5 * matrix
    variance = (covariance.square().sum(1) - covariance.diagonal().square()) / probes
    # 5 standard errors in each of 5 means, 6 % in each of 5 variances (relative error sqrt(2 / n) = 1 %, kurtosis at
    # most 3): a false alarm in fewer than 1e-5 of the seeds; the seed is fixed.
    assert bool(((drawn.mean(0) - covariance.diagonal()).abs() < 5 * (variance / n).sqrt()).all())
    assert torch.allclose(drawn.var(0), variance, rtol=0.06)
    # Of a diagonal matrix every sign vector finds the diagonal.
    alone = covariance_diagonal(Linearised(torch.diag(matrix.diagonal()), path), x_t[:2], t, probes=probes)
    assert torch.allclose(alone, covariance.diagonal().expand(2, 5), rtol=1e-13)


def test_without_noise_the_covariance_is_zero():
    """Also for a data set, whose denoiser has no derivative at sigma = 0."""
    path, x_t, t = Linear(), numbers(3, 2, seed=23), torch.zeros((), dtype=F64)
    for law in (Gaussian(torch.zeros(2, dtype=F64)), Empirical(numbers(5, 2, seed=24))):
        denoiser = law.denoiser(path)
        assert torch.equal(posterior_covariance(denoiser, x_t, t), torch.zeros(3, 2, 2, dtype=F64))
        assert torch.equal(posterior_covariance(denoiser, x_t, t, form="diagonal"), torch.zeros_like(x_t))
        assert torch.equal(covariance_product(denoiser, x_t, t, x_t), torch.zeros_like(x_t))
        values, vectors = posterior_covariance(denoiser, x_t, t, form="low-rank", rank=1)
        assert torch.equal(values, torch.zeros(3, 1, dtype=F64))
        assert torch.allclose(vectors.norm(dim=2), torch.ones(3, 1, dtype=F64))


def test_errors():
    law, x_t = Gaussian(torch.zeros(2, dtype=F64)), numbers(3, 2, seed=25)
    denoiser = law.denoiser(Linear())
    for path in (Linear(), Cosine(), Trig()):
        last = torch.tensor([0.5, 0.5, path.t_max], dtype=F64)
        for call in (
            lambda path=path, last=last: posterior_mean(x_t, x_t, path, last),
            lambda path=path, last=last: posterior_covariance(law.denoiser(path), x_t, last),
            lambda path=path, last=last: covariance_product(law.denoiser(path), x_t, last, x_t),
        ):
            with pytest.raises(ArgumentError, match=r"alpha = 0 at t = 1\b.*holds no signal"):
                call()
    with pytest.raises(ArgumentError, match="Did you mean 'diagonal'"):
        posterior_covariance(denoiser, x_t, 0.5, form="diagnal")  # type: ignore[arg-type]
    for form, rank in (("low-rank", None), ("full", 2)):
        with pytest.raises(ArgumentError, match="a rank for 'low-rank', and for it alone"):
            posterior_covariance(denoiser, x_t, 0.5, form=form, rank=rank)
    with pytest.raises(ArgumentError, match="expected 1 to 2"):
        posterior_covariance(denoiser, x_t, 0.5, form="low-rank", rank=3)
    with pytest.raises(ArgumentError, match="at least 1 random direction"):
        covariance_diagonal(denoiser, x_t, 0.5, probes=0)
    with pytest.raises(ArgumentError, match="time outside the path"):
        posterior_covariance(denoiser, x_t, 1.5)
