"""Forward SDE, reverse family and the Fokker-Planck equation against closed forms."""

from __future__ import annotations

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields.sde import ForwardSDE, ReverseSDE, euler_maruyama, fokker_planck_residual
from undiffuse.oracles import Gaussian, GaussianMixture
from undiffuse.paths import VP, Linear
from worlds import PATHS

F64 = torch.float64
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.2], [0.9, 0.6], [0.1, -1.1]], dtype=F64)
    return GaussianMixture(means, torch.tensor([0.5, 0.4, 0.6], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64))


def gaussian() -> Gaussian:
    return Gaussian(torch.tensor([0.7, -0.4, 0.2], dtype=F64), std=torch.tensor([1.0, 0.5, 0.2], dtype=F64))


def inner_times(path, n=5):
    """From nearly one end of the network's range to nearly the other, off the knots of the tables."""
    u = torch.tensor([0.0103, 0.1237, 0.3331, 0.6123, 0.9117], dtype=F64)[:n]
    return path.t_low + (path.t_high - path.t_low) * u


def processes(path, law):
    field = law.denoiser(path)
    return [ForwardSDE(path), *(ReverseSDE(field, eta) for eta in (0.0, 0.5, 1.0, 1.4))]


def points(path, law, n=20):
    t = inner_times(path)
    x = torch.cat([law.perturbed(path, v).sample(n, torch.Generator().manual_seed(1)) for v in t])
    return x, t.repeat_interleave(n)


# ---------------------------------------------------------------- the Fokker-Planck equation


@every_path
def test_the_oracle_density_solves_every_fokker_planck_equation(path):
    law = mixture()
    x, t = points(path, law)
    for sde in processes(path, law):
        residual = fokker_planck_residual(sde, lambda x, t: law.log_prob_at(x, path, t), x, t)
        assert residual.shape == (100,)
        assert float(residual.abs().max()) < 1e-11


@pytest.mark.parametrize("name", ["vp", "linear", "sub-vp", "ddpm-table"])
@pytest.mark.parametrize("part", ["drift", "diffusion"])
def test_one_percent_in_drift_or_diffusion_is_seen(name, part):
    path, law = PATHS[name], mixture()
    x, t = points(path, law)
    for sde in processes(path, law):
        if part == "diffusion" and getattr(sde, "eta", 1) == 0:
            continue
        original = getattr(sde, part)
        setattr(sde, part, lambda *args, original=original: 1.01 * original(*args))
        residual = fokker_planck_residual(sde, lambda x, t: law.log_prob_at(x, path, t), x, t)
        assert float(residual.abs().mean()) > 1e-3


def test_a_law_of_another_width_does_not_solve_it():
    path, other = VP(), GaussianMixture(mixture().flat_means, 1.01 * mixture().variances.sqrt().squeeze())
    x, t = points(path, mixture())
    sde = ReverseSDE(mixture().denoiser(path))
    residual = fokker_planck_residual(sde, lambda x, t: other.log_prob_at(x, path, t), x, t)
    assert float(residual.abs().mean()) > 1e-4


def test_a_density_that_knows_no_time_is_refused():
    law, path = mixture(), VP()
    x, t = points(path, law)
    with pytest.raises(ArgumentError, match="not differentiable in t"):
        fokker_planck_residual(ForwardSDE(path), lambda x, t: law.log_prob(x.detach()), x, t)
    with pytest.raises(ArgumentError, match=r"returned shape \(1,\)"):
        fokker_planck_residual(ForwardSDE(path), lambda x, t: law.log_prob_at(x, path, t)[:1], x, t)


# ---------------------------------------------------------------- drift and diffusion


