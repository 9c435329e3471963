"""The log-likelihood along the flow, against laws whose density is known."""

from __future__ import annotations

import math

import pytest
import torch

import undiffuse as ud
from undiffuse.core.errors import ArgumentError
from undiffuse.fields import Denoiser
from undiffuse.inference import Exact, Hutchinson, HutchPP
from undiffuse.inference.likelihood import _first_step
from undiffuse.solvers import Bound
from undiffuse.solvers.flow import Flow
from worlds import PATHS

F64 = torch.float64


def mixture(size: int, modes: int = 4, seed: int = 0) -> ud.GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(modes, size, dtype=F64, generator=g)
    return ud.GaussianMixture(means, 0.3 + 0.3 * torch.rand(modes, dtype=F64, generator=g))


@pytest.mark.parametrize("size", [2, 10, pytest.param(64, marks=pytest.mark.slow)])
def test_with_the_exact_divergence_a_mixture_s_density_is_found(size):
    law = mixture(size)
    x = law.sample(8, ud.Streams.of(1, 8))
    ran = ud.log_likelihood(law.denoiser(ud.Linear()), x, divergence="exact")
    assert float((ran.nats - law.log_prob(x)).abs().max()) < 1e-4


@pytest.mark.parametrize("path", ["vp", "ve", "sub-vp", "cosine", "karras"])
def test_on_every_path_the_density_is_that_at_its_first_time(path):
    """On paths that keep a trace of the data the exact law of x_{t_max} stands in for the path's prior."""
    law, on = mixture(2), PATHS[path]
    x = law.sample(6, ud.Streams.of(2, 6))
    ran = ud.log_likelihood(law.denoiser(on), x, divergence="exact", prior=law.perturbed(on, on.t_max).log_prob)
    assert float((ran.nats - law.perturbed(on, on.t_min).log_prob(x)).abs().max()) < 1e-4


def test_with_the_path_s_own_prior_a_gaussian_is_what_the_flow_makes_of_it():
    """On VP, N(0, s^2) ends as N(0, n^2), n^2 = alpha^2 s^2 + sigma^2: a prior of std p is data of std p s / n."""
    s, path = 0.4, ud.VP()
    law = ud.Gaussian(torch.zeros(3, dtype=F64), std=torch.full((3,), s, dtype=F64))
    x = 0.5 * torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    end = torch.tensor(path.t_max, dtype=F64)
    ratio = float(torch.hypot(path.alpha(end) * s, path.sigma(end))) / s  # the flow is linear: x_T = ratio x
    model = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), path.prior_std / ratio)
    ran = ud.log_likelihood(law.denoiser(path), x, divergence="exact")
    assert torch.allclose(ran.nats, model.log_prob(x).sum(1), atol=1e-6)
    assert torch.allclose(ran.latent, ratio * x, atol=1e-4)


@pytest.mark.parametrize(("path", "start"), [(ud.Linear(), 0.0), (ud.VP(), 1e-3)], ids=["rest", "noise"])
def test_the_first_step_is_a_share_of_the_data_s_width(path, start):
    """Of N(0, w^2) seen where |x| = w sqrt(D); of a wide one, and where the score is 0, the most; never below theta."""
    widths, size = torch.tensor([1e-3, 1e-2, 0.1, 1.0], dtype=F64), 16
    time = torch.tensor(start, dtype=F64)
    theta, n = float(path.angle(time)), torch.hypot(path.alpha(time), path.sigma(time))
    found = []
    for width in widths.tolist():
        law = ud.Gaussian(torch.zeros(size, dtype=F64), std=torch.full((size,), width, dtype=F64))
        seen = torch.hypot(path.alpha(time) * width, path.sigma(time))  # the width of x_t
        y = torch.stack([seen / n * torch.ones(size, dtype=F64), torch.zeros(size, dtype=F64)])
        found.append(_first_step(Flow(Bound(law.denoiser(path)), (2, size)), y, theta)[1])
    rounded = torch.sqrt(widths**2 + max(theta, 1e-5) ** 2)
    assert torch.allclose(torch.stack(found)[:, 0], (0.03 * rounded).clamp(max(theta, 1e-5), 0.03), rtol=1e-3)
    assert torch.stack(found)[:, 1].tolist() == [0.03] * 4


class From(Denoiser):
    """A denoiser that knows nothing below a time, as trained ones do."""

    def __init__(self, inner, t_low):
        super().__init__(inner.path)
        self.inner, self.low = inner, t_low

    @property
    def t_low(self):
        return self.low

    def forward(self, x_t, t, cond=None):
        assert float(torch.as_tensor(t).min()) >= self.low - 1e-9
        return self.inner(x_t, t, cond)


