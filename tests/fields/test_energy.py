"""Energies, what is made of them, and scores read off denoisers, against Gaussians and mixtures in closed form."""

import math

import pytest
import torch
from torch import nn

from undiffuse.core.errors import ArgumentError
from undiffuse.fields.denoiser import NetworkDenoiser
from undiffuse.fields.energy import (
    DenoiserAt,
    DenoisingScore,
    Energy,
    FunctionEnergy,
    HasScore,
    MarginalEnergy,
    MixtureEnergy,
    NetworkEnergy,
    ProductEnergy,
    ScoreNetwork,
    TemperedEnergy,
    log_density_ratio,
)
from undiffuse.oracles import Gaussian, GaussianMixture
from undiffuse.paths import VE, VP, Karras, Linear

F64 = torch.float64


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X = drawn(0, 7, 2, 2)


class LawEnergy(Energy):
    """`-log p` of a law, plus a constant that must not matter to a score."""

    def __init__(self, law, constant=0.0):
        super().__init__()
        self.law, self.constant = law, constant

    def forward(self, x, cond=None):
        return self.constant - self.law.log_prob(x, cond)


FIRST = Gaussian(drawn(1, 2, 2), torch.tensor([[0.5, 1.0], [1.5, 0.8]], dtype=F64))
SECOND = Gaussian(drawn(2, 2, 2), 0.7)
MIXTURE = GaussianMixture(drawn(3, 4, 2, 2), torch.tensor([0.4, 0.6, 0.8, 1.0], dtype=F64), labels=torch.arange(4) % 2)


@pytest.mark.parametrize("law", [FIRST, MIXTURE], ids=["gaussian", "mixture"])
def test_the_score_is_the_law_s(law):
    energy, score = LawEnergy(law, 3.0).energy_and_score(X)
    torch.testing.assert_close(energy, 3.0 - law.log_prob(X), rtol=1e-12, atol=0)
    torch.testing.assert_close(score, law.score(X), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(LawEnergy(law).score(X), score, rtol=1e-12, atol=1e-14)


def test_a_score_keeps_its_graph_where_gradients_are_enabled():
    """E = k |x|^2 / 2: s = -k x, so d(sum s)/dk = -sum x; nothing is kept under no_grad."""
    k = torch.tensor(1.7, dtype=F64, requires_grad=True)
    energy = FunctionEnergy(lambda x: 0.5 * k * x.flatten(1).square().sum(1))
    torch.testing.assert_close(torch.autograd.grad(energy.score(X).sum(), k)[0], -X.sum())
    with torch.no_grad():
        assert not energy.score(X).requires_grad
        torch.testing.assert_close(energy.score(X), -1.7 * X)


def test_a_product_of_gaussians_is_the_gaussian_of_summed_precisions():
    precisions = [law.variances.reshape(2, 2).reciprocal() for law in (FIRST, SECOND)]
    means = [law.flat_mean.reshape(2, 2) for law in (FIRST, SECOND)]
    total = precisions[0] + precisions[1]
    wanted = Gaussian((precisions[0] * means[0] + precisions[1] * means[1]) / total, total.rsqrt())
    product = ProductEnergy([LawEnergy(FIRST), LawEnergy(SECOND)])
    torch.testing.assert_close(product.score(X), wanted.score(X), rtol=1e-9, atol=1e-10)
    gap = product(X) + wanted.log_prob(X)
    torch.testing.assert_close(gap, gap[:1].expand(7), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.1, 1.2]])
def test_a_mixture_of_gaussians_is_the_mixture(weights):
    means, stds = MIXTURE.flat_means.reshape(4, 2, 2), MIXTURE.variances.sqrt()[:, 0]
    members = [LawEnergy(Gaussian(m, float(s))) for m, s in zip(means, stds)]
    law = GaussianMixture(means, stds, None if weights is None else torch.tensor(weights, dtype=F64))
    mixture = MixtureEnergy(members, weights)
    # The shares are kept in float32: 1e-7 of them.
    torch.testing.assert_close(mixture(X), -law.log_prob(X), rtol=0, atol=3e-7)
    torch.testing.assert_close(mixture.score(X), law.score(X), rtol=1e-6, atol=1e-6)
    far = MixtureEnergy(
        [FunctionEnergy(lambda x: x.new_full((7,), 2e4)), FunctionEnergy(lambda x: x.new_full((7,), 3e4))]
    )
    torch.testing.assert_close(far(X), X.new_full((7,), 2e4 + math.log(2)))  # exp(-E) itself underflows


