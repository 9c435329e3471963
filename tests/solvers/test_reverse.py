"""Solvers of the reverse SDE: identities, published chains, strong orders, the ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from solvers.measuring import F64, inner_grid, mixture, numbers
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.fields.sde import ReverseSDE, euler_maruyama
from undiffuse.oracles import GaussianMixture
from undiffuse.paths import VE, VP, Karras, Linear
from undiffuse.solvers import DDIM, DDPM, SRK, Euler, EulerMaruyama, Heun, ReverseDiffusion, StochasticHeun, integrate
from undiffuse.solvers.reverse import stage_time
from worlds import PATHS

INSIDE = ["vp", "ve", "sub-vp", "cosine", "linear", "trig", "karras", "ddpm-table", "ncsn-table"]


def close(a, b):
    return float((a - b).abs().max()) <= 1e-11 * max(1.0, float(b.abs().max()))


def inner_pair(path):
    return path.time_of(torch.tensor([-0.2, 0.3], dtype=F64))


def one_step(solver, path, draws=()):
    (t, s), rest = inner_pair(path), iter(draws)
    return solver.step(mixture().denoiser(path), numbers(5, 2), t, s, None, lambda: next(rest))[0]


@pytest.mark.parametrize("path", INSIDE)
@pytest.mark.parametrize(("with_eta", "plain"), [(EulerMaruyama, Euler()), (StochasticHeun, Heun())])
def test_without_noise_they_are_the_methods_of_the_ode(with_eta, plain, path):
    path = PATHS[path]
    assert close(one_step(with_eta(eta=0.0), path), one_step(plain, path))
    grid = path.time_of(torch.linspace(-0.5, 0.5, 9, dtype=F64))
    x, field = numbers(5, 2), mixture().denoiser(path)
    assert close(integrate(field, x, grid, with_eta(eta=0.0)), integrate(field, x, grid, plain))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("path", INSIDE)
def test_euler_maruyama_is_that_of_the_reverse_sde(path, eta):
    path, field = PATHS[path], mixture().denoiser(PATHS[path])
    grid = path.time_of(torch.linspace(-0.5, 0.5, 9, dtype=F64))
    x, of_sde, of_solver = numbers(5, 2), Streams.of(1, 5), Streams.of(1, 5)
    states = euler_maruyama(ReverseSDE(field, eta), x, grid, of_sde)
    draw = lambda: of_solver.normal((5, 2), dtype=F64)  # noqa: E731
    assert close(integrate(field, x, grid, EulerMaruyama(eta=eta), draw), states[-1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_reverse_diffusion_is_the_published_chain(eta):
    # Song et al. 2021, eq. 46 and 47 and their probability flow: the forward chain x_{i+1} = x_i + f_i(x_i) + G_i z.
    x, z = numbers(5, 2), numbers(5, 2, seed=1)
    path = PATHS["ddpm-table"]
    t, s = torch.tensor([0.400, 0.399], dtype=F64)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)[399]
    score = mixture().denoiser(path).score(x, t)
    share = 1.0 if eta else 0.5
    expected = (2 - (1 - beta).sqrt()) * x + share * beta * score + eta * beta.sqrt() * z
    assert close(ReverseDiffusion(eta=eta).step(mixture().denoiser(path), x, t, s, None, lambda: z)[0], expected)
    path = VE()
    gap = path.sigma(t) ** 2 - path.sigma(s) ** 2
    expected = x + share * gap * mixture().denoiser(path).score(x, t) + eta * gap.sqrt() * z
    assert close(ReverseDiffusion(eta=eta).step(mixture().denoiser(path), x, t, s, None, lambda: z)[0], expected)


def test_ancestral_sampling_is_the_published_one_on_ve_and_on_vp():
    # Their VE: x + (sigma^2 - sigma_s^2) score + sigma_s sqrt(1 - sigma_s^2 / sigma^2) z (appendix F). On VP
    # their mean is (x + beta score) / sqrt(1 - beta); with noise sqrt(beta), ours with the posterior's.
    x, z = numbers(5, 2), numbers(5, 2, seed=1)
    t, s = torch.tensor([0.400, 0.399], dtype=F64)
    path = VE()
    sigma, sigma_s = path.sigma(t), path.sigma(s)
    score = mixture().denoiser(path).score(x, t)
    expected = x + (sigma**2 - sigma_s**2) * score + sigma_s * (1 - (sigma_s / sigma) ** 2).sqrt() * z
    assert close(DDPM().step(mixture().denoiser(path), x, t, s, None, lambda: z)[0], expected)
    path = PATHS["ddpm-table"]
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)[399]
    mean = (x + beta * mixture().denoiser(path).score(x, t)) / (1 - beta).sqrt()
    std = (beta * path.sigma(s) ** 2).sqrt() / path.sigma(t)
    assert close(DDPM().step(mixture().denoiser(path), x, t, s, None, lambda: z)[0], mean + std * z)


class Still(Denoiser):
    def forward(self, x_t, t, cond=None):
        return torch.full_like(x_t, 0.3)


@pytest.mark.parametrize("path", INSIDE)
def test_srk_is_ancestral_sampling_where_the_denoiser_is_constant(path):
    path, w = PATHS[path], numbers(5, 2, seed=1)
    t, s = inner_pair(path)
    draws = iter([w, numbers(5, 2, seed=2)])
    moved = SRK().step(Still(path), numbers(5, 2), t, s, None, lambda: next(draws))[0]
    assert close(moved, DDPM().step(Still(path), numbers(5, 2), t, s, None, lambda: w)[0])


@pytest.mark.parametrize("path", INSIDE)
def test_srk_is_the_scheme_for_additive_noise_in_the_snr(path):
    # Roessler 2010, SRA1, for dz = D dr + dW with z = alpha x / sigma^2 and r = (alpha / sigma)^2.
    path, field = PATHS[path], mixture().denoiser(PATHS[path])
    (t, s), x, w, v = inner_pair(path), numbers(5, 2), numbers(5, 2, seed=1), numbers(5, 2, seed=2)
    r = [(path.alpha(u) / path.sigma(u)) ** 2 for u in (t, s)]
    h = r[1] - r[0]
    moved, integral = h.sqrt() * w, 0.5 * h**1.5 * (w + v / math.sqrt(3))
    middle = path.time_of(0.5 * torch.log(r[0] + 0.75 * h))
    z, first = path.alpha(t) * x / path.sigma(t) ** 2, field(x, t)
    stage = z + 0.75 * h * first + 1.5 * integral / h
    second = field(stage * path.sigma(middle) ** 2 / path.alpha(middle), middle)
    end = (z + h * (first + 2 * second) / 3 + moved) * path.sigma(s) ** 2 / path.alpha(s)
    assert close(one_step(SRK(), path, [w, v]), end)
    assert float(stage_time(field, t, s)) == pytest.approx(float(middle), abs=1e-12)


# ---------------------------------------------------------------- strong orders: one Brownian path for all step sizes


def brownian(steps: int, rows: int) -> tuple[Tensor, Tensor]:
    """Increments of equal steps of length 1 and time integrals over each, (steps, rows, 2) each."""
    w, v = numbers(steps, rows, 2, seed=3), numbers(steps, rows, 2, seed=4)
    return w, 0.5 * (w + v / math.sqrt(3))


def coarse(moved: Tensor, integral: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The same path in steps of m: `W` adds up, `I = sum_i (W before i + I_i)`; then scaled to steps of length 1."""
    groups, inner = moved.reshape(-1, m, *moved.shape[1:]), integral.reshape(-1, m, *moved.shape[1:])
    before = groups.cumsum(1) - groups
    return groups.sum(1) / m**0.5, (before + inner).sum(1) / m**1.5