@every_path
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_the_reverse_family_is_the_score_form(path, eta):
    # eq. 4.1.6 and 4.1.7: f x - (1 + eta^2) / 2 g^2 grad log p_t.
    law = mixture()
    x, t = points(path, law)
    sde, g = ReverseSDE(law.denoiser(path), eta), path.diffusion(t)
    score = torch.cat([law.perturbed(path, v).score(x[i : i + 1]) for i, v in enumerate(t)])
    expected = path.drift(t)[:, None] * x - 0.5 * (1 + eta**2) * g[:, None] ** 2 * score
    torch.testing.assert_close(sde.drift(x, t), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(sde.diffusion(t), eta * g, rtol=1e-9, atol=0)
    if eta == 0:
        torch.testing.assert_close(sde.drift(x, t), law.denoiser(path).velocity(x, t))


@every_path
def test_moments_of_a_gaussian_obey_their_equations(path):
    """`m' = E b`, `V' = 2 Cov(b, x) + d g^2`, d = -1 for a process that runs against t; b is affine: no sampling."""
    law, t = gaussian(), inner_times(path)[2]
    at = t.clone().requires_grad_(True)
    mean = (path.alpha(at) + 0 * at) * law.flat_mean
    variance = path.alpha(at) ** 2 * law.variances + path.sigma(at) ** 2
    for sde in processes(path, law):
        centre = sde.drift(mean.detach()[None], t)[0]
        slope = sde.drift(mean.detach()[None] + 1, t)[0] - centre
        for k in range(3):
            (mean_dot,) = torch.autograd.grad(mean[k], at, retain_graph=True)
            (variance_dot,) = torch.autograd.grad(variance[k], at, retain_graph=True)
            assert float(centre[k]) == pytest.approx(float(mean_dot), rel=1e-8, abs=1e-9)
            rate = 2 * slope[k] * variance[k].detach() + sde.direction * sde.diffusion(t) ** 2
            assert float(rate) == pytest.approx(float(variance_dot), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", ["linear", "trig", "cosine", "zero-snr-table"])
def test_where_the_signal_is_gone_only_the_ode_and_the_exact_draws_go_on(name):
    path, law, x = PATHS[name], mixture(), torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    end = torch.tensor(path.t_max, dtype=F64)
    for sde in (ForwardSDE(path), ReverseSDE(law.denoiser(path))):
        for call in (lambda sde=sde: sde.drift(x, end), lambda sde=sde: sde.diffusion(end)):
            with pytest.raises(ArgumentError, match=r"alpha = 0 at t = 1.*t_high"):
                call()
    ode = ReverseSDE(law.denoiser(path), eta=0.0)
    expected = path.alpha_dot(end) * law.mean + path.sigma_dot(end) * x
    torch.testing.assert_close(ode.drift(x, end), expected)
    assert float(ode.diffusion(end)) == 0
    states = path.simulate(x, torch.tensor([0.0, 0.5, 1.0]), Streams.of(0, 3))
    torch.testing.assert_close(states[0], x)
    assert bool(torch.isfinite(states).all())


@pytest.mark.parametrize("name", ["vp", "linear", "karras", "cosine"])
def test_at_the_data_the_reverse_processes_are_refused_and_the_forward_one_is_not(name):
    path, law, x = PATHS[name], mixture(), torch.zeros(3, 2, dtype=F64)
    for eta in (0.0, 1.0):
        sde = ReverseSDE(law.denoiser(path), eta)
        with pytest.raises(ArgumentError, match="sigma = 0 at t = 0: the score of the data is not known there"):
            sde.drift(x, torch.tensor([0.5, 0.0, 0.5], dtype=F64))
        with pytest.raises(ArgumentError, match="time outside the path"):
            sde.drift(x, -0.5)
    torch.testing.assert_close(
        ForwardSDE(path).drift(x + 1, 0.0), path.drift(torch.zeros(3, dtype=F64))[:, None] * (x + 1)
    )


def test_a_negative_eta_is_refused():
    with pytest.raises(ArgumentError, match="eta is -1"):
        ReverseSDE(mixture().denoiser(VP()), -1.0)


# ---------------------------------------------------------------- Euler-Maruyama


class Chosen(Streams):
    """Draws given one after the other."""

    def __init__(self, *draws):
        super().__init__(torch.zeros(len(draws[0]), dtype=torch.int64))
        self.rest = list(draws)

    def normal(self, shape, *, dtype=None, device=None):
        return self.rest.pop(0)


@pytest.mark.parametrize("name", ["vp", "sub-vp", "linear", "karras"])
def test_euler_maruyama_of_the_forward_sde_has_the_marginals_with_order_1(name):
    """Each step is affine, `x -> (1 + f h) x + g sqrt(h) z`: probing it with unit draws gives the variance exactly."""
    path = PATHS[name]
    ends = path.time_of(torch.tensor([2.0, -1.0], dtype=F64)).tolist()

    def error(n):
        times = torch.linspace(*ends, n + 1, dtype=F64)
        # Row 0 starts at 1 and draws nothing; row k draws 1 in step k.
        x, draws = torch.zeros(n + 1, 1, dtype=F64), torch.eye(n + 1, dtype=F64)[1:, :, None]
        x[0] = 1
        last = euler_maruyama(ForwardSDE(path), x, times, Chosen(*draws))[-1, :, 0]
        scale, std = path.transition(times[0], times[-1])
        return torch.stack([last[0] - scale, last[1:].norm() - std]) / std

    coarse, fine = error(100), error(200)
    assert float(coarse.abs().max()) < 0.05
    kept = coarse.abs() > 1e-9  # with alpha = 1 the first is exact
    torch.testing.assert_close((coarse / fine)[kept], torch.full_like(coarse[kept], 2.0), rtol=0.06, atol=0)


def test_times_must_run_the_way_of_the_process():
    path, x = Linear(), torch.zeros(2, 2, dtype=F64)
    times = torch.tensor([0.2, 0.4])
    with pytest.raises(ArgumentError, match="ReverseSDE must be strictly decreasing"):
        euler_maruyama(ReverseSDE(mixture().denoiser(path)), x, times)
    with pytest.raises(ArgumentError, match="ForwardSDE must be strictly increasing"):
        euler_maruyama(ForwardSDE(path), x, times.flip(0))