def test_a_tempered_gaussian_has_the_variance_times_t():
    wanted = Gaussian(FIRST.flat_mean.reshape(2, 2), (2.5 * FIRST.variances).sqrt().reshape(2, 2))
    torch.testing.assert_close(TemperedEnergy(LawEnergy(FIRST), 2.5).score(X), wanted.score(X), rtol=1e-9, atol=1e-10)


def test_conditions_reach_every_member():
    cond = torch.tensor([0, 1, -1, 0, 1, 0, 1])
    law = LawEnergy(MIXTURE)
    wanted = MIXTURE.score(X, cond)
    assert (wanted - MIXTURE.score(X)).abs().max() > 0.1
    for energy, scale in (
        (law, 1.0),
        (ProductEnergy([law, law]), 2.0),
        (MixtureEnergy([law, law]), 1.0),
        (TemperedEnergy(law, 4.0), 0.25),
    ):
        torch.testing.assert_close(energy.score(X, cond), scale * wanted, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(energy.energy_and_score(X, cond)[0], energy(X, cond))


class Net(nn.Module):
    """A network that answers with a given function and notes what it was called with."""

    def __init__(self, function):
        super().__init__()
        self.function, self.seen = function, None
        self.k = nn.Parameter(torch.tensor(0.9, dtype=F64))

    def forward(self, x, c_noise, cond):
        self.seen = (c_noise, cond)
        return self.k * self.function(x)


@pytest.mark.parametrize("column", [False, True])
def test_an_energy_network_with_a_prior(column):
    """net = k sum x^3 / 3 and a prior of std 2: E = k sum x^3 / 3 + |x|^2 / 8, s = -k x^2 - x / 4."""
    net = Net(lambda x: (x**3 / 3).flatten(1).sum(1, keepdim=column))
    labels = torch.arange(7)
    energy, score = NetworkEnergy(net, prior_std=2.0).energy_and_score(X, labels)
    torch.testing.assert_close(energy, 0.3 * (X**3).sum((1, 2)) + X.square().sum((1, 2)) / 8)
    torch.testing.assert_close(score, -0.9 * X**2 - X / 4)
    torch.testing.assert_close(NetworkEnergy(net).score(X), -0.9 * X**2)
    NetworkEnergy(net)(X, labels)
    assert torch.equal(net.seen[0], torch.zeros(7, dtype=F64))
    assert net.seen[1] is labels


def test_a_score_network_is_called_without_noise_and_with_its_condition():
    net, labels = Net(lambda x: x**2), torch.arange(7)
    model = ScoreNetwork(net)
    torch.testing.assert_close(model.score(X, labels), 0.9 * X**2)
    torch.testing.assert_close(model(X, labels), model.score(X, labels))
    assert torch.equal(net.seen[0], torch.zeros(7, dtype=F64))
    assert net.seen[1] is labels


# ---------------------------------------------------------------- scores from denoisers


@pytest.mark.parametrize("path", [VP(), VE(), Karras(), Linear()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("law", [FIRST, MIXTURE], ids=["gaussian", "mixture"])
def test_a_denoiser_at_a_time(path, law):
    t = 0.4 * path.t_max
    fixed = DenoiserAt(law.denoiser(path), t)
    torch.testing.assert_close(fixed.score(X), law.perturbed(path, t).score(X), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fixed(X), fixed.score(X))
    time = torch.tensor(t, dtype=F64)
    alpha, sigma = path.alpha(time), path.sigma(time)
    torch.testing.assert_close(alpha * fixed.denoise(X), X + sigma**2 * fixed.score(X), rtol=1e-8, atol=1e-9)  # Tweedie


def test_a_denoiser_at_a_time_passes_conditions():
    cond = torch.tensor([0, 1, -1, 0, 1, 0, 1])
    fixed = DenoiserAt(MIXTURE.denoiser(Linear()), 0.3)
    torch.testing.assert_close(fixed.score(X, cond), MIXTURE.perturbed(Linear(), 0.3).score(X, cond))
    torch.testing.assert_close(fixed.denoise(X, cond), MIXTURE.denoiser(Linear())(X, 0.3, cond))


@pytest.mark.parametrize("sigma", [0.1, 1.3])
def test_the_score_of_an_optimal_denoiser_is_the_noisy_law_s(sigma):
    """VE with alpha = 1: the posterior mean of x + sigma eps, and the score of the law smoothed by sigma."""
    one, noise = torch.ones((), dtype=F64), torch.tensor(sigma, dtype=F64)

    def denoise(x):
        return MIXTURE.posterior_means(MIXTURE.flat(x), one, noise, None)[0].reshape(x.shape)

    model = DenoisingScore(denoise, sigma)
    torch.testing.assert_close(model.score(X), MIXTURE.scaled(one, noise).score(X), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model(X), model.score(X))


def test_the_parameters_of_what_is_wrapped_are_those_of_the_wrapper():
    net = Net(lambda x: x)
    for model in (
        ScoreNetwork(net),
        NetworkEnergy(net),
        DenoisingScore(net, 0.5),
        DenoiserAt(NetworkDenoiser(net, Linear()), 0.5),
        ProductEnergy([NetworkEnergy(net)]),
        MixtureEnergy([NetworkEnergy(net)]),
        TemperedEnergy(NetworkEnergy(net), 2.0),
    ):
        assert [p is net.k for p in model.parameters()] == [True]
        assert isinstance(model, HasScore)


# ---------------------------------------------------------------- log-density from a score


def test_the_line_integral_recovers_a_mixture_s_log_density():
    x = MIXTURE.sample(200, torch.Generator().manual_seed(4)).to(F64)
    reference = MIXTURE.mean
    wanted = MIXTURE.log_prob(x) - MIXTURE.log_prob(reference[None])
    got = log_density_ratio(MIXTURE, x, reference, points=96)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8)
    got = log_density_ratio(LawEnergy(MIXTURE, 5.0), x, reference, points=96)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_the_rule_is_exact_to_degree_2n_minus_1(points):
    """s = x^k from 0 to x: the integral is x^(k+1) / (k+1) for k <= 2n - 1, and not for k = 2n."""
    x = torch.tensor([[1.5], [-0.7]], dtype=F64)
    for k in (2 * points - 1, 2 * points):
        model = ScoreNetwork(Net(lambda y, k=k: y**k / 0.9))
        got = log_density_ratio(model, x, torch.zeros(1, dtype=F64), points=points)
        off = (got - x[:, 0] ** (k + 1) / (k + 1)).abs().max()
        assert (off < 1e-12) == (k < 2 * points)


def test_the_line_integral_passes_conditions():
    cond = torch.tensor([0, 1, -1, 0, 1, 0, 1])
    reference = torch.zeros(2, 2, dtype=F64)
    wanted = MIXTURE.log_prob(X, cond) - MIXTURE.log_prob(reference.expand(7, 2, 2), cond)
    got = log_density_ratio(MIXTURE, X, reference, points=96, cond=cond)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(7, 2), (), (1,), (7, 2, 2)])
