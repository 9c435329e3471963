"""Every law against quadrature, autograd and its relatives."""

from __future__ import annotations

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.oracles import Empirical, Gaussian, GaussianMixture, empirical
from undiffuse.paths import VE, VP, Cosine, Karras, Linear

F64 = torch.float64
PATHS = [VP(), VE(), Cosine(), Linear(), Karras()]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def correlated(size: int, seed: int) -> torch.Tensor:
    root = numbers(size, size, seed=seed)
    return root @ root.mT / size + 0.05 * torch.eye(size, dtype=F64)


def laws_1d() -> list:
    return [
        Gaussian(torch.tensor([0.4], dtype=F64), std=0.7),
        GaussianMixture(
            torch.tensor([[-1.0], [0.5], [2.0]], dtype=F64),
            torch.tensor([0.3, 0.2, 0.6], dtype=F64),
            weights=torch.tensor([0.2, 0.5, 0.3], dtype=F64),
        ),
        Empirical(torch.tensor([[-1.0], [0.1], [0.3], [1.6]], dtype=F64), std=0.25),
    ]


def laws_2x3() -> list:
    return [
        Gaussian(numbers(2, 3, seed=1), std=numbers(2, 3, seed=2).abs() + 0.2),
        Gaussian(numbers(2, 3, seed=1), covariance=correlated(6, seed=3)),
        GaussianMixture(numbers(4, 2, 3, seed=4), 0.3 + numbers(4, seed=5).abs(), weights=torch.tensor([1.0, 2, 3, 4])),
        GaussianMixture(numbers(4, 2, 3, seed=4), 0.3 + numbers(4, 2, 3, seed=5).abs()),
        Empirical(numbers(9, 2, 3, seed=6), std=0.4),
    ]


@pytest.mark.parametrize("law", laws_1d(), ids=lambda law: type(law).__name__)
@pytest.mark.parametrize(("path", "t"), [(VP(), 0.35), (VE(), 0.5), (Linear(), 0.3), (Cosine(), 0.6)], ids=str)
def test_means_variance_and_density_are_those_of_quadrature(law, path, t):
    x_0 = torch.linspace(-9, 9, 60_001, dtype=F64)
    prior = law.log_prob(x_0[:, None]).exp()
    time = torch.tensor(t, dtype=F64)
    alpha, sigma = path.alpha(time), path.sigma(time)
    x = torch.tensor([-1.3, -0.2, 0.4, 1.7], dtype=F64)
    noise = (x[:, None] - alpha * x_0) / sigma
    joint = prior * torch.exp(-0.5 * noise**2) / (sigma * math.sqrt(2 * math.pi))
    evidence = torch.trapezoid(joint, x_0)

    def expected(values):
        return torch.trapezoid(joint * values, x_0) / evidence

    mean = expected(x_0.expand_as(joint))
    data_hat, noise_hat = law.denoiser(path).estimate(x[:, None], time)
    assert torch.allclose(data_hat[:, 0], mean, atol=1e-10)
    assert torch.allclose(noise_hat[:, 0], expected(noise), atol=1e-10)
    variance = expected((x_0 - mean[:, None]) ** 2)
    assert torch.allclose(law.posterior_covariance(x[:, None], path, time)[:, 0, 0], variance, atol=1e-10)
    assert torch.allclose(law.perturbed(path, t).log_prob(x[:, None]), evidence.log(), atol=1e-10)
    assert float(torch.trapezoid(prior, x_0)) == pytest.approx(1, abs=1e-10)
    assert float(torch.trapezoid(prior * x_0, x_0)) == pytest.approx(float(law.mean), abs=1e-10)
    second = float(torch.trapezoid(prior * (x_0 - law.mean) ** 2, x_0))
    assert second == pytest.approx(float(law.covariance), abs=1e-10)


