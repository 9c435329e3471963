"""Adaptive integration: the pairs' order conditions, scipy's work, and that no sample knows of the others."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from solvers.measuring import F64, mixture, numbers
from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.fields import Denoiser, on_path
from undiffuse.oracles import Gaussian, exact_flow
from undiffuse.paths import VP, Linear
from undiffuse.solvers import Adaptive, Bound, sample
from undiffuse.solvers.adaptive import Tolerance, solve
from undiffuse.solvers.flow import Flow, flow, score_at
from undiffuse.solvers.pairs import PAIRS
from worlds import PATHS

SCIPY = {"dopri5": "RK45", "bosh3": "RK23"}


def conditions(a: np.ndarray, c: np.ndarray, order: int, u: float = 1.0) -> list[tuple[np.ndarray, float]]:
    """Of each rooted tree up to the order, what the weights must sum it to at a share u of the step."""
    one, ac = np.ones_like(c), a @ c
    trees = [
        [(one, 1)],
        [(c, 2)],
        [(c**2, 3), (ac, 6)],
        [(c**3, 4), (c * ac, 8), (a @ c**2, 12), (a @ ac, 24)],
        [
            (c**4, 5), (c**2 * ac, 10), (ac**2, 20), (c * (a @ c**2), 15), (a @ c**3, 20), (c * (a @ ac), 30),
            (a @ (c * ac), 40), (a @ (a @ c**2), 60), (a @ (a @ ac), 120),
        ],
    ]  # fmt: skip
    return [(tree, u ** (k + 1) / gamma) for k, level in enumerate(trees[:order]) for tree, gamma in level]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_meets_the_order_conditions_of_all_its_three_parts(name):
    pair = PAIRS[name]
    a = np.zeros((pair.stages, pair.stages))
    for i, row in enumerate(pair.a, 1):
        a[i, : len(row)] = row
    c, b, e = a.sum(1), a[-1], np.array(pair.e)
    assert np.allclose(c, pair.c, atol=1e-14)
    assert c[-1] == pytest.approx(1, abs=2e-14)
    for tree, wanted in conditions(a, c, pair.order):
        assert b @ tree == pytest.approx(wanted, abs=2e-14)
    short = [abs((b - e) @ tree - wanted) for tree, wanted in conditions(a, c, pair.order)]
    lower = len(conditions(a, c, pair.order - 1))
    assert max(short[:lower]) < 2e-14
    assert max(short[lower:]) > 1e-4
    for u in (0.3, 0.8, 1.0):
        between = pair.between(torch.tensor([u], dtype=F64))[0].numpy()
        for tree, wanted in conditions(a, c, pair.order_between, u):
            assert between @ tree == pytest.approx(wanted, abs=2e-14)
    assert np.allclose(pair.between(torch.ones(1, dtype=F64))[0].numpy(), b, atol=2e-14)


@pytest.mark.parametrize("name", PAIRS)
def test_a_single_step_errs_by_the_order_it_declares(name):
    law, path = mixture(), VP()
    way, pair = Flow(Bound(law.denoiser(path)), (30, 2)), PAIRS[name]
    y = numbers(30, 2)
    errors = []
    for h in (0.1, 0.05):
        one = solve(way, y, 1.0, 1.0 - h, pair, Tolerance(1e6), first=(None, torch.full((30,), h, dtype=F64)))
        fine = solve(way, y, 1.0, 1.0 - h, PAIRS["dopri5"], Tolerance(1e-13, 1e-13))
        assert one.steps.tolist() == [1] * 30
        errors.append(float((one.y - fine.y).square().mean().sqrt()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(pair.order + 1, abs=0.35)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
@pytest.mark.parametrize("name", SCIPY)
def test_the_work_is_scipy_s(name, tolerance):
    law, path = mixture(), Linear()
    z = numbers(8, 2, seed=3)
    x, solution, way = flow(
        law.denoiser(path), z, 1.0, 0.0, pair=PAIRS[name], tolerance=Tolerance(tolerance, tolerance)
    )
    for i, row in enumerate(z):

        def slope(theta, y):
            one = torch.tensor(y, dtype=F64)[None]
            return way(torch.tensor([theta], dtype=F64), one, torch.tensor([0]))[0].numpy()

        peer = solve_ivp(slope, (math.pi / 2, 0.0), row.numpy(), SCIPY[name], rtol=tolerance, atol=tolerance)
        assert int(solution.evals[i]) == pytest.approx(peer.nfev, rel=0.1)
        assert np.allclose(x[i].numpy(), peer.y[:, -1], atol=20 * tolerance)


@pytest.mark.parametrize("path", ["vp", "ve", "sub-vp", "cosine", "linear", "karras", "ncsn-table"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_flow_is_followed_to_the_tolerance(name, path):
    law, on = mixture(), PATHS[path]
    noise = on.prior_std * numbers(20, 2, seed=1)
    x = sample(law.denoiser(on), noise=noise, solver=Adaptive(name, 1e-7, 1e-7))
    exact = exact_flow(law.denoiser(on), noise, on.t_max, on.t_min)
    assert float((x - exact).abs().max()) < 1e-5


def test_a_sample_does_not_know_who_shares_its_batch():
    law, path = mixture(), VP()
    noise = numbers(256, 2, seed=5)
    whole = sample(law.denoiser(path), noise=noise, solver="dopri5", return_info=True)
    for i in (0, 17, 255):
        alone = sample(law.denoiser(path), noise=noise[i : i + 1], solver="dopri5", return_info=True)
        assert float((alone.x - whole.x[i : i + 1]).abs().max()) < 1e-12
        assert int(alone.nfe_each) == int(whole.nfe_each[i])
    assert int(whole.nfe_each.min()) < int(whole.nfe_each.max()) == whole.nfe


class Counting(Denoiser):
    """A denoiser that counts rows by time."""

    def __init__(self, inner, t_low=None):
        super().__init__(inner.path)
        self.inner, self.low, self.rows, self.times = inner, t_low, 0, []

    @property
    def t_low(self):
        return self.path.t_min if self.low is None else self.low

    def forward(self, x_t, t, cond=None):
        return self.estimate(x_t, t, cond)[0]

    def estimate(self, x_t, t, cond=None):
        self.rows += len(x_t)
        self.times.append(float(torch.as_tensor(t).min()))
        return self.inner.estimate(x_t, t, cond)


def test_evaluations_are_counted_sample_by_sample():
    field = Counting(mixture().denoiser(Linear()))
    ran = sample(field, (40, 2), solver="tsit5", seed=2, dtype=F64, return_info=True)
    assert int(ran.nfe_each.sum()) == field.rows
    assert ran.nfe == len(field.times)
    plain = sample(field, (4, 2), solver="heun", steps=5, seed=2, dtype=F64, return_info=True)
    assert plain.nfe_each.tolist() == [plain.nfe] * 4


def test_no_model_is_asked_below_its_lowest_time_and_the_end_is_closed():
    law, path = Gaussian(torch.zeros(3, dtype=F64), std=torch.tensor([1.0, 0.5, 0.2], dtype=F64)), Linear()
    field = Counting(law.denoiser(path), t_low=0.05)
    z = numbers(6, 3)
    x = sample(field, noise=z, solver=Adaptive(rtol=1e-9, atol=1e-9))
    assert min(field.times) >= 0.05 - 1e-12
    # x at t = 0.05 is sqrt(alpha^2 s^2 + sigma^2) z, and E[x_0 | x] = alpha s^2 / (alpha^2 s^2 + sigma^2) x.
    s2 = torch.tensor([1.0, 0.25, 0.04], dtype=F64)
    v = 0.95**2 * s2 + 0.05**2
    assert torch.allclose(x, 0.95 * s2 / v.sqrt() * z, atol=1e-7)


def test_the_lowest_time_of_a_model_on_another_path():
    field = Counting(mixture().denoiser(Linear()), t_low=0.1)
    moved = on_path(field, VP())
    angle = float(VP().angle(torch.tensor(moved.t_low, dtype=F64)))
    assert angle == pytest.approx(math.atan2(0.1, 0.9), rel=1e-9)
    assert on_path(mixture().denoiser(Linear()), VP()).t_low == 0


def test_the_times_of_a_grid_are_visited_and_little_is_paid_for_them():
    law, path = mixture(), VP()
    z = numbers(10, 2, seed=4)
    grid = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0], dtype=F64)
    solver = Adaptive(rtol=1e-7, atol=1e-7)
    ran = sample(law.denoiser(path), noise=z, solver=solver, grid=grid, return_info=True)
    for t, state, denoised in zip(grid[1:], ran.trajectory[1:], ran.denoised):
        exact = exact_flow(law.denoiser(path), z, 1.0, t)
        assert float((state - exact).abs().max()) < 1e-5
        assert float((denoised - law.denoiser(path)(state, t)).abs().max()) < 1e-7
    straight = sample(law.denoiser(path), noise=z, solver=solver, return_info=True)
    assert float(ran.nfe_each.double().mean()) < float(straight.nfe_each.double().mean()) + 3 * 6 + 1


def test_a_corrector_s_move_is_not_forgotten():
    """A state that something else moved starts from its own slope, not from that of where it was."""

    class Shift:
        def correct(self, field, x, t, noise):
            return x + 0.1

    law, path = mixture(), VP()
    z, grid = numbers(5, 2), torch.tensor([1.0, 0.5, 0.0], dtype=F64)
    solver = Adaptive(rtol=1e-9, atol=1e-9)
    x = sample(law.denoiser(path), noise=z, solver=solver, grid=grid, corrector=Shift())
    middle = exact_flow(law.denoiser(path), z, 1.0, 0.5) + 0.1
    assert float((x - exact_flow(law.denoiser(path), middle, 0.5, 0.0)).abs().max()) < 1e-7


@pytest.mark.parametrize("name", PAIRS)
def test_between_the_steps_the_solution_is_known(name):
    law, path = mixture(), Linear()
    z, tolerance = numbers(12, 2, seed=6), Tolerance(1e-6, 1e-6)
    solution = flow(law.denoiser(path), z, 1.0, 0.0, pair=PAIRS[name], tolerance=tolerance, keep=True)[1]
    worst = 0.0
    for theta in np.linspace(0.01, 1.56, 7):
        t = path.time_of_angle(torch.tensor(theta, dtype=F64))
        exact = exact_flow(law.denoiser(path), z, 1.0, t) / torch.hypot(path.alpha(t), path.sigma(t))
        worst = max(worst, float((solution.at(theta) - exact).abs().max()))
    assert worst < 1e-4
    assert torch.allclose(solution.at(math.pi / 2), z, atol=1e-12)
    with pytest.raises(ArgumentError, match="position 2 is outside"):
        solution.at(2.0)


def test_another_measure_of_a_step_s_error_shortens_it_too():
    """It is given the end of the step: where, the state, its slope there, and the error."""
    y, seen = torch.ones(3, 2, dtype=F64), []

    def slope(t, y, rows):
        return torch.cos(t)[:, None] * y

    def also(t, y, k, miss):
        assert torch.allclose(k, slope(t, y, None), rtol=1e-12)
        seen.append(miss.abs().amax())
        return miss.square().mean(1).sqrt() * 1e10

    def ran(tolerance):
        return solve(slope, y, 0.0, 2.0, PAIRS["dopri5"], tolerance)

    loose, both, strict = ran(Tolerance(0.0, 1e-6)), ran(Tolerance(0.0, 1e-6, also=also)), ran(Tolerance(0.0, 1e-10))
    assert len(seen) > 0
    assert int(loose.steps.max()) < 0.4 * int(both.steps.min())
    assert both.steps.tolist() == pytest.approx(strict.steps.tolist(), abs=1)
    assert torch.allclose(both.y, torch.full_like(y, math.exp(math.sin(2.0))), atol=1e-8)


def test_steady_steps_heed_the_error_before():
    """Of dy/dt = t^4 a step of dopri5 has the error (h / h_1)^5; the plain rule, whose step is 0.9 h_1, tells h_1."""
    y, first = torch.zeros(1, 1, dtype=F64), torch.full((1,), 1e-3, dtype=F64)

    def lengths(steady):
        tolerance = Tolerance(0.0, 1e-9, steady=steady)
        ran = solve(
            lambda t, y, rows: t[:, None] ** 4, y, 0.0, 1.0, PAIRS["dopri5"], tolerance, first=(None, first), keep=True
        )
        return ran.track.length.tolist()[:-1]

    unit = lengths(False)[-1] / 0.9
    steady = lengths(True)
    errors = [1.0, *((h / unit) ** 5 for h in steady)]
    assert len(steady) > 5
    assert max(errors[1:]) < 1
    for now, (h, following) in enumerate(itertools.pairwise(steady), 1):
        before = max(errors[now - 1], 1e-4)
        growth = 0.9 * errors[now] ** (-0.7 / 5) * before ** (0.3 / 5)
        assert following == pytest.approx(h * min(growth, 10.0), rel=1e-6)


@pytest.mark.parametrize("path", [VP(), Linear()], ids=["vp", "linear"])
def test_what_a_move_adds_to_the_log_density_is_its_product_with_the_score(path):
    """Differences of the exact law's log-density, in units of `x / n`."""
    law, way = mixture(), Flow(Bound(mixture().denoiser(path)), (20, 2))
    y, move = numbers(20, 2), numbers(20, 2, seed=1)
    t = torch.tensor(0.3, dtype=F64)
    theta, n = path.angle(t).expand(20), torch.hypot(path.alpha(t), path.sigma(t))
    log_prob = law.perturbed(path, 0.3).log_prob
    exact = (log_prob(n * (y + 1e-5 * move)) - log_prob(n * (y - 1e-5 * move))) / 2e-5
    score = score_at(theta, y, way(theta, y, torch.arange(20)))
    assert torch.allclose((score * move).sum(1), exact, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_the_steps():
    law, path = mixture(), Linear()
    z = numbers(3, 2, seed=8).requires_grad_()
    tolerance = Tolerance(1e-10, 1e-10)
    x = flow(law.denoiser(path), z, 1.0, 0.0, pair=PAIRS["dopri5"], tolerance=tolerance)[0]
    (slope,) = torch.autograd.grad(x[:, 0].sum(), z)
    with torch.no_grad():
        for j in range(2):
            move = torch.zeros(1, 2, dtype=F64)
            move[0, j] = 1e-5
            ends = [exact_flow(law.denoiser(path), z + sign * move, 1.0, 0.0)[:, 0] for sign in (1, -1)]
            assert torch.allclose(slope[:, j], (ends[0] - ends[1]) / 2e-5, atol=1e-6)


def test_a_model_that_answers_nan_is_named_at_once():
    class Broken(Denoiser):
        def forward(self, x_t, t, cond=None):
            return torch.where(torch.arange(len(x_t))[:, None] == 1, torch.nan, x_t)

    with pytest.raises(SamplingError, match=r"NaN at the start in 1 of 3 samples \(first: 1\)"):
        sample(Broken(VP()), (3, 2), solver="dopri5", seed=0, dtype=F64)

    class Later(Denoiser):
        def forward(self, x_t, t, cond=None):
            return x_t * torch.where(torch.as_tensor(t) < 0.5, torch.nan, 0.1).reshape(-1, 1)

    with pytest.raises(SamplingError, match="fell below rounding"):
        sample(Later(VP()), (3, 2), solver="dopri5", seed=0, dtype=F64)


def test_an_answer_of_another_shape_is_refused():
    class Narrow(Denoiser):
        def forward(self, x_t, t, cond=None):
            return x_t[:, :1]

        def estimate(self, x_t, t, cond=None):
            return x_t[:, :1], x_t[:, :1]

    with pytest.raises(ArgumentError, match="returned shape"):
        sample(Narrow(VP()), (3, 2), solver="dopri5", seed=0, dtype=F64)


def test_a_tolerance_that_cannot_be_met_says_how_far_it_came():
    class Rough(Denoiser):
        def forward(self, x_t, t, cond=None):
            wave = torch.sign(torch.sin(1e5 * torch.as_tensor(t, dtype=F64)))
            return torch.zeros_like(x_t) + wave.reshape(-1, *[1] * (x_t.ndim - 1)) * 5

    field = Rough(VP())
    with pytest.raises(
        SamplingError, match=r"cannot be met: 40 steps were tried for 3 of 3 samples; sample \d came to t"
    ):
        sample(field, (3, 2), solver=Adaptive(rtol=1e-9, atol=1e-9, max_steps=40), seed=0, dtype=F64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rtol": -1.0}, "expected tolerances >= 0"),
        ({"rtol": 0.0, "atol": 0.0}, "one of them above"),
        ({"max_steps": 0}, "at least one step"),
        ({"method": "dopri6"}, "Did you mean 'dopri5'"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    with pytest.raises(ArgumentError, match=message):
        replace(Adaptive(), **change)