@pytest.mark.parametrize("path", [ud.Linear(), ud.VP()], ids=["linear", "vp"])
def test_below_the_lowest_time_data_is_x_over_alpha(path):
    law = mixture(2)
    x, t = law.sample(6, ud.Streams.of(4, 6)), 0.1
    at = law.perturbed(path, t)
    prior = law.perturbed(path, path.t_max).log_prob
    ran = ud.log_likelihood(From(law.denoiser(path), t), x, divergence="exact", prior=prior)
    alpha = float(path.alpha(torch.tensor(t, dtype=F64)))
    assert float((ran.nats - (at.log_prob(alpha * x) + 2 * math.log(alpha))).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "rule", [Hutchinson(1), Hutchinson(3, "gaussian"), Hutchinson(1, "sphere"), HutchPP(2)], ids=str
)
def test_an_estimate_is_unbiased(rule):
    """300 estimates at one point: within 3 standard errors, of which one is below 0.1 nats."""
    law, n = mixture(4, seed=3), 300
    x = law.sample(1, ud.Streams.of(5, 1)).expand(n, 4)
    ran = ud.log_likelihood(law.denoiser(ud.Linear()), x, divergence=rule, seed=7, rtol=1e-4, atol=1e-4, batch=n)
    error = ran.nats - law.log_prob(x[:1])
    standard = float(error.std()) / n**0.5
    assert 1e-4 < standard < 0.1
    assert abs(float(error.mean())) < 3 * standard + 1e-3


def test_hutch_plus_plus_is_exact_with_as_many_probes_as_dimensions():
    law = mixture(5)
    x = law.sample(4, ud.Streams.of(6, 4))
    options = {"rtol": 1e-7, "atol": 1e-7, "seed": 0}
    ran = ud.log_likelihood(law.denoiser(ud.Linear()), x, divergence=HutchPP(9), **options)
    assert float((ran.nats - law.log_prob(x)).abs().max()) < 1e-4


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_sample_s_value_does_not_depend_on_its_batch(divergence):
    law, n = mixture(3), 64
    x = law.sample(n, ud.Streams.of(8, n))
    field = law.denoiser(ud.VP())
    whole = ud.log_likelihood(field, x, divergence=divergence, seed=2)
    parts = ud.log_likelihood(field, x[:5], divergence=divergence, seed=2, batch=1)
    assert torch.allclose(parts.nats, whole.nats[:5], atol=1e-9, rtol=0)
    assert torch.equal(parts.nfe, whole.nfe[:5])


def test_conditions_go_with_their_samples():
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=F64)
    law = ud.GaussianMixture(means, torch.tensor([0.3, 0.5], dtype=F64), labels=torch.tensor([0, 1]))
    labels = torch.tensor([0, 1, 1, -1, 0])
    x = law.sample(5, ud.Streams.of(9, 5), cond=labels)
    ran = ud.log_likelihood(law.denoiser(ud.Linear()), x, divergence="exact", cond=labels, batch=2)
    assert float((ran.nats - law.log_prob(x, labels)).abs().max()) < 1e-4


def test_its_gradient_is_the_score_and_reaches_the_parameters():
    law = mixture(3)
    x = law.sample(4, ud.Streams.of(10, 4)).requires_grad_()
    field = law.denoiser(ud.Linear())
    options = {"divergence": Exact(), "rtol": 1e-7, "atol": 1e-7, "differentiable": True}
    (slope,) = torch.autograd.grad(ud.log_likelihood(field, x, **options).nats.sum(), x)
    assert torch.allclose(slope, law.score(x.detach()), atol=1e-4)

    class Shifted(Denoiser):
        """The law moved by b: D(x) = D_0(x - alpha b) + b."""

        def __init__(self):
            super().__init__(field.path)
            self.b = torch.nn.Parameter(torch.zeros(3, dtype=F64))

        t_low = property(lambda self: 0.0)

        def forward(self, x_t, t, cond=None):
            return self.estimate(x_t, t, cond)[0]

        def estimate(self, x_t, t, cond=None):
            alpha = self.path.alpha(torch.as_tensor(t, dtype=F64)).reshape(-1, 1)
            x_0, noise = field.estimate(x_t - alpha * self.b, t)
            return x_0 + self.b, noise

    model = Shifted()
    ud.log_likelihood(model, x.detach(), **options).nats.sum().backward()
    assert torch.allclose(model.b.grad, -law.score(x.detach()).sum(0), atol=1e-3)


def test_hutch_plus_plus_s_gradient_is_the_exact_one_s():
    """With as many probes as dimensions, also where the sketched columns depend on each other (alpha = 0)."""
    law = mixture(3)
    x = law.sample(3, ud.Streams.of(11, 3)).requires_grad_()
    options = {"rtol": 1e-7, "atol": 1e-7, "differentiable": True, "seed": 0}
    ran = ud.log_likelihood(law.denoiser(ud.Linear()), x, divergence=HutchPP(3), **options)
    (slope,) = torch.autograd.grad(ran.nats.sum(), x)
    assert torch.allclose(slope, law.score(x.detach()), atol=1e-4)


