"""One network read as noise predictor, score and denoiser: the same samples, the same loss (section 3.4.2)."""

import pytest
import torch
from torch import nn

from undiffuse.core.random import Streams
from undiffuse.fields import NetworkDenoiser
from undiffuse.nets import MLP
from undiffuse.objectives import Denoising
from undiffuse.oracles import GaussianMixture
from undiffuse.solvers import DDPM, sample
from undiffuse.solvers.annealed import AnnealedLangevin
from worlds import PATHS

F64 = torch.float64
paths = pytest.mark.parametrize("path", ["vp", "ddpm-table", "ncsn-table"])


class Reading(nn.Module):
    """A noise predictor whose output is said in other words: `-eps / sigma`, or `(x - sigma eps) / alpha`.

    On these paths the noise label is the time, and the input is `path.input_scale(t) x`.
    """

    def __init__(self, net, path, words):
        super().__init__()
        self.net, self.path, self.words = net, path, words

    def forward(self, x_in, t, cond=None):
        noise, x = self.net(x_in, t, cond), x_in / self.path.input_scale(t)[:, None]
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        return {"noise": noise, "score": -noise / sigma, "data": (x - sigma * noise) / alpha}[self.words]


def law():
    means = torch.tensor([[-1.0, 0.4], [0.8, 0.9], [0.2, -1.1]], dtype=F64)
    return GaussianMixture(means, torch.full((3,), 0.3, dtype=F64))


@pytest.fixture(scope="module")
def trained():
    """DDPM's noise predictor on each path after 200 steps, its loss before and after."""
    nets = {}

    def get(path):
        if path not in nets:
            torch.manual_seed(0)
            net = MLP(2, hidden=48, layers=2).double()
            model, objective = NetworkDenoiser(net, PATHS[path], "noise"), Denoising(weight="simple")
            optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
            for step in range(200):
                x_0 = law().sample(256, Streams.of(step, 256))
                loss = objective(model, x_0, generator=Streams.of(step, 256).fold("loss")).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            nets[path] = net.requires_grad_(False), float(loss.detach())
        return nets[path]

    return get


def readings(net, path):
    return {words: NetworkDenoiser(Reading(net, path, words), path, words) for words in ("noise", "score", "data")}


@paths
@pytest.mark.parametrize("solver", ["ddim", DDPM(), AnnealedLangevin(3)], ids=["ddim", "ddpm", "annealed-langevin"])
def test_one_network_in_three_words_draws_the_same_samples(path, solver, trained):
    net, loss = trained(path)
    assert loss < 0.7  # it has learned something: a network that says nothing has loss 1
    x = {
        words: sample(denoiser, (64, 2), solver=solver, steps=20, seed=3, dtype=F64)
        for words, denoiser in readings(net, PATHS[path]).items()
    }
    assert float(x["noise"].std()) > 0.3
    for words in ("score", "data"):
        torch.testing.assert_close(x[words], x["noise"], rtol=0, atol=1e-5)


@paths
def test_score_is_minus_noise_over_sigma(path, trained):
    models, path = readings(trained(path)[0], PATHS[path]), PATHS[path]
    t = torch.linspace(path.t_low, path.t_max, 50, dtype=F64)
    x = path.perturb(law().sample(50, Streams.of(0, 50)), t, Streams.of(1, 50).normal((50, 2), dtype=F64))
    noise = models["noise"].net(path.input_scale(t)[:, None] * x, t)
    for model in models.values():
        torch.testing.assert_close(model.score(x, t), -noise / path.sigma(t)[:, None], rtol=1e-6, atol=1e-8)


@paths
def test_the_losses_differ_by_the_weight_alone(path, trained):
    # Score matching with lambda = sigma^2 is DDPM's simple loss: |s - s*|^2 sigma^2 = |eps - eps*|^2; and
    # |x_0 - D|^2 = |eps - eps*|^2 sigma^2 / alpha^2.
    models, path = readings(trained(path)[0], PATHS[path]), PATHS[path]
    n = 200
    t = torch.linspace(path.t_low, path.t_max, n, dtype=F64)
    x_0, noise = law().sample(n, Streams.of(5, n)), Streams.of(6, n).normal((n, 2), dtype=F64)
    simple = {words: Denoising(weight="simple").at(model, x_0, t, noise) for words, model in models.items()}
    variance, signal = path.sigma(t).square(), path.alpha(t).square()
    torch.testing.assert_close(variance * simple["score"], simple["noise"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(signal / variance * simple["data"], simple["noise"], rtol=1e-6, atol=1e-9)
    for words, model in models.items():
        joint = Denoising(weight="snr").at(model, x_0, t, noise)
        torch.testing.assert_close(joint, simple["noise"], rtol=1e-6, atol=1e-9, msg=words)
