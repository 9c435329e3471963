"""The denoising objective against the definitions of its weights, its closed form on a Gaussian, and its minimiser."""

import math

import pytest
import torch
from torch import nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields import PREDICTIONS, NetworkDenoiser
from undiffuse.objectives import TIMES, WEIGHTS, Denoising, times, weights
from undiffuse.oracles import Empirical, Gaussian
from undiffuse.paths import VP, Karras, Linear
from worlds import PATHS

F64 = torch.float64


class Line(nn.Module):
    """A network F = k x."""

    def __init__(self, k=0.37):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=F64))

    def forward(self, x, c_noise, cond):
        return self.k * x


def error_that_the_weight_promises(name, path, t, x_0, noise, model, x_t):
    """Each weight as its paper writes it: on the noise, the score, or the data."""
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    data_error = (model(x_t, t) - x_0).square().mean(1)
    noise_error = (model.noise(x_t, t) - noise).square().mean(1)
    score_error = (model.score(x_t, t) + noise / sigma).square().sum(1)
    snr = (alpha / sigma).square()[:, 0]
    if name == "likelihood":  # g^2 = d sigma^2 / dt - 2 f sigma^2 by autograd
        u = t.clone().requires_grad_(True)
        variance_dot = torch.autograd.grad(path.sigma(u).square().sum(), u)[0]
        log_alpha = path.alpha(u).log()
        f = torch.autograd.grad(log_alpha.sum(), u)[0] if log_alpha.requires_grad else torch.zeros_like(t)
        return (variance_dot - 2 * f * sigma[:, 0] ** 2) * score_error
    return {
        "snr": noise_error,
        "min-snr": torch.minimum(snr, torch.tensor(5.0)) * data_error,
        "truncated-snr": torch.maximum(noise_error, data_error),
        "edm": (1 / 0.25 + snr) * data_error,
    }[name]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("weight", [w for w in WEIGHTS if w != "simple"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_weight_on_every_prediction(path, weight, prediction):
    low, high = path.angle(torch.tensor([path.t_low, path.t_high], dtype=F64))
    t = path.time_of_angle(low + (high - low) * torch.linspace(0.05, 0.95, 31, dtype=F64))
    x_0, noise = torch.randn(2, 31, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    model = NetworkDenoiser(Line(), path, prediction)
    got = Denoising(weight=weight).at(model, x_0, t, noise)
    wanted = error_that_the_weight_promises(weight, path, t, x_0, noise, model, path.perturb(x_0, t, noise))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_is_the_error_of_the_output(prediction):
    path = VP()
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    x_0, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    model = NetworkDenoiser(Line(0.0), path, prediction)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    beta = path.beta(t)[:, None]
    norm = (sigma**2 + 0.25 * alpha**2).sqrt()
    target = {
        "data": x_0,
        "noise": noise,
        "noise-unscaled": noise,
        "score": -noise / sigma,
        "velocity": -0.5 * beta * alpha * x_0 + 0.5 * beta * alpha**2 / sigma * noise,
        "v": alpha * noise - sigma * x_0,
        "edm": (sigma * x_0 / 0.5 - 0.5 * alpha * noise) / norm,
    }[prediction]
    got = Denoising().at(model, x_0, t, noise)
    torch.testing.assert_close(got, target.square().mean(1), rtol=1e-9, atol=1e-12)


def test_edm_weight_and_prediction_make_every_level_count_alike():
    t = Karras().time_of(torch.linspace(-4, 6, 20, dtype=F64))
    c = PREDICTIONS["edm"].coefficients(Karras(), t, 0.5)
    torch.testing.assert_close(weights.EDM(0.5).on_output(Karras(), t, c), torch.ones(20, dtype=F64))


def test_expected_loss_on_a_gaussian():
    """Data N(0, v), network F = k x_t as noise on VP: E_t (k^2 (a^2 v + s^2) - 2 k s + 1), by quadrature."""
    path, v, k, n = VP(), 0.49, 0.8, 1_000_000
    model = NetworkDenoiser(Line(k), path, "noise")
    x_0 = math.sqrt(v) * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    losses = Denoising()(model, x_0, generator=torch.Generator().manual_seed(1)).detach()
    t = torch.linspace(path.t_low, path.t_max, 4001, dtype=F64)
    a, s = path.alpha(t), path.sigma(t)
    expected = (k**2 * (a**2 * v + s**2) - 2 * k * s + 1).mean()
    assert abs(losses.mean() - expected) < 3.3 * losses.std() / math.sqrt(n)  # false alarm 0.1 %
    assert 3.3 * losses.std() / math.sqrt(n) < 0.01 * expected  # and 1 % would be seen


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_minimiser_is_the_posterior_mean(weight, prediction):
    """At one noise level the best F = k x is the regression slope, whatever the weight: least squares on a Gaussian."""
    path, v = VP(), 0.49
    t = torch.full((4,), 0.3, dtype=F64)
    # Four points whose second moments are exactly those of independent x_0 ~ (0, v) and eps ~ (0, 1).
    x_0 = math.sqrt(v) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=F64)
    noise = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=F64)
    model = NetworkDenoiser(Line(0.0), path, prediction)
    objective = Denoising(weight=weight)
    loss = objective.at(model, x_0, t, noise).mean()
    (slope,) = torch.autograd.grad(loss, model.net.k, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, model.net.k)
    with torch.no_grad():
        model.net.k.copy_(-slope / curvature)  # the loss is quadratic in k: one Newton step is the minimum
        a, s = path.alpha(t[0]), path.sigma(t[0])
        x = torch.tensor([[1.0]], dtype=F64)
        assert model(x, t[:1]).item() == pytest.approx(float(a * v / (a**2 * v + s**2)), rel=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_target_of_the_data_has_the_mean_of_the_pairs_gradients(prediction):
    """Pairs of a labelled data set: the marginal target's gradient is the mean of the conditional one's over x_0 given
    x_t. At one point x_t, sum over all data with their posterior weights, each written out."""
    path, data = VP(), torch.tensor([[-1.0], [0.2], [0.5], [2.0]], dtype=F64)
    labels = torch.tensor([0, 1, 0, 1])
    t, label = torch.full((2,), 0.4, dtype=F64), 1
    a, s = path.alpha(t[:1]), path.sigma(t[:1])
    mine = data[labels == label]
    x_t = a * 0.3 + s * 0.1
    noise = (x_t - a * mine) / s
    weight = torch.softmax(-0.5 * noise.square()[:, 0], 0)
    model = NetworkDenoiser(Line(0.2), path, prediction)
    each = Denoising().at(model, mine, t, noise, torch.tensor([label, label]))
    (expected,) = torch.autograd.grad((weight * each).sum(), model.net.k, retain_graph=True)
    target = Empirical(data, labels=labels).denoiser(path)
    losses = Denoising(target=target).at(model, mine, t, noise, torch.tensor([label, label]))
    first, second = (torch.autograd.grad(loss, model.net.k, retain_graph=True)[0] for loss in losses)
    assert float(first) == pytest.approx(float(expected), rel=1e-9)
    assert float(second) == pytest.approx(float(expected), rel=1e-9)  # whichever of the data made x_t
    apart = [float(torch.autograd.grad(loss, model.net.k, retain_graph=True)[0]) for loss in each]
    assert abs(apart[0] - apart[1]) > 0.05 * abs(float(expected))


def test_a_target_is_on_the_models_path():
    model, x = NetworkDenoiser(Line(), VP()), torch.zeros(2, 1, dtype=F64)
    twin = Denoising(target=Gaussian(torch.zeros(1, dtype=F64)).denoiser(VP()))
    assert twin(model, x, generator=Streams.of(0, 2)).shape == (2,)
    other = Denoising(target=Gaussian(torch.zeros(1, dtype=F64)).denoiser(Karras()))
    with pytest.raises(ArgumentError, match=r"the target is on Karras\(.*on_path\(target, model.path\)"):
        other(model, x, generator=Streams.of(0, 2))
    assert repr(twin).endswith(", target=LawDenoiser)")
    assert "target" not in repr(Denoising())


def test_time_distributions_have_their_quantiles():
    u = torch.tensor([0.02, 0.25, 0.5, 0.9], dtype=F64)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), 1.0)
    for path in (Karras(), Linear(), VP()):
        t = times.LogNormal(-1.2, 1.2).quantile(path, u)
        level = path.sigma(t) / path.alpha(t)
        torch.testing.assert_close(normal.cdf((level.log() + 1.2) / 1.2), u)
        t = times.LogitNormal(0.3, 0.8).quantile(path, u)
        logit = torch.logit((t - path.t_low) / (path.t_max - path.t_low))
        torch.testing.assert_close(normal.cdf((logit - 0.3) / 0.8), u)
        t = times.Uniform().quantile(path, u)
        torch.testing.assert_close((t - path.t_low) / (path.t_max - path.t_low), u)
        ends = path.half_log_snr(torch.tensor([path.t_low, path.t_high], dtype=F64))
        level = path.half_log_snr(times.UniformHalfLogSNR().quantile(path, u))
        torch.testing.assert_close((level - ends[0]) / (ends[1] - ends[0]), u)


