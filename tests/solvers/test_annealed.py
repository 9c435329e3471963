"""Annealed Langevin dynamics against exact recursions of a Gaussian's moments, published steps, and a mixture."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from solvers.measuring import F64, gaussian, inner_grid, moments_after, numbers
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.oracles import Gaussian, GaussianMixture
from undiffuse.paths import VE, VP, Karras, Linear, Tabulated
from undiffuse.paths.levels import geometric_levels
from undiffuse.solvers import DDIM, Bound, integrate, make_grid, sample
from undiffuse.solvers.annealed import (
    AnnealedLangevin,
    langevin_step,
    nearest_step,
    noise_variance,
    settled_step,
    settled_variance,
)
from worlds import PATHS


def levels_of(path, grid):
    return (path.sigma(grid) / path.alpha(grid)).tolist()


def recursion(law, path, grid, steps, eta, mean, variance):
    """Mean and variance of x / alpha after Langevin on `N(m, C + l^2)` at every level, in closed form.

    `y + eta grad log p_l(y) + sqrt(2 eta) z` with the score `-(y - m) / V`, V = C + l^2: after K steps the mean keeps
    `a = (1 - eta / V)^K` of its distance from m and the variance `a^2` of its distance from `V / (1 - eta / (2 V))`.
    """
    previous = None
    for level in levels_of(path, grid):
        if level == 0:
            break
        size, spread = eta(level, previous), law.variances + level**2
        kept, settled = (1 - size / spread) ** steps, spread / (1 - size / (2 * spread))
        mean = law.flat_mean + kept * (mean - law.flat_mean)
        variance = settled + kept**2 * (variance - settled)
        previous = level
    return mean, variance


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("rule", ["delta", "settled"])
@pytest.mark.parametrize("path", ["vp", "karras", "trig", "ncsn-table", "ve"])
def test_a_gaussian_keeps_to_the_exact_recursion(path, rule, steps):
    path, law = PATHS[path], gaussian()
    ends = path.sigma(torch.tensor(path.t_low, dtype=F64)) / path.alpha(torch.tensor(path.t_low, dtype=F64))
    inner = path.time_of(-torch.linspace(math.log(3.0), math.log(1.3 * float(ends)), 7, dtype=F64))
    grid = inner if float(path.sigma(torch.tensor(path.t_min, dtype=F64))) > 0 else torch.cat([inner, inner[:1] * 0])
    levels = levels_of(path, inner)
    ratio = levels[0] / levels[1]
    delta = 0.17 * float(ends) ** 2
    solver = AnnealedLangevin(steps, delta if rule == "delta" else None, denoise=False)

    def eta(level, previous):
        return delta * level**2 / float(ends) ** 2 if rule == "delta" else settled_step(ratio, steps) * level**2

    start_mean, start_variance = law.flat_mean + 0.3, law.variances * 2 + 5.0
    alpha, alpha_end = float(path.alpha(grid[0])), float(path.alpha(grid[-1]))
    mean, variance = moments_after(solver, path, grid, alpha * start_mean, alpha**2 * start_variance)
    expected = recursion(law, path, grid, steps, eta, start_mean, start_variance)
    assert torch.allclose(mean, alpha_end * expected[0], rtol=1e-9)
    assert torch.allclose(variance, alpha_end**2 * expected[1], rtol=1e-9)


def test_the_last_step_is_tweedie_s():
    law, path, x = gaussian(), Karras(), numbers(6, 3)
    grid, delta = torch.tensor([0.5, 0.2, 0.0], dtype=F64), 0.1 * path.sigma_min**2
    draws = [numbers(6, 3, seed=k) for k in range(4)]
    noisy, clean = (
        integrate(law.denoiser(path), x, grid, AnnealedLangevin(2, delta, denoise=d), iter(draws).__next__)
        for d in (False, True)
    )
    assert torch.allclose(clean, law.denoiser(path)(noisy, torch.tensor(0.2, dtype=F64)))
    assert float((clean - noisy).abs().max()) > 0.01


@pytest.mark.parametrize("path", ["vp", "karras", "linear"])
def test_the_snr_rule_is_score_sde_s_in_x_itself(path):
    # Song et al. 2021, algorithm 4, for each sample: eta = 2 (snr |z| / |s|)^2, x + eta s + sqrt(2 eta) z.
    path, law = PATHS[path], Gaussian(torch.zeros(50, dtype=F64), std=0.5)
    t = path.time_of(torch.tensor(0.2, dtype=F64))
    denoiser, z = law.denoiser(path), numbers(7, 50, seed=1)
    x = law.perturbed(path, t).sample(7, torch.Generator().manual_seed(2))
    score = law.perturbed(path, t).score(x)
    eta = 2 * (0.16 * z.norm(dim=1) / score.norm(dim=1)) ** 2
    expected = x + eta[:, None] * score + (2 * eta).sqrt()[:, None] * z
    solver, end = AnnealedLangevin(1, snr=0.16, denoise=False), torch.tensor(path.t_min, dtype=F64)
    moved = solver.step(denoiser, x, t, end, None, lambda: z)[0] * path.alpha(t)
    assert torch.allclose(moved, expected, rtol=1e-9)
    # A sample's step is its own.
    alone = solver.step(denoiser, x[3:4], t, end, None, lambda: z[3:4])[0] * path.alpha(t)
    assert torch.allclose(alone, expected[3:4], rtol=1e-9)


def test_the_snr_rule_stays_below_the_level_where_the_score_vanishes():
    class Identity(Denoiser):
        def forward(self, x_t, t, cond=None):
            return x_t

    z = numbers(2, 3)
    solver, path = AnnealedLangevin(1, snr=0.2, denoise=False), Karras()
    t, end = torch.tensor(0.5, dtype=F64), torch.tensor(0.0, dtype=F64)
    moved = solver.step(Identity(path), torch.ones(2, 3, dtype=F64), t, end, None, lambda: z)[0]
    assert torch.allclose(moved, 1 + 0.5 * math.sqrt(2) * z)


@pytest.mark.parametrize(
    ("largest", "n", "steps", "published"),
    [(50, 232, 5, 6.2e-6), (90, 500, 5, 3.3e-6), (190, 1086, 3, 1.8e-6), (348, 2311, 3, 0.9e-6)],
)
def test_technique_4_gives_the_published_steps(largest, n, steps, published):
    # NCSNv2's settings of CIFAR-10, CelebA, LSUN bedroom and FFHQ, printed with two digits or one.
    delta = langevin_step(geometric_levels(0.01, largest, n), steps)
    assert delta == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("ratio", [1.04, 1.3, 2.5])
def test_the_chosen_steps_are_the_best_of_the_exact_recursion(ratio, steps):
    def after(r, levels):
        """Variance at the last of `levels` levels over its level squared, for a law that is a point, term by term."""
        variance = ratio**2
        for _ in range(levels):
            for _ in range(steps):
                variance = (1 - r) ** 2 * variance + 2 * r
            last, variance = variance, variance * ratio**2
        return last

    best = nearest_step(ratio, steps)
    assert after(best, 1) == pytest.approx(noise_variance(best, ratio, steps), rel=1e-12)
    assert after(best, 1) < min(after(0.999 * best, 1), after(1.001 * best, 1))
    assert steps > 1 or best == pytest.approx(1 - ratio**-2)
    best = settled_step(ratio, steps)
    assert after(best, 400) == pytest.approx(settled_variance(best, ratio, steps), rel=1e-9)
    assert after(best, 400) < min(
        after(0.97 * best, 400), after(1.03 * best, 400), after(nearest_step(ratio, steps), 9)
    )
    levels = 0.01 * ratio ** torch.arange(9, dtype=F64)
    assert langevin_step(levels, steps, settled=True) == pytest.approx(best * 1e-4)
    if steps == 1:
        assert best == pytest.approx(math.sqrt(1 - ratio**-2))
        assert settled_variance(best, ratio, 1) == pytest.approx(1 + best)


def test_too_small_a_step_never_settles():
    # (1 - r)^(2 K) gamma^2 > 1: the noise of the widest level stays.
    assert settled_variance(0.01, 1.5, 3) == math.inf


def test_with_a_fixed_step_more_levels_reach_a_bias_and_stay():
    # Direction by direction, after ever more levels the variance is V / (1 - r l^2 / (2 V)), the chain's own.
    path, law, r = Karras(), gaussian(), 0.2
    solver = AnnealedLangevin(2, r * path.sigma_min**2)
    assert solver.order == 0
    truth = law.perturbed(path, inner_grid(path, 1)[-1]).variances
    settled = truth / (1 - r * path.sigma(inner_grid(path, 1)[-1]) ** 2 / (2 * truth))
    errors = []
    for count in (400, 1600):
        grid = inner_grid(path, count)
        start = law.perturbed(path, grid[0])
        _, variance = moments_after(solver, path, grid, start.flat_mean, start.variances)
        errors.append((variance - settled) / settled)
    assert bool((settled > 1.004 * truth).all())
    assert torch.allclose(errors[0] / errors[1], torch.full((3,), 4.0, dtype=F64), rtol=0.15)


def test_two_distant_modes_keep_their_weights():
    # Two points 8 standard deviations apart, 0.8 and 0.2. Langevin at the smallest level alone keeps the modes that
    # the start fell into, half and half. 6,000 chains: 0.02 is nearly 4 standard errors, and the seed is fixed.
    law = GaussianMixture(torch.tensor([[-2.0], [2.0]]), torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2]))
    path = Karras(sigma_min=0.1, sigma_max=10.0)
    solver, n = AnnealedLangevin(8, delta=0.25 * 0.1**2), 6000
    annealed = sample(law.denoiser(path), (n, 1), solver=solver, steps=100, seed=0)
    assert float((annealed < 0).float().mean()) == pytest.approx(0.8, abs=0.02)
    for mode, members in ((-2.0, annealed[annealed < 0]), (2.0, annealed[annealed > 0])):
        assert float(members.mean()) == pytest.approx(mode, abs=0.1)
        assert float(members.std()) == pytest.approx(0.5, abs=0.05)
    start = Streams.of(1, n).normal((n, 1))
    alone, grid = replace(solver, steps_per_level=500), torch.tensor([0.1, 0.0])
    plain = sample(law.denoiser(path), noise=start, solver=alone, grid=grid, seed=0)
    assert abs(float((plain < 0).float().mean()) - 0.8) > 0.15


@pytest.mark.parametrize("steps", [1, 2, 9, 30])
def test_its_own_grid_is_made_of_the_levels_of_a_chain(steps):
    table = geometric_levels(0.01, 30.0, 30)
    path = Tabulated.from_sigmas(table)
    grid = AnnealedLangevin().default_grid(path, steps)
    assert (len(grid), float(grid[0]), float(grid[-1])) == (steps + 1, 1.0, 0.0)
    place = grid[:-1] * 30
    assert torch.allclose(place, place.round(), atol=1e-9)
    if steps > 1:
        assert float(grid[-2]) == pytest.approx(1 / 30)
        ratios = torch.tensor(levels_of(path, grid[:-1]), dtype=F64).log().diff()
        assert float(ratios.min() / ratios.max()) < 1.4  # equal, but for the nearest whole level
    # A chain of other levels: still its own, no two alike.
    ddpm = PATHS["ddpm-table"]
    for count in (steps, 500, 1000):
        own = AnnealedLangevin().default_grid(ddpm, count)[:-1] * 1000
        assert torch.allclose(own, own.round(), atol=1e-9)
        assert len(own.round().unique()) == count


def test_more_steps_than_levels_lie_between_them():
    path = Tabulated.from_sigmas(geometric_levels(0.01, 30.0, 30))
    assert torch.equal(AnnealedLangevin().default_grid(path, 59), make_grid(path, 59, "half-log-snr"))
    assert torch.equal(AnnealedLangevin().default_grid(VP(), 20), make_grid(VP(), 20, "half-log-snr"))


def test_every_level_is_run_from_the_prior_of_the_widest():
    # What the pseudo-code of the reference leaves out: it starts from N(0, I) and stops at the level before the last.
    path, seen = Tabulated.from_sigmas(geometric_levels(0.01, 30.0, 8)), []

    class Watching(Denoiser):
        def forward(self, x_t, t, cond=None):
            seen.append((float(self.path.sigma(t.double())), float(x_t.std())))
            return 0 * x_t

    info = sample(Watching(path), (4000, 3), solver="annealed-langevin", steps=8, seed=0, return_info=True)
    levels = path.sigma(torch.arange(8, 0, -1) / 8).repeat_interleave(5).tolist()
    assert [level for level, _ in seen] == pytest.approx([*levels, 0.01], rel=1e-5)
    assert seen[0][1] == pytest.approx(30.0, rel=0.03)
    assert info.nfe == 5 * 8 + 1


@pytest.mark.parametrize(("path", "calls"), [(VP(), 3 * 6 + 1), (VE(), 3 * 7), (Linear(), 1 + 3 * 5 + 1)])
def test_the_calls_of_each_path(path, calls):
    bound = Bound(gaussian().denoiser(path))
    bound.grid = grid = make_grid(path, 6, "half-log-snr")
    integrate(bound, numbers(4, 3), grid, AnnealedLangevin(3), lambda: numbers(4, 3))
    assert bound.calls == calls


def test_a_step_out_of_pure_noise_is_ddim_s():
    path, x = Linear(), numbers(5, 3)
    t, s = torch.tensor([1.0, 0.9], dtype=F64)
    field = gaussian().denoiser(path)
    steps = (solver.step(field, x, t, s, None, lambda: x)[0] for solver in (AnnealedLangevin(), DDIM()))
    assert torch.allclose(*steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_level": 0}, "steps_per_level is 0"),
        ({"steps_per_level": 2.0}, "steps_per_level is 2.0"),
        ({"delta": 1e-5, "snr": 0.1}, "two rules"),
        ({"delta": 0.0}, "delta is 0.0: expected a step above 0"),
        ({"delta": math.inf}, "delta is inf"),
        ({"snr": 1.0}, "snr is 1.0.* Try 0.16"),
        ({"snr": 0.0}, "expected 0 < snr < 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        AnnealedLangevin(**options)


def test_a_step_that_diverges_is_refused_and_one_just_below_does_not_diverge():
    path = Karras(sigma_min=0.1, sigma_max=10.0)
    denoiser = Gaussian(torch.zeros(2, dtype=F64), std=0.0).denoiser(path)

    def run(r):
        solver = AnnealedLangevin(100, delta=r * 0.1**2)
        return sample(denoiser, (20, 2), solver=replace(solver, denoise=False), steps=2, seed=0)

    with pytest.raises(ArgumentError, match=r"delta is 0.021, 2.1 times .* level 0.1: .* Try 0.001, or leave"):
        run(2.1)
    assert float(run(1.9).abs().max()) < 5 * 0.1 * math.sqrt(20)
    # and it is right to refuse it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnnealedLangevin, "init", lambda *_: None)
        assert float(run(2.1).abs().max()) > 1e3


def test_levels_that_do_not_grow_give_no_step():
    with pytest.raises(ArgumentError, match=r"level 2 is 0\.1 after 1"):
        langevin_step(torch.tensor([1.0, 0.1]), 5)


def test_a_single_level_takes_ncsn_s_relative_step():
    # a = 2e-5 at the level 0.01 is eta = 1e-5 = 0.1 * 0.01^2 (Song and Ermon 2019, section 5).
    path, x, z = Karras(sigma_min=0.01), numbers(4, 3), numbers(4, 3, seed=1)
    t, end = torch.tensor([0.01, 0.0], dtype=F64)
    score = gaussian().denoiser(path).score(x, t)
    for solver in (AnnealedLangevin(1, denoise=False), AnnealedLangevin(1, delta=1e-5, denoise=False)):
        moved = solver.step(gaussian().denoiser(path), x, t, end, None, lambda: z)[0]
        assert torch.allclose(moved, x + 2e-5 / 2 * score + math.sqrt(2e-5) * z)
