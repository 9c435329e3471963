"""Every solver converges at the order it declares, and to the right law."""

from __future__ import annotations

import pytest
import torch

from solvers.measuring import F64, SOLVERS, STOCHASTIC, gaussian, mixture, moments_after, moments_of_run, numbers, order
from undiffuse.oracles import GaussianMixture, exact_flow
from undiffuse.paths import VE, VP, Linear
from undiffuse.solvers import Multistep, make_grid, sample
from worlds import PATHS

IN_PATH_TIME = ("euler-maruyama", "reverse-diffusion", "stochastic-heun")
LAW_AFTER = {"edm churn=2": (100, 0.002), "annealed-langevin": (300, 0.06), "euler-maruyama eta=0.5": (300, 0.02)}
SMOOTH = ["vp", "ve", "sub-vp", "cosine", "linear", "trig", "karras"]


@pytest.mark.parametrize("path", SMOOTH)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_declared_order_is_the_measured_one(name, path):
    # Equal steps of sigma / alpha, which are those of Karras's time, give iPNDM the order of its polynomial.
    declared = 4 if (name, path) == ("ipndm", "karras") else SOLVERS[name].order
    assert order(name, PATHS[path]) == pytest.approx(declared, abs=0.2)


@pytest.mark.parametrize("path", [VP(), VE(), Linear()], ids=["vp", "ve", "linear"])
@pytest.mark.parametrize(
    ("name", "steps", "rtol"),
    [(n, *LAW_AFTER.get(n, (300, 0.016))) for n in STOCHASTIC],
)
def test_stochastic_solvers_end_in_the_law_of_the_data(name, steps, rtol, path):
    law, grid = gaussian(), make_grid(path, steps, "canonical")
    start = law.perturbed(path, path.t_max)
    moments = moments_of_run if isinstance(SOLVERS[name], Multistep) else moments_after
    mean, variance = moments(SOLVERS[name], path, grid, start.flat_mean, start.variances)
    end = law.perturbed(path, path.t_min)
    assert torch.allclose(variance.sqrt(), end.variances.sqrt(), rtol=rtol)
    # Steps that are exact where the denoiser is constant keep the mean; those in the path's own time do to their order.
    assert torch.allclose(mean, end.flat_mean, atol=5e-3 if name.startswith(IN_PATH_TIME) else 1e-12)


@pytest.mark.parametrize(
    ("name", "steps", "bound"), [("ddim", 20, 0.05), ("dpmpp-2m", 20, 0.0065), ("dpmpp-2m", 60, 1e-3)]
)
@pytest.mark.parametrize("path", ["vp", "cosine", "linear", "karras", "ddpm-table"])
def test_from_noise_to_data_on_a_gaussian(name, steps, bound, path):
    law, on = gaussian(), PATHS[path]
    noise = on.prior_std * numbers(40, 3, seed=2)
    exact = law.flow(on, noise, on.t_max, on.t_min)
    x = sample(law.denoiser(on), noise=noise, solver=name, steps=steps)
    assert float((x - exact).square().mean().sqrt()) < bound


@pytest.mark.parametrize("path", ["vp", "linear"])
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "annealed-langevin"])  # see test_annealed.py
def test_samples_of_a_mixture_have_its_modes(name, path):
    if (name, path) == ("reverse-diffusion eta=0", "linear"):
        pytest.skip("out of alpha = 0 the chain's steps do not become small, and nothing forgets their error")
    n = 2000
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [1.0, -2.0]], dtype=F64)
    law = GaussianMixture(means, torch.tensor([0.3, 0.4, 0.5], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64))
    steps = 600 if name == "reverse-diffusion eta=0" else 60  # at 60 its shares are 0.43 and 0.5
    x = sample(law.denoiser(PATHS[path]), (n, 2), solver=SOLVERS[name], steps=steps, seed=11, dtype=F64)
    mode = law.responsibilities(x).argmax(1)
    for k in range(3):
        members = x[mode == k]
        # Five standard errors (false alarms below 1e-5 over all cases), and the solver's own error beside them.
        assert len(members) / n == pytest.approx(float(law.weights[k]), abs=5 * 0.5 / n**0.5)
        std = float(law.variances[k].sqrt())
        assert torch.allclose(members.mean(0), means[k], atol=5 * std / len(members) ** 0.5 + 0.01)
        assert torch.allclose(members.std(0), law.variances[k].sqrt(), rtol=5 / (2 * len(members)) ** 0.5 + 0.05)


def test_refining_the_steps_converges_for_every_solver():
    law, path = mixture(), Linear()
    noise = numbers(30, 2, seed=3)
    fine = exact_flow(law.denoiser(path), noise, path.t_max, path.t_min)
    for name in ("euler", "heun", "midpoint", "ddim", "dpmpp-2m", "edm"):  # rk4 meets the step from t_low before
        errors = [
            float((sample(law.denoiser(path), noise=noise, solver=name, steps=n) - fine).norm(dim=1).mean())
            for n in (8, 32, 128)
        ]
        assert errors[2] < 0.3 * errors[1] < 0.3 * 0.45 * errors[0], (name, errors)
