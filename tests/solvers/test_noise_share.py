"""Adams methods of the reverse SDE whose noise has a share of its own at each level, against the SDE's own moments.

References are integrated from the SDE, `dy = [(1 + eta^2) e^lambda D - eta^2 y] d lambda + sqrt(2) eta dW` with
y = x / sigma, by a Runge-Kutta method of order 8 in pieces of constant eta; no weight of the library is in them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from solvers.measuring import F64, gaussian, mixture, numbers, weak_error
from undiffuse.fields import Denoiser
from undiffuse.paths import VE, VP, Karras, Linear
from undiffuse.solvers import Bound, LangevinCorrector, Multistep, integrate, sample
from undiffuse.solvers.noise_share import NoiseShare, noisy_weights

EVERYWHERE = (0.0, math.inf)
# From half log-SNR -0.4 to 0.9: all of the step, its beginning, its end, its middle, none of it.
SPAN = (-0.4, 0.9)
INTERVALS = [EVERYWHERE, (0.9, 5.0), (0.1, 1.1), (0.7, 1.2), (2.0, 5.0)]


def sa(points: int = 3, corrector: bool = True, noisy=EVERYWHERE, eta: float = 1.0, rule: str = "exact") -> Multistep:
    return Multistep(points, "data", "half-log-snr", corrector, rule, eta, noisy=noisy)


def share(eta: float, noisy) -> NoiseShare:
    return NoiseShare.between(eta, noisy, 1.0)


def moments(eta: float, noisy, start: float, end: float, degree: int) -> tuple[float, float, np.ndarray]:
    """What is left of y, the standard deviation of what is fresh, and what D = (lambda - end)^k adds, over e^end."""
    edges = [-math.log(u) for u in noisy if 0 < u < math.inf and start < -math.log(u) < end]
    state = np.array([1.0, 0.0, *np.zeros(degree)])
    for a, b in pairwise([start, *sorted(edges), end]):
        square = eta**2 if noisy[0] < math.exp(-0.5 * (a + b)) < noisy[1] else 0.0

        def rate(level, y, square=square):
            data = (1 + square) * math.exp(level - end) * (level - end) ** np.arange(degree)
            return np.array([-square * y[0], 2 * square * (1 - y[1]), *(data - square * y[2:])])

        state = solve_ivp(rate, (a, b), state, method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
    return state[0], math.sqrt(max(0.0, state[1])), state[2:]


def weights_of(eta: float, noisy, nodes, span) -> tuple[float, float, np.ndarray]:
    """As `moments`, the last as weights of D at the nodes: those that are right for every polynomial."""
    kept, fresh, added = moments(eta, noisy, *span, len(nodes))
    powers = (np.array(nodes) - span[1])[None, :] ** np.arange(len(nodes))[:, None]
    return kept, fresh, np.linalg.solve(powers, added)


@pytest.mark.parametrize("nodes", [(-0.4,), (-0.4, -0.8), (0.9, -0.4, -0.8), (-0.4, -0.8, -1.1, -1.9)])
@pytest.mark.parametrize("noisy", INTERVALS)
@pytest.mark.parametrize("eta", [0.6, 1.0, 1.7])
def test_a_step_is_the_sde_s_wherever_the_noise_begins_and_ends(eta, noisy, nodes):
    kept, fresh, weights = weights_of(eta, noisy, nodes, SPAN)
    assert share(eta, noisy).spread(*SPAN) == pytest.approx((kept, fresh), rel=1e-7, abs=1e-9)
    assert noisy_weights(share(eta, noisy), "exact", nodes, SPAN) == pytest.approx(weights, rel=1e-7)


@pytest.mark.parametrize("noisy", INTERVALS)
def test_the_midpoint_rule_puts_all_of_the_weight_in_the_middle(noisy):
    nodes, h = (-0.4, -0.7), SPAN[1] - SPAN[0]
    total = moments(1.0, noisy, *SPAN, 1)[2][0]
    wanted = [total * (1 + h / 0.6), -total * h / 0.6]
    assert noisy_weights(share(1.0, noisy), "midpoint", nodes, SPAN) == pytest.approx(wanted, rel=1e-8)


class Spread(Denoiser):
    """E[x_0 | x] of N(0.7, 0.5^2), in half log-SNR."""

    def forward(self, x_t, t, cond=None):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return 0.7 + 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * (x_t - 0.7 * alpha)


@pytest.mark.parametrize("path", [VP(), Karras(), Linear()], ids=str)
@pytest.mark.parametrize("noisy", [EVERYWHERE, (0.4, 2.1)], ids=str)
@pytest.mark.parametrize("points", [1, 2, 3, 4])
@pytest.mark.parametrize("corrector", [False, True])
def test_a_run_on_a_gaussian_is_the_exact_recursion(corrector, points, noisy, path):
    """Coefficients of the end on the start and on every draw; a corrected step has the noise it was predicted with."""
    levels = np.array([-1.2, -0.8, -0.5, 0.1, 0.4, 0.9, 1.3])
    grid = path.time_of(torch.tensor(levels, dtype=F64))
    alpha, sigma, steps = path.alpha(grid).numpy(), path.sigma(grid).numpy(), len(levels) - 1
    draws = np.eye(steps + 2)[:, 2:]
    x = np.eye(steps + 2)[:, 1]
    noises = iter(torch.tensor(draws.T[:, :, None]))
    drawn: list[int] = []

    def noise():
        drawn.append(len(drawn))
        return next(noises)

    field = Spread(path)
    found = integrate(Bound(field, grid=grid), torch.tensor(x)[:, None], grid, sa(points, corrector, noisy, 0.8), noise)

    values, before, used = [], x, -1
    for i, span in enumerate(pairwise(levels)):
        if i:
            values.insert(0, field(torch.tensor(x), grid[i]).numpy())
            if corrector:
                x = step(before, i - 1, values[: points + 1], levels[: i + 1][::-1][: points + 1], used)
        else:
            values.insert(0, field(torch.tensor(x), grid[0]).numpy())
        used = used + 1 if moments(0.8, noisy, *span, 1)[1] > 0 else used
        before = x

        def step(y, i, values, nodes, used):
            span = levels[i], levels[i + 1]
            kept, fresh, weights = weights_of(0.8, noisy, nodes, span)
            new = draws[:, used] if fresh > 0 else 0.0
            data = sum(w * v for w, v in zip(weights, values))
            return sigma[i + 1] * (kept * y / sigma[i] + fresh * new) + alpha[i + 1] * data

        x = step(x, i, values[:points], levels[: i + 1][::-1][:points], used)
    assert len(drawn) == used + 1
    assert found[:, 0].numpy() == pytest.approx(x, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("path", [VP(), VE(), Linear()], ids=str)
@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_without_noise_where_it_goes_it_is_the_method_of_the_ode(points, path):
    noise = path.prior_std * numbers(8, 2)
    denoiser, grid = mixture().denoiser(path), path.time_of(torch.linspace(-2.0, 3.0, 9, dtype=F64))
    plain = sample(denoiser, noise=noise, solver=sa(points, eta=0.0), grid=grid)
    for solver in (sa(points, eta=0.0, noisy=(0.05, 1.0)), sa(points, noisy=(1e3, 1e4))):
        x = sample(denoiser, noise=noise, solver=solver, grid=grid, seed=0)
        assert torch.allclose(x, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [(2, False, "midpoint"), (3, False, "exact"), (3, True, "exact")])
@pytest.mark.parametrize("path", [VP(), VE(), Linear()], ids=str)
def test_an_interval_that_covers_the_path_is_no_interval(path, settings):
    points, corrector, rule = settings
    inside, everywhere = (
        sample(mixture().denoiser(path), (8, 2), solver=sa(points, corrector, noisy, 0.7, rule), seed=3, dtype=F64)
        for noisy in ((1e-9, 1e60), EVERYWHERE)
    )
    assert torch.allclose(inside, everywhere, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 5.0])
def test_out_of_alpha_0_the_noise_is_what_is_kept_and_what_is_fresh(scale):
    """Between sigma / alpha = 3 and 1.5: `(1.5 / 3)^(eta^2)` of the noise is kept. The interval is not of the scale."""
    path, eta = Linear(), 0.8
    solver = Multistep(2, "data", "half-log-snr", eta=eta, scale=scale, noisy=(0.1, 3.0))
    x = torch.tensor([[1.0], [0.0]], dtype=F64)
    z = torch.tensor([[0.0], [1.0]], dtype=F64)
    s = torch.tensor(0.6, dtype=F64)  # alpha 0.4, sigma 0.6
    still = Spread(path)
    still.forward = lambda x_t, t, cond=None: torch.zeros_like(x_t)  # type: ignore[method-assign]
    moved = solver.step(Bound(still), x, torch.tensor(1.0, dtype=F64), s, None, lambda: z)[0]
    kept = 0.5 ** (eta**2)
    assert moved[:, 0].tolist() == pytest.approx([0.6 * kept, 0.6 * math.sqrt(1 - kept**2)], rel=1e-12)


@pytest.mark.parametrize("path", [VP(), VE(), Linear(), Karras()], ids=lambda path: type(path).__name__)
def test_the_error_is_of_second_order_wherever_in_a_step_the_noise_begins(path):
    """Its size depends on where: at eight times as many steps the largest of some errors is 64 times smaller, not 8."""
    counts = [50, 57, 63, 72, 80]

    def largest(solver, times=1):
        return max(weak_error(solver, path, [times * n for n in counts]))

    assert largest(sa(3, noisy=(0.5, 1.3))) > 32 * largest(sa(3, noisy=(0.5, 1.3)), 8)
    assert largest(sa(1, False, noisy=(0.5, 1.3))) < 10 * largest(sa(1, False, noisy=(0.5, 1.3)), 8)


class Copy:
    """A corrector that changes nothing but the tensor."""

    def correct(self, field, x, t, noise):
        return x.clone()


def test_noise_that_leaves_nothing_of_a_state():
    """eta = 20: what is kept of x is below the least float64 number, and the run is E[x_0] with noise."""
    law, path = mixture(), VP()
    solver = Multistep(2, "data", "half-log-snr", eta=20.0)
    for steps in (2, 3, 4):
        x = sample(law.denoiser(path), (200, 2), solver=solver, steps=steps, seed=0, dtype=F64)
        assert bool(torch.isfinite(x).all())
        assert float(x.norm(dim=1).max()) < 8


def test_a_state_that_came_from_elsewhere_is_not_corrected():
    denoiser = mixture().denoiser(Linear())
    runs = [
        sample(denoiser, (9, 2), solver=sa(3, corrector, (0.05, 1.0)), steps=12, seed=4, dtype=F64, corrector=other)
        for corrector, other in ((True, Copy()), (False, None), (True, None))
    ]
    assert torch.allclose(runs[0], runs[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(runs[0], runs[2], atol=1e-3)


def test_with_langevin_steps_between_the_law_is_kept():
    """Mean and standard deviation of 4,000 draws, within 5 standard errors and 2 %."""
    law, n = gaussian(), 4000
    x = sample(
        law.denoiser(VP()), (n, 3), solver="sa-3", steps=30, seed=2, dtype=F64,
        corrector=LangevinCorrector(0.1, rule="level"),
    )  # fmt: skip
    std = law.variances.flatten().sqrt()
    assert torch.allclose(x.mean(0), law.flat_mean.flatten(), atol=5 * float(std.max()) / n**0.5 + 0.01)
    assert torch.allclose(x.std(0), std, rtol=5 / (2 * n) ** 0.5 + 0.02)
