"""A network read through any prediction is the same model; derived quantities; change of path."""

import pytest
import torch
from torch import nn

from undiffuse.core.errors import ArgumentError
from undiffuse.fields import PREDICTIONS, NetworkDenoiser, on_path
from undiffuse.paths import VP, Karras, Linear
from worlds import PATHS

F64 = torch.float64
VARIANCE, MEAN = 0.36, 0.7


class GaussianOutput(nn.Module):
    """The perfect network for data N(MEAN, VARIANCE) under one prediction: it undoes the input scale by itself."""

    def __init__(self, path, prediction, sigma_data):
        super().__init__()
        self.path, self.prediction, self.sigma_data = path, PREDICTIONS[prediction], sigma_data
        self.t = None

    def forward(self, x, c_noise, cond):
        c = self.prediction.coefficients(self.path, self.t, self.sigma_data)
        x_t = x / c.c_in[:, None]
        x_0, noise = truth(self.path, x_t, self.t)
        return c.target(x_0, noise)


def truth(path, x_t, t):
    """E[x_0 | x_t] and E[eps | x_t] of the Gaussian, by regression."""
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    gain = (x_t - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)
    return MEAN + alpha * VARIANCE * gain, sigma * gain


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_noise_score_velocity(path, prediction):
    t = torch.linspace(path.t_low, path.t_high, 33, dtype=F64)
    if path is PATHS["zero-snr-table"]:
        t = t * 0.97
        t = t.clamp(min=path.t_low)
    x_t = torch.randn(33, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * 2
    net = GaussianOutput(path, prediction, 0.6)
    net.t = t
    denoiser = NetworkDenoiser(net, path, prediction, sigma_data=0.6)
    x_0, noise = truth(path, x_t, t)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    score = -(x_t - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)
    f, g = path.drift(t)[:, None], path.diffusion(t)[:, None]
    velocity = f * x_t - 0.5 * g**2 * score  # Prop. 6.3.2, the score form
    for got, wanted in (
        (denoiser(x_t, t), x_0),
        (denoiser.noise(x_t, t), noise),
        (denoiser.score(x_t, t), score),
        (denoiser.velocity(x_t, t), velocity),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", [VP(), Karras(), Linear()], ids=["vp", "karras", "linear"])
def test_a_model_of_one_path_asked_on_another(target):
    class Exact(NetworkDenoiser):
        def forward(self, x_t, t, cond=None):
            return truth(self.path, x_t, t)[0]

        def estimate(self, x_t, t, cond=None):
            return truth(self.path, x_t, t)

    source = Exact(nn.Identity(), Linear())
    t = torch.linspace(target.t_low, 0.99 * target.t_max, 40, dtype=F64)
    x_t = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    moved = on_path(source, target)
    x_0, noise = truth(target, x_t, t)
    torch.testing.assert_close(moved(x_t, t), x_0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moved.noise(x_t, t), noise, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("source", [VP(), Karras()], ids=["vp", "karras"])
def test_a_model_asked_beyond_its_own_noise_answers_from_its_end(source):
    """A model of VP on Linear begins where alpha = 0: there x_0 is asked of x as VP's last noise."""

    class Exact(NetworkDenoiser):
        def forward(self, x_t, t, cond=None):
            return truth(self.path, x_t, t.expand(len(x_t)))[0]

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    model, last = Exact(nn.Identity(), source), torch.tensor(source.t_max, dtype=F64)
    size = torch.hypot(source.alpha(last), source.sigma(last))
    torch.testing.assert_close(on_path(model, Linear())(x, torch.tensor(1.0, dtype=F64)), model(x * size, last))


def test_the_network_runs_in_its_own_dtype_and_sees_a_label_per_sample():
    seen = {}

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))

        def forward(self, x, c_noise, cond):
            seen.update(dtype=x.dtype, label=c_noise, cond=cond)
            return x * self.weight

    x_t = torch.ones(4, 2)
    out = NetworkDenoiser(Probe(), Linear(), "velocity")(x_t, torch.tensor(0.25), torch.tensor([1, 2, 3, 4]))
    assert seen["dtype"] == torch.bfloat16
    assert out.dtype == torch.float32
    torch.testing.assert_close(seen["label"], torch.full((4,), 0.25))
    torch.testing.assert_close(out, x_t)  # F = 0: x_0 = sigma' x / omega = x


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="sigma_data"):
        NetworkDenoiser(nn.Identity(), Linear(), "edm", sigma_data=0.0)

    class Wrong(nn.Module):
        def forward(self, x, c_noise, cond):
            return x[:, :1]

    with pytest.raises(ArgumentError, match="returned shape"):
        NetworkDenoiser(Wrong(), Linear(), "velocity")(torch.zeros(2, 3), torch.tensor(0.5))
