"""The conditioning trick (section 6.1): the reverse step's divergence, and its limit, are those of denoising."""

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse.fields import NetworkDenoiser, ReverseSDE
from undiffuse.objectives import Denoising
from undiffuse.oracles import GaussianMixture
from worlds import PATHS

F64 = torch.float64
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())

MEANS, STDS, SHARES = (torch.tensor(v, dtype=F64) for v in ([-0.8, 0.9], [0.3, 0.5], [0.4, 0.6]))
LAW = GaussianMixture(MEANS[:, None], STDS, SHARES)


class Curve(nn.Module):
    """Some network of a scalar."""

    def __init__(self, k: float):
        super().__init__()
        self.k = k

    def forward(self, x, c_noise, cond):
        return self.k * torch.tanh(2 * x + self.k)


def normal(x, mean, std):
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * (2 * torch.pi) ** 0.5)


@every_path
def test_the_divergence_of_a_reverse_step_is_the_denoising_loss_and_a_constant(path):
    """J_KL = J_CKL + C: `E KL(p(x_s | x_t) || N(mean(x_t, D(x_t)), v))` by quadrature beside the squared error of D."""
    s, t = (torch.tensor(path.t_low + u * (path.t_high - path.t_low), dtype=F64) for u in (0.35, 0.5))
    scale, std = path.transition(s, t)
    # The step's law on a grid of both its ends, from the marginal and the forward step alone.
    wide = 6 * float(path.alpha(s) + path.sigma(s))
    x_s = torch.linspace(-wide, wide, 6001, dtype=F64)
    z, h = torch.linspace(-7, 7, 181, dtype=F64), 14 / 180
    start = LAW.perturbed(path, s).log_prob(x_s[:, None]).exp() * (x_s[1] - x_s[0])
    x_t = scale * x_s[:, None] + std * z
    mass = start[:, None] * normal(z, 0.0, 1.0) * h

    nodes, weights = (torch.tensor(v, dtype=F64) for v in np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()
    x_0 = (MEANS[:, None, None] + STDS[:, None, None] * nodes[:, None]).expand(2, 80, 80).reshape(-1, 1)
    noise = nodes.expand(2, 80, 80).reshape(-1, 1)
    pairs = (SHARES[:, None, None] * weights[:, None] * weights).reshape(-1)

    divergences, losses = [], []
    for k in (0.0, 0.4, -0.7):
        model = NetworkDenoiser(Curve(k), path, "data")
        x = x_t.reshape(-1, 1)
        mean, deviation = path.posterior(x, model(x, t), t, s)
        log_q = -0.5 * ((x_s[:, None] - mean.reshape(x_t.shape)) / deviation) ** 2
        divergences.append(-(mass * log_q).sum())
        loss = Denoising(weight="simple").at(model, x_0, t.expand(len(x_0)), noise)
        on_x_0 = path.alpha(s) * deviation**2 / path.sigma(s) ** 2
        losses.append((pairs * loss).sum() * on_x_0**2 / (2 * deviation**2))
    for i in (1, 2):
        assert float(divergences[i] - divergences[0]) == pytest.approx(float(losses[i] - losses[0]), rel=2e-4)


@every_path
def test_the_reverse_sde_is_the_limit_of_bayes_rule(path):
    """Section 4.5.2: mean and variance of p(x_{t - h} | x_t) are those of one step of the SDE, but for O(h^2)."""
    t = torch.tensor(path.t_low + 0.503 * (path.t_high - path.t_low), dtype=F64)
    field = LAW.denoiser(path)
    x = LAW.perturbed(path, t).sample(64, torch.Generator().manual_seed(0))
    sde = ReverseSDE(field)
    errors = []
    for h in (2e-5, 1e-5):
        step = h * (path.t_high - path.t_low)
        mean, std = path.posterior(x, field(x, t), t, t - step)
        on_x_0 = path.alpha(t - step) * std**2 / path.sigma(t - step) ** 2
        variance = std**2 + on_x_0**2 * LAW.posterior_covariance(x, path, t)[:, 0, 0]
        one = x - step * sde.drift(x, t)
        errors.append(torch.stack([(mean - one).abs().mean(), (variance - step * sde.diffusion(t) ** 2).abs().mean()]))
    orders = torch.log2(errors[0] / errors[1])
    assert bool(((orders - 2).abs() < 0.1).all()), orders