def test_an_energy_network_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ArgumentError, match=r"expected one number per sample, \(7,\)"):
        NetworkEnergy(Net(lambda x: x.new_zeros(shape)))(X)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("prior_std", lambda: NetworkEnergy(nn.Identity(), prior_std=0.0)),
        ("temperature", lambda: TemperedEnergy(LawEnergy(FIRST), 0.0)),
        ("a product of no energies", lambda: ProductEnergy([])),
        ("a mixture of no energies", lambda: MixtureEnergy([])),
        ("expected 2 numbers > 0", lambda: MixtureEnergy([LawEnergy(FIRST)] * 2, [1.0])),
        ("expected 2 numbers > 0", lambda: MixtureEnergy([LawEnergy(FIRST)] * 2, [1.0, 0.0])),
        ("sigma", lambda: DenoisingScore(nn.Identity(), 0.0)),
        ("expected the same", lambda: ScoreNetwork(Net(lambda x: x[:, :1])).score(X)),
        ("one number per sample", lambda: FunctionEnergy(lambda x: x.flatten(1).sum(1, keepdim=True)).score(X)),
        ("reference", lambda: log_density_ratio(FIRST, X, torch.zeros(2, dtype=F64))),
        ("points", lambda: log_density_ratio(FIRST, X, torch.zeros(2, 2, dtype=F64), points=0)),
        ("time", lambda: DenoiserAt(FIRST.denoiser(Linear()), 1.5)),
    ],
)
def test_wrong_arguments_are_refused(match, call):
    with pytest.raises(ArgumentError, match=match):
        call()


def test_a_marginal_energy_sums_over_the_labels():
    """Components with two labels: with the shares of the labels, the marginal is the mixture's own density."""

    class GivenLabel(Energy):
        def forward(self, x, cond=None):
            return -MIXTURE.log_prob(x, cond)

    x, shares = drawn(5, 6, 2, 2), torch.stack([MIXTURE.weights[MIXTURE.labels == k].sum() for k in range(2)])
    marginal = MarginalEnergy(GivenLabel(), shares.log())
    torch.testing.assert_close(marginal(x), -MIXTURE.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(marginal.score(x), MIXTURE.score(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(ArgumentError, match="cond must be None"):
        marginal(x, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="one number per class"):
        MarginalEnergy(GivenLabel(), torch.zeros(2, 1))
