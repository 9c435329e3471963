"""Solvers that must coincide do."""

from __future__ import annotations

import math

import pytest
import torch

from solvers.measuring import F64, SOLVERS, mixture, numbers
from undiffuse.core.random import Streams
from undiffuse.fields import on_path
from undiffuse.paths import VP, Cosine, Karras, Linear, change_of_path
from undiffuse.solvers import DDIM, DDPM, EDM, DPMpp2M, Euler, Heun, integrate, make_grid, sample
from worlds import PATHS

INSIDE = ["vp", "ve", "sub-vp", "cosine", "linear", "trig", "karras", "ddpm-table", "ncsn-table"]


def close(a, b, scale=1.0):
    return float((a - b).abs().max()) <= 1e-11 * scale


def inner_pair(path):
    t, s = path.time_of(torch.tensor([-0.7, 0.9], dtype=F64))
    return t, s


@pytest.mark.parametrize("path", INSIDE)
def test_ddim_is_exponential_euler(path):
    # eq. 9.2.2, in the noise: x_s = (alpha_s / alpha_t) x_t - alpha_s (sigma_t / alpha_t - sigma_s / alpha_s) eps.
    path = PATHS[path]
    (t, s), x, denoiser = inner_pair(path), numbers(5, 2), mixture().denoiser(path)
    alpha, sigma, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
    noise = denoiser.noise(x, t)
    expected = (alpha_s / alpha) * x - alpha_s * (sigma / alpha - sigma_s / alpha_s) * noise
    assert close(DDIM().step(denoiser, x, t, s, None, None)[0], expected)
    # and the two-term form, at the end of the path too
    for end in (s, torch.tensor(path.t_min, dtype=F64)):
        expected = path.alpha(end) * denoiser(x, t) + path.sigma(end) * noise
        assert close(DDIM().step(denoiser, x, t, end, None, None)[0], expected)


@pytest.mark.parametrize("path", INSIDE)
@pytest.mark.parametrize("solver", [DDPM(), DDIM(eta=1.0)], ids=str)
def test_ancestral_steps_draw_from_the_posterior(path, solver):
    path = PATHS[path]
    (t, s), x, denoiser, z = inner_pair(path), numbers(5, 2), mixture().denoiser(path), numbers(5, 2, seed=1)
    mean, std = path.posterior(x, denoiser(x, t), t, s)
    assert close(solver.step(denoiser, x, t, s, None, lambda: z)[0], mean + std * z)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("path", ["vp", "linear", "karras"])
def test_ddim_keeps_the_marginal_for_every_eta(eta, path):
    # If x_0 were known, x_s would have mean alpha_s x_0 and variance sigma_s^2 whatever eta (Song et al., lemma 1).
    path = PATHS[path]
    (t, s), x_0 = inner_pair(path), torch.tensor([[1.3]], dtype=F64)

    class Knows:
        def __init__(self):
            self.path = path

        def __call__(self, x, t):
            return x_0

    def out(x, z):
        return DDIM(eta=eta).step(Knows(), x, t, s, None, lambda: torch.tensor([[z]], dtype=F64))[0]

    zero = torch.zeros(1, 1, dtype=F64)
    offset = out(zero, 0.0)
    on_x, on_noise = out(zero + 1, 0.0) - offset, out(zero, 1.0) - offset
    assert close(on_x * path.alpha(t) * x_0 + offset, path.alpha(s) * x_0)
    assert close(on_x**2 * path.sigma(t) ** 2 + on_noise**2, path.sigma(s) ** 2)


def test_eta_one_is_ddpm_in_a_run():
    denoiser = mixture().denoiser(Cosine())
    a, b = (sample(denoiser, (6, 2), solver=s, steps=12, seed=5, dtype=F64) for s in (DDIM(eta=1.0), DDPM()))
    assert close(a, b)


@pytest.mark.parametrize("kind", ["karras", "half-log-snr", "canonical", "angle"])
def test_edm_without_churn_is_heun_on_the_karras_path(kind):
    denoiser, x = mixture().denoiser(Karras()), 80 * numbers(5, 2)
    a, b = (sample(denoiser, noise=x, solver=s, steps=12, grid=kind) for s in (EDM(), Heun()))
    assert close(a, b, scale=10)


def test_euler_on_the_straight_line_is_ddim():
    denoiser, x = mixture().denoiser(Linear()), numbers(5, 2)
    a, b = (sample(denoiser, noise=x, solver=s, steps=9) for s in (Euler(), DDIM()))
    assert close(a, b)


def test_first_step_of_the_multistep_solver_is_ddim():
    denoiser, x, (t, s) = mixture().denoiser(VP()), numbers(5, 2), inner_pair(VP())
    a, b = (integrate(denoiser, x, torch.stack([t, s]), solver) for solver in (DPMpp2M(), DDIM()))
    assert close(a, b)