def strong_order_of(solver, law, path, grid, counts=(16, 64), finest=512, rows=400) -> float:
    """Slope of the root mean square distance at the end from the finest run of the same solver."""
    field, fine = law.denoiser(path), brownian(finest, rows)
    x = law.perturbed(path, grid(1)[0]).sample(rows, torch.Generator().manual_seed(1))

    def end(steps):
        w, integral = coarse(*fine, finest // steps)
        v = (2 * integral - w) * math.sqrt(3)
        draws = iter([d for pair in zip(w, v) for d in pair] if isinstance(solver, SRK) else w)
        return integrate(field, x, grid(steps), solver, lambda: next(draws))

    exact = end(finest)
    errors = [float((end(n) - exact).square().mean().sqrt()) for n in counts]
    return math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])


@pytest.mark.parametrize("path", [VP(), VE(), Linear(), Karras()], ids=["vp", "ve", "linear", "karras"])
@pytest.mark.parametrize("solver", [EulerMaruyama(), StochasticHeun(), ReverseDiffusion()], ids=lambda s: str(s)[:9])
def test_the_declared_strong_order_is_the_measured_one(solver, path):
    measured = strong_order_of(solver, mixture(), path, lambda steps: inner_grid(path, steps))
    assert measured == pytest.approx(solver.strong_order, abs=0.2)


@pytest.mark.parametrize("path", [VP(), Karras()], ids=["vp", "karras"])
def test_the_strong_order_of_srk(path):
    # Equal steps in its own time, the SNR; narrow modes, whose bent denoiser makes the term of order 3/2 the largest.
    centres = torch.tensor([[1.0, 0.0], [-0.5, 0.85], [-0.5, -0.85]], dtype=F64)
    law = GaussianMixture(centres, torch.full((3,), 0.1, dtype=F64))
    snr = torch.exp(2 * torch.tensor([-1.0, 0.5], dtype=F64)).tolist()
    measured = strong_order_of(
        SRK(), law, path, lambda n: path.time_of(0.5 * torch.log(torch.linspace(*snr, n + 1, dtype=F64)))
    )
    assert measured == pytest.approx(1.5, abs=0.1)


# ---------------------------------------------------------------- the ends


@pytest.mark.parametrize("solver", [EulerMaruyama(), StochasticHeun(), ReverseDiffusion()], ids=lambda s: str(s)[:9])
def test_a_step_out_of_pure_noise_is_ddim_s(solver):
    path, x = Linear(), numbers(5, 2)
    t, s = torch.tensor([1.0, 0.9], dtype=F64)
    field = mixture().denoiser(path)
    assert close(solver.step(field, x, t, s, None, None)[0], DDIM().step(field, x, t, s, None, None)[0])


def test_srk_goes_out_of_pure_noise_as_the_reverse_sde_does():
    # There the path has forgotten: x_s = alpha_s x_0 + sigma_s w, whatever x_t was.
    path, draws = Linear(), [numbers(5, 2, seed=1), numbers(5, 2, seed=2)]
    t, s = torch.tensor([1.0, 0.9], dtype=F64)
    ends = []
    for x in (numbers(5, 2), numbers(5, 2, seed=9)):
        rest = iter(draws)
        ends.append(SRK().step(Still(path), x, t, s, None, lambda rest=rest: next(rest))[0])
    assert close(*ends)
    assert close(ends[0], 0.1 * 0.3 + 0.9 * draws[0])


@pytest.mark.parametrize("solver", [EulerMaruyama, StochasticHeun, ReverseDiffusion])
def test_a_negative_eta_is_refused(solver):
    with pytest.raises(ArgumentError, match="eta is -0"):
        solver(eta=-0.1)