def test_a_discrete_chain_visits_its_levels_equally():
    u = (torch.arange(40_000, dtype=F64) + 0.5) / 40_000
    t = times.Discrete(4).quantile(Linear(), u)
    levels, counts = t.unique(return_counts=True)
    torch.testing.assert_close(levels, torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=F64))
    assert counts.tolist() == [10_000] * 4


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_no_time_leaves_the_part_where_networks_are_called(time, path):
    u = torch.tensor([2.0**-53, 0.5, 1 - 2.0**-53], dtype=F64)
    t = TIMES[time]().quantile(path, u)
    assert ((t >= path.t_low) & (t <= path.t_max)).all()


def test_a_sample_keeps_its_noise_whatever_the_batch():
    model = NetworkDenoiser(Line(), Karras(), "edm")
    x_0 = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    objective = Denoising("log-normal", "edm")
    whole = objective.losses(model, x_0, generator=Streams.of(5, 8))
    parts = [objective.losses(model, x_0[i : i + 4], generator=Streams.of(5, 4, first=i)) for i in (0, 4)]
    assert torch.equal(whole.t, torch.cat([p.t for p in parts]))
    assert torch.equal(whole.loss, torch.cat([p.loss for p in parts]))


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    Denoising()(NetworkDenoiser(Line(), VP()), torch.zeros(4, 2), generator=Streams.of(0, 4))
    Denoising()(NetworkDenoiser(Line(), VP()), torch.zeros(4, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Denoising(time="unifrom"),
        lambda: Denoising(weight="min_snr"),
        lambda: times.LogNormal(std=0.0),
        lambda: times.Discrete(0),
        lambda: weights.MinSNR(gamma=-1.0),
        lambda: weights.EDM(sigma_data=0.0),
    ],
)
def test_wrong_choices_are_refused(make):
    with pytest.raises(ArgumentError):
        make()