def test_the_multistep_solver_extrapolates_to_the_middle_in_log_snr():
    # Lu et al. 2022, algorithm 2, written with exponentials of log-SNRs.
    path, x = VP(), numbers(5, 2)
    denoiser, levels = mixture().denoiser(path), torch.tensor([-1.0, -0.4, 0.5], dtype=F64)
    grid = path.time_of(levels)
    middle = integrate(denoiser, x, grid[:2], DDIM())
    h, r = levels[2] - levels[1], (levels[1] - levels[0]) / (levels[2] - levels[1])
    average = (1 + 1 / (2 * r)) * denoiser(middle, grid[1]) - 1 / (2 * r) * denoiser(x, grid[0])
    ratio = path.sigma(grid[2]) / path.sigma(grid[1])
    expected = ratio * middle - path.alpha(grid[2]) * torch.expm1(-h) * average
    assert close(integrate(denoiser, x, grid, DPMpp2M()), expected)


@pytest.mark.parametrize(
    "name", ["ddim", "dpmpp-2m", "edm", "ddpm", "ddim eta=0.5", "edm churn=2", "annealed-langevin", "srk"]
)
@pytest.mark.parametrize("target", ["vp", "cosine", "karras"])
def test_exponential_solvers_take_the_same_steps_on_every_path(name, target):
    # Prop. 6.3.3: only the scale of x and the label of the time differ.
    source, target = Linear(), PATHS[target]
    # From where churn, which may not pass the path's own end, is that of the straight line.
    grid = make_grid(target, 13, "canonical")[2:]
    tau, scale = change_of_path(source, target, grid)
    x, n = numbers(5, 2), 5

    def run(path, x, times):
        streams = Streams.of(3, n)
        denoiser = mixture().denoiser(path)
        return integrate(denoiser, x, times, SOLVERS[name], lambda: streams.normal((n, 2), dtype=F64))

    on_target = run(target, scale[0] * x, grid)
    on_source = run(source, x, tau)
    assert float((on_target - scale[-1] * on_source).abs().max()) < 1e-9


def test_a_denoiser_moved_to_another_path_samples_there():
    law, x = mixture(), numbers(5, 2)
    moved = on_path(law.denoiser(Karras()), Linear())
    a, b = (sample(d, noise=x, steps=10) for d in (moved, law.denoiser(Linear())))
    # Karras ends at sigma = 80, Linear at infinity: the first call is made at 80.
    assert float((a - b).abs().max()) < 0.05


# Annealed Langevin dynamics moves x at t first; the other two extrapolate, see test_runge_kutta.py.
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("annealed-langevin", "midpoint", "rk4")])
@pytest.mark.parametrize("path", ["vp", "linear", "cosine", "karras", "zero-snr-table"])
def test_a_step_to_the_data_returns_the_denoiser(name, path):
    path, x = PATHS[path], numbers(5, 2)
    denoiser = mixture().denoiser(path)
    t = path.time_of(torch.tensor(1.0, dtype=F64))
    expected = denoiser(x, t)
    solver = EDM(S_churn=2.0, S_max=0.0) if name == "edm churn=2" else SOLVERS[name]
    assert close(integrate(denoiser, x, torch.stack([t, t.new_tensor(path.t_min)]), solver, lambda: x), expected)


def test_churn_raises_the_noise_and_keeps_the_law():
    path, solver = VP(), EDM(S_churn=3.0, S_min=0.1, S_max=10.0, S_noise=1.0, steps=10)
    t, _ = inner_pair(path)
    denoiser, x, z = mixture().denoiser(path), numbers(5, 2), numbers(5, 2, seed=1)
    raised, time = solver.churn(denoiser, x, t, lambda: z)
    level, level_up = (path.sigma(v) / path.alpha(v) for v in (t, time))
    assert float(level_up / level) == pytest.approx(1.3, abs=1e-12)
    scale, std = path.transition(t, time)
    assert close(raised, scale * x + std * z)
    capped = EDM(S_churn=1e6, steps=10).churn(denoiser, x, t, lambda: z)[1]
    assert float(path.sigma(capped) / path.alpha(capped) / level) == pytest.approx(math.sqrt(2), abs=1e-12)
    for quiet in (EDM(S_churn=3.0, S_max=0.5, steps=10), EDM(S_churn=3.0, S_min=50.0, steps=10)):
        assert quiet.churn(denoiser, x, t, lambda: z) == (x, t)
    end = torch.tensor(path.t_max, dtype=F64)
    assert float(solver.churn(denoiser, x, end, lambda: z)[1]) <= path.t_max