@pytest.mark.parametrize("law", laws_2x3(), ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_score_and_posterior_covariance_are_derivatives_of_the_log_density(law, path):
    t = torch.tensor(0.4 * path.t_max if path.t_max == 1 else 0.9, dtype=F64)
    marginal = law.perturbed(path, t)
    x = (1.5 * numbers(3, 2, 3, seed=8)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
    denoiser = law.denoiser(path)
    assert torch.allclose(marginal.score(x), gradient, atol=1e-9)
    assert torch.allclose(denoiser.score(x, t), gradient, atol=1e-9)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert torch.allclose(denoiser(x, t), (x + sigma**2 * gradient) / alpha, atol=1e-8)
    hessian = torch.stack(
        [
            torch.autograd.functional.hessian(lambda v: marginal.log_prob(v.reshape(1, 2, 3))[0], row.flatten())
            for row in x
        ]
    )
    tweedie = (sigma / alpha) ** 2 * (torch.eye(6, dtype=F64) + sigma**2 * hessian)
    assert torch.allclose(law.posterior_covariance(x, path, t), tweedie, atol=1e-8)


@pytest.mark.parametrize("law", laws_2x3(), ids=lambda law: type(law).__name__)
def test_draws_have_the_mean_and_covariance_of_the_closed_form(law):
    n = 100_000
    draws = law.sample(n, Streams.of(3, n)).flatten(1)
    covariance = law.covariance
    # 6 standard errors: a false alarm in fewer than 1e-6 of the runs.
    error = (draws.mean(0) - law.mean.flatten()).abs() / (covariance.diagonal() / n).sqrt()
    assert float(error.max()) < 6
    scale = (covariance.diagonal()[:, None] * covariance.diagonal()).sqrt()
    assert float(((draws.T.cov() - covariance) / scale).abs().max()) < 6 * math.sqrt(3 / n)


@pytest.mark.parametrize("law", [*laws_2x3(), Empirical(numbers(9, 2, 3, seed=6))], ids=lambda law: type(law).__name__)
def test_a_time_for_each_row_is_a_row_at_its_time(law):
    path, t = Linear(), torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    x = numbers(3, 2, 3, seed=8)
    denoiser = law.denoiser(path)
    together = (*denoiser.estimate(x, t), denoiser.score(x, t), law.posterior_covariance(x, path, t))
    for i in range(3):
        row = x[i : i + 1]
        alone = (*denoiser.estimate(row, t[i]), denoiser.score(row, t[i]), law.posterior_covariance(row, path, t[i]))
        for a, b in zip(together, alone):
            assert torch.allclose(a[i], b[0], atol=1e-12)


@pytest.mark.parametrize("law", [*laws_2x3(), Empirical(numbers(9, 2, 3, seed=6))], ids=lambda law: type(law).__name__)
def test_the_density_at_a_time_is_that_of_the_perturbed_law_and_has_a_slope_in_time(law):
    path, x, step = Linear(), numbers(3, 2, 3, seed=8), 1e-4
    t = torch.tensor([0.1, 0.5, 1.0 - 2 * step], dtype=F64).requires_grad_(True)
    values = law.log_prob_at(x, path, t)
    (slope,) = torch.autograd.grad(values.sum(), t)
    for i in range(3):
        before, at, after = (law.perturbed(path, t[i].detach() + k * step).log_prob(x[i : i + 1]) for k in (-1, 0, 1))
        assert torch.allclose(values[i], at, atol=1e-10)
        assert torch.allclose(slope[i], (after - before) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("law", laws_2x3(), ids=lambda law: type(law).__name__)
def test_both_ends_of_a_path_are_exact(law):
    path, x = Linear(), numbers(3, 2, 3, seed=8)
    data, noise = law.denoiser(path).estimate(x, 0.0)
    assert torch.allclose(data, x, atol=1e-12)
    assert torch.count_nonzero(noise) == 0
    data, noise = law.denoiser(path).estimate(x, 1.0)
    assert torch.allclose(data, law.mean.expand_as(x), atol=1e-12)
    assert torch.allclose(noise, x, atol=1e-12)


def test_one_component_is_a_gaussian_and_equal_points_are_a_mixture():
    mean, x, path = numbers(5, seed=1), numbers(4, 5, seed=2), VP()
    pairs = [
        (Gaussian(mean, std=0.6), GaussianMixture(mean[None], torch.tensor([0.6], dtype=F64))),
        (Gaussian(mean, std=0.6), Gaussian(mean, covariance=0.36 * torch.eye(5, dtype=F64))),
        (
            Empirical(numbers(7, 5, seed=3), std=0.2),
            GaussianMixture(numbers(7, 5, seed=3), torch.full((7,), 0.2, dtype=F64)),
        ),
    ]
    for a, b in pairs:
        assert torch.allclose(a.log_prob(x), b.log_prob(x), atol=1e-10)
        assert torch.allclose(a.denoiser(path)(x, 0.3), b.denoiser(path)(x, 0.3), atol=1e-12)
        covariances = (law.posterior_covariance(x, path, 0.3) for law in (a, b))
        assert torch.allclose(*covariances, atol=1e-12)
        assert torch.allclose(a.covariance, b.covariance, atol=1e-12)


def test_chunks_change_nothing(monkeypatch):
    law, x = Empirical(numbers(103, 4, seed=1), std=0.1), numbers(6, 4, seed=2)
    path, t = VP(), torch.linspace(0.02, 0.9, 6, dtype=F64)
    whole = (law.denoiser(path)(x, t), law.posterior_covariance(x, path, t), law.log_prob(x), law.covariance)
    monkeypatch.setattr(empirical, "_BUDGET", 6 * 10)  # 10 rows at a time, the last chunk of 3
    parts = (law.denoiser(path)(x, t), law.posterior_covariance(x, path, t), law.log_prob(x), law.covariance)
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("sigma", [1e-2, 1e-8, 1e-160, 0.0])
def test_points_at_vanishing_noise_are_the_nearest_one(sigma, dtype):
    data = 100 + numbers(50, 300, seed=1).to(dtype)
    law, path = Empirical(data), Karras()
    x = data[[3, 40]].double() + max(sigma, 1e-12) * numbers(2, 300, seed=2)
    denoised, noise = law.denoiser(path).estimate(x, sigma)
    assert torch.allclose(denoised, data[[3, 40]].double(), atol=1e-12)
    if sigma == 1e-2:
        assert torch.allclose(noise, numbers(2, 300, seed=2), atol=1e-9)
    if sigma != 1e-160:  # sigma^2 is 0 in float64 there, and the score infinite
        assert torch.isfinite(noise).all()


def test_answers_come_in_the_dtype_of_x():
    law, x = Gaussian(numbers(3, seed=1)), numbers(2, 3, seed=2).float()
    denoiser = law.denoiser(VP())
    assert denoiser(x, 0.4).dtype == law.log_prob(x).dtype == torch.float32
    assert torch.equal(denoiser(x, 0.5), denoiser(x.double(), 0.5).float())
    assert law.to(torch.float32).denoiser(VP())(x.double(), 0.4).dtype == F64


def test_labels_select_components():
    means = numbers(4, 2, seed=1)
    stds = torch.tensor([0.2, 0.3, 0.4, 0.5], dtype=F64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    law = GaussianMixture(means, stds, weights, labels=torch.tensor([0, 1, 0, 1]))
    parts = {
        0: GaussianMixture(means[[0, 2]], stds[[0, 2]], weights[[0, 2]]),
        1: GaussianMixture(means[[1, 3]], stds[[1, 3]], weights[[1, 3]]),
        -1: GaussianMixture(means, stds, weights),
    }
    x, cond = numbers(3, 2, seed=2), torch.tensor([1, -1, 0])
    together = law.denoiser(VP())(x, 0.3, cond)
    for row, label in enumerate(cond.tolist()):
        alone = parts[label].denoiser(VP())(x[row : row + 1], 0.3)
        assert torch.allclose(together[row : row + 1], alone, atol=1e-12)
        assert torch.allclose(law.log_prob(x, cond)[row], parts[label].log_prob(x)[row], atol=1e-12)
    drawn = law.sample(3000, Streams.of(1, 3000), cond=torch.ones(3000, dtype=torch.int64))
    assert torch.allclose(drawn.mean(0), parts[1].mean, atol=6 * 0.8 / math.sqrt(3000))
    with pytest.raises(ArgumentError, match="cond holds label 5"):
        law.denoiser(VP())(x, 0.3, torch.tensor([5, 0, 0]))
    with pytest.raises(ArgumentError, match="no labels"):
        parts[0].denoiser(VP())(x, 0.3, cond)
    with pytest.raises(ArgumentError, match="no labels"):
        Gaussian(means[0]).denoiser(VP())(x, 0.3, cond)


def test_labels_select_data():
    """Data with noise of std s are a mixture of Gaussians of that std, with the same labels."""
    data, labels = numbers(11, 2, 3, seed=4), torch.tensor([3, 0, 0, 7, 3, 3, 0, 7, 3, 0, 0])
    law = Empirical(data, std=0.3, labels=labels)
    twin = GaussianMixture(data, torch.full((11,), 0.3, dtype=F64), labels=labels)
    x, cond = numbers(6, 2, 3, seed=5), torch.tensor([7, 0, -1, 3, 0, 7])
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.2, 0.05], dtype=F64)
    for mine, theirs in (
        (law.denoiser(VP())(x, t, cond), twin.denoiser(VP())(x, t, cond)),
        (law.denoiser(VP()).noise(x, 0.4, cond), twin.denoiser(VP()).noise(x, 0.4, cond)),
        (law.log_prob(x, cond), twin.log_prob(x, cond)),
        (law.posterior_covariance(x, VP(), t, cond), twin.posterior_covariance(x, VP(), t, cond)),
        (law.perturbed(VP(), 0.4).log_prob(x, cond), twin.perturbed(VP(), 0.4).log_prob(x, cond)),
        (law.log_prob(x), twin.log_prob(x)),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    one = torch.tensor([0.3], dtype=F64)
    torch.testing.assert_close(law.denoiser(VP())(x, one, cond), twin.denoiser(VP())(x, 0.3, cond), rtol=1e-9, atol=0)
    # A point without a label is one that a row without a label sees.
    some = Empirical(data, std=0.3, labels=labels.where(labels != 7, torch.tensor(-1)))
    torch.testing.assert_close(some.log_prob(x[2:5], cond[2:5]), law.log_prob(x[2:5], cond[2:5]))
    points = Empirical(data, labels=labels)
    drawn = points.sample(4000, Streams.of(1, 4000), cond=torch.tensor([0, 7]).repeat(2000)).reshape(2000, 2, 6)
    for k, label in enumerate((0, 7)):
        rows = data[labels == label].reshape(-1, 6)
        share = (drawn[:, k, None] == rows).all(-1).double().mean(0)
        assert float(share.sum()) == 1.0
        assert torch.allclose(share, torch.full_like(share, 1 / len(rows)), atol=4 * 0.5 / math.sqrt(2000))
    with pytest.raises(ArgumentError, match=r"cond holds label 1; labels: \[0, 3, 7\], -1 for all"):
        law.log_prob(x, torch.tensor([0, 1, 0, 0, 0, 0]))
    with pytest.raises(ArgumentError, match="no labels"):
        Empirical(data).denoiser(VP())(x, t, cond)


def test_mode_weights_of_draws():
    law = laws_1d()[1]
    draws = law.sample(50_000, torch.Generator().manual_seed(0))
    share = law.responsibilities(draws).mean(0)
    assert torch.allclose(share, law.weights, atol=6 * 0.5 / math.sqrt(50_000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(torch.zeros(2), std=1.0, covariance=torch.eye(2)), "not both"),
        (lambda: Gaussian(torch.zeros(2), std=torch.ones(3)), "expected a number or shape"),
        (lambda: Gaussian(torch.zeros(2), std=-1.0), "not negative"),
        (lambda: Gaussian(torch.zeros(2), covariance=torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "positive semi-definite"),
        (lambda: Gaussian(torch.zeros(2), covariance=torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: Gaussian(torch.zeros(2), covariance=torch.eye(3)), r"expected \(2, 2\)"),
        (lambda: Gaussian(torch.zeros(2), std=0.0).log_prob(torch.zeros(1, 2)), "no density"),
        (lambda: GaussianMixture(torch.zeros(3, 2), torch.tensor([1.0, 0.0, 1.0])), "all positive"),
        (lambda: GaussianMixture(torch.zeros(3, 2), torch.ones(2)), "stds has shape"),
        (lambda: GaussianMixture(torch.zeros(2, 2), torch.ones(2), torch.tensor([-1.0, 1.0])), "weights"),
        (lambda: GaussianMixture(torch.zeros(2, 2), torch.ones(2), labels=torch.tensor([-1, 1])), "labels"),
        (lambda: Empirical(torch.zeros(0, 2)), "rows of data"),
        (lambda: Empirical(torch.zeros(1, 2), std=-1.0), "std >= 0"),
        (
            lambda: Empirical(torch.zeros(2, 2), labels=torch.tensor([0, -2])),
            "2 integers >= -1; given torch.int64, shape",
        ),
        (lambda: Empirical(torch.zeros(2, 2), labels=torch.zeros(0)), r"2 integers .* shape \(0,\)"),
        (lambda: Empirical(torch.zeros(1, 2)).log_prob(torch.zeros(1, 2)), "no density"),
        (lambda: Gaussian(torch.zeros(2)).log_prob(torch.zeros(4, 3)), "expected floats of shape"),
        (lambda: Gaussian(torch.zeros(2)).perturbed(VP(), 1.5), "outside the path"),
        (
            lambda: Gaussian(torch.zeros(2)).denoiser(VP())(torch.zeros(4, 2), torch.zeros(3)),
            r"expected \(\) or \(4,\)",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