def test_bits_per_dim_of_a_uniform_law_are_the_bits_of_its_levels():
    """Uniform on [-1, 1]^D: log-density -D log 2, and each of 2^k levels costs k bits."""
    assert ud.bits_per_dim(-7 * math.log(2), 7) == pytest.approx(8)
    nats = torch.full((3,), -5 * math.log(2))
    assert torch.allclose(ud.bits_per_dim(nats, 5, levels=32), torch.full((3,), 5.0))
    # A uniform law on a quarter of each axis: two bits less.
    assert ud.bits_per_dim(-7 * math.log(0.5), 7) == pytest.approx(6)


def test_wrong_arguments_are_explained():
    law = mixture(2)
    field, x = law.denoiser(ud.Linear()), torch.zeros(3, 2, dtype=F64)
    with pytest.raises(ArgumentError, match="Did you mean 'hutchinson'"):
        ud.log_likelihood(field, x, divergence="hutchison")
    with pytest.raises(ArgumentError, match="Did you mean 'dopri5'"):
        ud.log_likelihood(field, x, method="dopri")
    with pytest.raises(ArgumentError, match="x is infinite or NaN in 1 of 3 samples"):
        ud.log_likelihood(field, torch.where(torch.arange(3)[:, None] == 1, torch.nan, x))
    with pytest.raises(ArgumentError, match="expected floats of shape"):
        ud.log_likelihood(field, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="expected floats of shape"):
        ud.log_likelihood(field, torch.zeros(3, 5, dtype=F64))
    with pytest.raises(ArgumentError, match="one row for each of 3 samples"):
        ud.log_likelihood(field, x, cond=torch.arange(9))
    with pytest.raises(ArgumentError, match="seed holds 2 streams"):
        ud.log_likelihood(field, x, seed=ud.Streams.of(0, 2))
    with pytest.raises(ArgumentError, match="levels 1"):
        ud.bits_per_dim(0.0, 3, levels=1)
    with pytest.raises(ArgumentError, match="probes is 0"):
        Hutchinson(0)


def test_a_seed_that_made_the_data_makes_other_directions():
    """Dequantised by seed 3 and measured by seed 3: directions of the same numbers would follow the data's noise."""
    law = ud.GaussianMixture(
        torch.tensor([[-1.0, 0.3, 0.2], [0.8, -0.5, 0.4]], dtype=torch.float64),
        torch.tensor([0.4, 0.4], dtype=torch.float64),
    )
    x, field = law.sample(4, ud.Streams.of(1, 4)), law.denoiser(ud.Linear())
    own, folded, same = (
        ud.log_likelihood(field, x, seed=seed).nats
        for seed in (3, ud.Streams.of(3, 4).fold("divergence"), ud.Streams.of(3, 4))
    )
    assert torch.equal(own, folded)
    assert float((own - same).abs().max()) > 0.1  # in three dimensions some directions are the same by chance


@pytest.mark.parametrize("path", [ud.VP(), ud.VE(1e-4, 20.0), ud.Linear()], ids=["vp", "ve", "linear"])
def test_data_as_sharp_as_a_hundredth_are_resolved(path):
    """An error of the way costs its product with a score of 100: it is the divergence that makes the steps short."""
    means = torch.tensor([[-0.5, 0.3], [0.8, -0.5], [0.1, 0.6]], dtype=torch.float64)
    law = ud.GaussianMixture(means, torch.full((3,), 0.01, dtype=torch.float64))
    x = law.sample(8, ud.Streams.of(1, 8))
    exact = law.perturbed(path, path.t_min).log_prob if path.t_min == 0 and isinstance(path, ud.VE) else law.log_prob
    ran = ud.log_likelihood(law.denoiser(path), x, divergence="exact", prior=law.perturbed(path, path.t_max).log_prob)
    assert float((ran.nats - exact(x)).abs().max()) < 1e-4


@pytest.mark.parametrize("std", [0.03, 0.003])
def test_a_loose_tolerance_sees_sharp_data_too(std):
    """A flow nearly at rest, at sigma = 1e-4: a first step past all that happens has a small error by its stages."""
    means = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    law, path = ud.GaussianMixture(means, torch.full((8,), std, dtype=F64)), ud.VE(1e-4, 20.0)
    x = law.sample(16, ud.Streams.of(1, 16))
    prior = law.perturbed(path, path.t_max).log_prob
    ran = ud.log_likelihood(law.denoiser(path), x, divergence="exact", rtol=1e-3, atol=1e-3, prior=prior)
    assert float((ran.nats - law.perturbed(path, path.t_min).log_prob(x)).abs().max()) < 2e-3


def test_an_exact_divergence_is_asked_for_at_fewer_places_than_the_way():
    law, asked = mixture(4), []

    class Counted(Exact):
        def __call__(self, f, y, directions):
            asked.append(len(y))
            return super().__call__(f, y, directions)

    x = law.sample(8, ud.Streams.of(2, 8))
    ran = ud.log_likelihood(law.denoiser(ud.Linear()), x, divergence=Counted())
    assert 0 < sum(asked) < 0.4 * int(ran.nfe.sum())
