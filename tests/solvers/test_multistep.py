"""The multistep method: its weights against closed forms, its ends, its memory, its refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from solvers.measuring import F64, gaussian, mixture, numbers
from undiffuse.core.errors import ArgumentError
from undiffuse.fields import Denoiser
from undiffuse.oracles import GaussianMixture, exact_flow
from undiffuse.paths import VE, VP, Cosine, Karras, Linear, Path, Trig
from undiffuse.solvers import DDIM, Bound, LangevinCorrector, Multistep, Singlestep, integrate, make_grid, sample
from undiffuse.solvers.multistep import MULTISTEP
from undiffuse.solvers.polynomials import COORDINATES, flow_weights, lagrange, snr_weights, time_weights

HALF = 0.5 * math.pi


def angle(half_log_snr: float) -> float:
    return math.atan(math.exp(-half_log_snr))


def test_equal_steps_of_time_have_the_weights_of_adams_and_bashforth():
    # Hairer, Norsett and Wanner 1993, section III.1, eq. 1.5.
    nodes = (1.0, 1.1, 1.2, 1.3)
    assert time_weights(nodes[:2], (1.0, 0.9)) == pytest.approx([-0.15, 0.05], rel=1e-12)
    assert time_weights(nodes[:3], (1.0, 0.9)) == pytest.approx([-0.1 * w / 12 for w in (23, -16, 5)], rel=1e-12)
    assert time_weights(nodes, (1.0, 0.9)) == pytest.approx([-0.1 * w / 24 for w in (55, -59, 37, -9)], rel=1e-12)


def test_the_data_in_half_log_snr_have_the_phi_functions_of_dpm_solver_plus_plus():
    # integral of e^(lambda - lambda_s) (lambda - lambda_t)^k: 1 - e^-h, h - 1 + e^-h, h^2 - 2 h + 2 - 2 e^-h.
    h, before, sigma_s = 0.7, 0.4, math.sin(angle(0.9))
    alpha_s = math.cos(angle(0.9))
    nodes = tuple(angle(level) for level in (0.2, 0.2 - before, 0.2 - 3 * before))
    one, two, three = 1 - math.exp(-h), h - 1 + math.exp(-h), h * h - 2 * h + 2 - 2 * math.exp(-h)
    found = flow_weights(HALF, "exact", nodes, (nodes[0], angle(0.9)), COORDINATES["half-log-snr"])
    # Newton's form through 0, -b, -3 b: D + (D - D1) / b u + (D / 3 - D1 / 2 + D2 / 6) / b^2 u (u + b).
    squares = (three + before * two) / before**2
    wanted = [one + two / before + squares / 3, -two / before - squares / 2, squares / 6]
    assert [-sigma_s * w for w in found] == pytest.approx([alpha_s * w for w in wanted], rel=1e-11)
    two_m = flow_weights(HALF, "midpoint", nodes[:2], (nodes[0], angle(0.9)), COORDINATES["half-log-snr"])
    assert [-sigma_s * w for w in two_m] == pytest.approx(
        [alpha_s * one * (1 + h / (2 * before)), -alpha_s * one * h / (2 * before)], rel=1e-11
    )


@pytest.mark.parametrize("variable", COORDINATES)
@pytest.mark.parametrize("span", [(1.1, 0.4), (1.1, 0.002), (1.566, 1.0)])
@pytest.mark.parametrize("turn", [0.0, 0.3, 15 / 16, 1.0])
def test_weights_are_the_integrals_of_the_polynomials(turn, variable, span):
    phi, u = turn * HALF, COORDINATES[variable]
    nodes = (span[0], 0.5 * (span[0] + 1.568), 1.568)
    found = flow_weights(phi, "exact", nodes, span, u)
    places = [float(u(np.array(node))) for node in nodes]
    for j, weight in enumerate(found):
        others = [place for k, place in enumerate(places) if k != j]

        def integrand(theta, j=j, others=others):
            value = math.prod((float(u(np.array(theta))) - place) / (places[j] - place) for place in others)
            return value / math.cos(theta - phi) ** 2

        assert weight == pytest.approx(quad(integrand, *span, epsrel=1e-12, limit=500)[0], rel=1e-7)


@pytest.mark.parametrize("turn", [0.05, 0.5, 15 / 16])
def test_weights_from_end_to_end_of_the_path(turn):
    # From pure noise to pure data, m from tan(pi / 2 - phi) to tan(-phi): the largest span there is.
    phi = turn * HALF
    found = flow_weights(phi, "exact", (1.5, 1.57), (HALF, 0.0), COORDINATES["angle"])
    # integral of theta / cos(theta - phi)^2: theta tan(theta - phi) + log cos(theta - phi).
    first = HALF * math.tan(HALF - phi) + math.log(math.cos(HALF - phi)) - math.log(math.cos(phi))
    length = math.tan(HALF - phi) + math.tan(phi)
    wanted = [-(first - 1.57 * length) / (1.5 - 1.57), -(first - 1.5 * length) / (1.57 - 1.5)]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_the_noisy_weights_are_the_phi_functions_of_the_reverse_sde():
    kappa, h, before = 2.0, 0.6, 0.3
    nodes, span = (0.5, 0.5 - before), (0.5, 0.5 + h)
    one = 1 - math.exp(-kappa * h)
    two = h - one / kappa  # integral of kappa e^(kappa (u - h)) u
    assert snr_weights(kappa, nodes, span) == pytest.approx([one + two / before, -two / before], rel=1e-11)


@pytest.mark.parametrize("turn", [0.0, 0.5, 15 / 16, 1.0])
@pytest.mark.parametrize("path", [VP(), VE(), Linear(), Karras()], ids=str)
def test_one_point_is_ddim(path, turn):
    solver = Multistep(1, turn if turn not in (0.0, 1.0) else {0.0: "noise", 1.0: "data"}[turn], corrector=False)
    denoiser, x = mixture().denoiser(path), numbers(5, 2)
    t, s = path.time_of(torch.tensor([-0.7, 0.9], dtype=F64))
    for end in (s, torch.tensor(path.t_min, dtype=F64)):
        mine = solver.step(Bound(denoiser), x, t, end, None, None)[0]
        assert torch.allclose(mine, DDIM().step(denoiser, x, t, end, None, None)[0], rtol=1e-11, atol=1e-11)


def test_unipc_is_the_implicit_step_with_the_predicted_evaluation():
    # Data linear in lambda between the two ends of a step, integrated: phi functions by hand.
    path, x = VP(), numbers(5, 2)
    denoiser, levels = mixture().denoiser(path), torch.tensor([-0.5, 0.1], dtype=F64)
    grid = path.time_of(levels)
    solver = Multistep(1, "data", "half-log-snr")
    predicted, state = solver.step(Bound(denoiser), x, grid[0], grid[1], None, None)
    first, second = denoiser(x, grid[0]), denoiser(predicted, grid[1])
    h = float(levels[1] - levels[0])
    one, two = 1 - math.exp(-h), h - 1 + math.exp(-h)
    ratio, alpha_s = path.sigma(grid[1]) / path.sigma(grid[0]), path.alpha(grid[1])
    corrected = ratio * x + alpha_s * ((one - two / h) * first + two / h * second)
    # The next step is DDIM's from there, by the same evaluation.
    end = 0.9 * grid[1]
    q = path.alpha(grid[1]) * path.sigma(end) / (path.alpha(end) * path.sigma(grid[1]))
    wanted = path.sigma(end) / path.sigma(grid[1]) * corrected + path.alpha(end) * (1 - q) * second
    after, _ = solver.step(Bound(denoiser), predicted, grid[1], end, state, None)
    assert torch.allclose(after, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "path", [VP(), VE(), Linear(), Trig(), Cosine(), Karras()], ids=lambda path: type(path).__name__
)
def test_the_default_from_noise_to_data(path):
    # Measured at 15 and 30 steps: 2.8e-4 to 4e-4, 2e-5 to 5.2e-5.
    law = mixture()
    noise = path.prior_std * numbers(60, 2)
    truth = exact_flow(law.denoiser(path), noise, path.t_max, path.t_min)
    for steps, bound in ((8, 2e-2), (15, 6e-4), (30, 8e-5)):
        error = (sample(law.denoiser(path), noise=noise, steps=steps) - truth).norm(dim=1)
        assert float(error.median()) < bound


def test_the_scale_is_the_unit_of_the_data():
    small = mixture()
    large = GaussianMixture(3 * small.flat_means, 3 * small.variances.sqrt().flatten(), small.weights)
    narrow, wide = Karras(), Karras(sigma_min=0.006, sigma_max=240.0)
    noise = 80 * numbers(20, 2)
    grid = make_grid(narrow, 9, "curved-angle")
    a = sample(small.denoiser(narrow), noise=noise, solver=Multistep(scale=1.0), grid=grid)
    b = sample(large.denoiser(wide), noise=3 * noise, solver=Multistep(scale=3.0), grid=3 * grid)
    assert torch.allclose(3 * a, b, rtol=1e-9, atol=1e-9)
    assert Multistep().for_event((3, 32, 32)).scale == pytest.approx(0.18 * math.sqrt(3072))
    assert Multistep().for_event((2,)).scale == 1


def test_a_state_that_was_changed_between_steps_is_not_corrected_back():
    denoiser, noise = mixture().denoiser(VP()), numbers(20, 2)
    still, moved = (
        sample(denoiser, noise=noise, steps=12, seed=0, corrector=LangevinCorrector(snr=snr)) for snr in (1e-6, 0.3)
    )
    plain = sample(denoiser, noise=noise, solver=Multistep(corrector=False), steps=12)
    assert torch.allclose(still, plain, atol=1e-3)
    assert float((moved - plain).norm(dim=1).median()) > 0.05


@pytest.mark.parametrize("grid", ["karras", "half-log-snr", "time"])
def test_steps_that_grow_fast_are_not_followed_by_high_polynomials(grid):
    law, path = gaussian(), Karras()
    noise = path.prior_std * numbers(20, 3)
    truth = law.flow(path, noise, path.t_max, path.t_min)
    for steps in (5, 8):
        x = sample(law.denoiser(path), noise=noise, solver=Multistep(scale=1.0), steps=steps, grid=grid)
        assert float((x - truth).norm() / truth.norm()) < 1.2


def test_gradients_flow_through_a_run():
    denoiser, noise = mixture().denoiser(VP()), numbers(4, 2).requires_grad_()
    grid = torch.linspace(1.0, 0.0, 6, dtype=F64)
    out = integrate(denoiser, noise, grid, Multistep())
    (gradient,) = torch.autograd.grad(out.sum(), noise)
    step = 1e-6 * torch.ones_like(noise)
    with torch.no_grad():
        ahead, behind = (integrate(denoiser, noise + sign * step, grid, Multistep()) for sign in (1, -1))
    assert torch.allclose(gradient.sum(1), (ahead - behind).sum(1) / 2e-6, rtol=1e-5)


class Scripted(Denoiser):
    """Answers by the time alone, a number for each sample."""

    def __init__(self, path, answers):
        super().__init__(path)
        self.answers = answers

    def forward(self, x_t, t, cond=None):
        return self.answers[float(t)][:, None].expand_as(x_t)


def scripted(rows):
    """A field with the answers of each sample along seven times of a path, and these times."""
    path = VP()
    times = path.time_of(torch.linspace(-1.0, 2.0, 7, dtype=F64))
    return Scripted(path, dict(zip(times.tolist(), torch.tensor(rows, dtype=F64).T))), times


def walked(solver, field, times, steps, x):
    """The states of a run."""
    states, state, bound = [x], None, Bound(field)
    for i in range(steps):
        x, state = solver.step(bound, states[-1], times[i], times[i + 1], state, None)
        states.append(x)
    return states


CAREFUL = Multistep(3, "data", "angle", corrector=False, scale=1.0, miss=0.5)


def test_a_step_follows_as_many_evaluations_as_told_the_newest():
    field, times = scripted([[0.0] * 7] * 5)
    theta = field.path.angle(times)
    line, square = 1 + 2 * theta, 3 * theta**2
    bent = line.clone()
    bent[0] += 40.0  # the parabola through the first three misses the fourth, the line through two does not
    rows = [square, torch.full((7,), 1.0, dtype=F64), torch.full((7,), 1.0, dtype=F64), bent, line]
    rows[1][3], rows[2][3] = 1.99, 2.02  # missed by 0.497 and 0.505 of the newest
    field, times = scripted(torch.stack(rows).tolist())
    states = walked(CAREFUL, field, times, 4, numbers(5, 2))
    for sample_, count in enumerate((3, 3, 1, 2, 3)):
        plain = replace(CAREFUL, points=count, miss=None)
        state, bound = None, Bound(field)
        for i in range(4):  # along the same states, with the memory of a plain method of that many points
            x, state = plain.step(bound, states[i], times[i], times[i + 1], state, None)
        assert torch.allclose(x[sample_], states[4][sample_], rtol=1e-12, atol=1e-12), sample_
    usual = walked(replace(CAREFUL, miss=None), field, times, 4, numbers(5, 2))[-1]
    assert float((usual - states[4])[2:4].abs().min()) > 1e-2


def test_what_is_a_miss_is_told_by_the_newest_evaluations():
    """Large ones that are past make no allowance: the sixth misses the line of those before by 2 of 3."""
    field, times = scripted([[100.0, 100.0, 1.0, 1.0, 1.0, 3.0, 3.0]])
    careful = walked(CAREFUL, field, times, 6, numbers(1, 1))
    one, state, bound = replace(CAREFUL, points=1, miss=None), None, Bound(field)
    for i in range(6):
        x, state = one.step(bound, careful[i], times[i], times[i + 1], state, None)
    assert torch.allclose(x, careful[6], rtol=1e-12, atol=1e-12)


def test_what_was_predicted_with_care_is_corrected_as_ever():
    """Answers do not heed x, so the corrected states are those of a run that follows all; so is the step from them."""
    careful = replace(CAREFUL, corrector=True)
    row = torch.ones(7, dtype=F64)
    field, times = scripted([row.tolist()] * 3)
    theta = field.path.angle(times)
    rows = torch.stack([row, row, 1 + theta])
    rows[0, 3] = 9.0
    known = lagrange(theta[1:4].flip(0).tolist(), theta[4:5].numpy())[:, 0]
    rows[:, 4] = rows[:, 1:4].flip(1) @ torch.from_numpy(known)  # told exactly
    field, times = scripted(rows.tolist())
    some, all_ = (walked(solver, field, times, 5, numbers(3, 2)) for solver in (careful, replace(careful, miss=None)))
    assert float((some[4] - all_[4])[0].abs().min()) > 1e-2
    assert torch.allclose(some[4][1:], all_[4][1:], rtol=1e-12, atol=1e-12)
    assert torch.allclose(some[5], all_[5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"rule": "exct"}, {"shares": (1.5,)}, {"shares": ()}, {"shares": (0.6, 0.3)}])
def test_settings_of_single_steps_out_of_range(settings):
    with pytest.raises(ArgumentError):
        Singlestep(**settings)


@pytest.mark.parametrize("name", MULTISTEP)
def test_the_names_are_settings(name):
    assert isinstance(MULTISTEP[name](), Multistep)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"points": 0}, "1 to 8"),
        ({"points": 2.5}, "1 to 8"),
        ({"points": True}, "1 to 8"),
        ({"prediction": None}, "0 (noise) to 1 (data)"),
        ({"prediction": "velocity", "rule": "mean"}, "expected 'exact'"),
        ({"prediction": "dta"}, "Did you mean 'data'"),
        ({"prediction": 1.5}, "0 (noise) to 1 (data)"),
        ({"variable": "lambda"}, "unknown variable"),
        ({"rule": "exct"}, "Did you mean 'exact'"),
        ({"variable": "step"}, "rule 'mean'"),
        ({"eta": -1.0}, "expected 0"),
        ({"eta": 1.0}, "for prediction 'data' in 'half-log-snr'"),
        ({"noisy": (1.0, 0.05)}, "0 <= low < high"),
        ({"noisy": (-1.0, 1.0)}, "0 <= low < high"),
        ({"noisy": (0.5,)}, "0 <= low < high"),
        ({"scale": 0.0}, "spread of the data"),
        ({"miss": 0.0}, "a share above 0"),
        ({"miss": 0.5, "variable": "time"}, "not for the variables"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ArgumentError, match=words.replace("(", r"\(").replace(")", r"\)")):
        Multistep(**settings)


@pytest.mark.parametrize("solver", ["deis-3", "abm-4", "unipc-2"])
def test_a_path_that_learns_is_seen_as_it_is_now(solver):
    """The same angles at other times: weights of the path as it was before are no use."""

    class Learning(Path):
        t_high = 0.999

        def __init__(self, power):
            self.power = power

        def alpha(self, t):
            return 1 - t**self.power

        def sigma(self, t):
            return t**self.power

        def _time_of_pair(self, a, b):
            return (b / (a + b)) ** (1 / self.power)

    path, noise = Learning(1.0), numbers(4, 2)
    for path.power in (1.0, 0.5):
        changed, new = (
            sample(mixture().denoiser(p), noise=noise, solver=solver, steps=6) for p in (path, Learning(path.power))
        )
        assert torch.equal(changed, new)
