"""Predictor-corrector sampling against closed forms: the published step, exact moments, stationary variances."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from solvers.measuring import F64, gaussian, mixture, moments_after, numbers
from undiffuse.core.errors import ArgumentError
from undiffuse.fields import Denoiser
from undiffuse.oracles import Gaussian
from undiffuse.paths import VE, VP, Karras, Linear
from undiffuse.solvers import DDIM, SRK, AnnealedLangevin, Langevin, LangevinCorrector, Solver, Stay, make_grid, sample
from worlds import PATHS


class Still(Denoiser):
    """The denoiser of a law that is the point 0.3."""

    def forward(self, x_t, t, cond=None):
        return torch.full_like(x_t, 0.3)


@dataclass(frozen=True)
class Both(Solver):
    """Predictor and corrector as one solver, for `moments_after`."""

    order = 1
    evals_per_step = 2
    predictor: Solver
    corrector: LangevinCorrector

    def step(self, field, x, t, s, state, noise):
        x, state = self.predictor.step(field, x, t, s, state, noise)
        return (self.corrector.correct(field, x, s, noise) if float(field.path.sigma(s)) > 0 else x), state


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("path", ["vp", "ve", "karras", "linear", "ddpm-table"])
def test_the_step_is_the_published_one_for_each_sample(path):
    # Song et al. 2021, algorithms 4 and 5: eta = 2 (r |z| / |g|)^2, x + eta g + sqrt(2 eta) z.
    path, law = PATHS[path], Gaussian(torch.zeros(50, dtype=F64), std=0.5)
    t = path.time_of(torch.tensor(0.2, dtype=F64))
    field, z = law.denoiser(path), numbers(7, 50, seed=1)
    x = law.perturbed(path, t).sample(7, torch.Generator().manual_seed(2))
    score = field.score(x, t)
    eta = 2 * (0.16 * z.norm(dim=1) / score.norm(dim=1)) ** 2
    expected = x + eta[:, None] * score + (2 * eta).sqrt()[:, None] * z
    assert torch.allclose(LangevinCorrector().correct(field, x, t, lambda: z), expected, rtol=1e-9)
    alone = LangevinCorrector().correct(field, x[3:4], t, lambda: z[3:4])
    assert torch.allclose(alone, expected[3:4], rtol=1e-12)
    sigma = path.sigma(t)
    expected = x + 2 * (0.16 * sigma) ** 2 * score + 2 * 0.16 * sigma * z
    assert torch.allclose(LangevinCorrector(rule="level").correct(field, x, t, lambda: z), expected, rtol=1e-9)


def test_it_is_the_step_of_annealed_langevin_dynamics():
    field, x = gaussian().denoiser(Karras()), numbers(4, 3)
    t, end = torch.tensor([0.5, 0.0], dtype=F64)
    draws = [numbers(4, 3, seed=k) for k in range(3)]
    a = LangevinCorrector(0.2, 3).correct(field, x, t, iter(draws).__next__)
    b = AnnealedLangevin(3, snr=0.2, denoise=False).step(field, x, t, end, None, iter(draws).__next__)[0]
    assert torch.equal(a, b)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("snr", [0.1, 0.4])
@pytest.mark.parametrize("path", ["vp", "karras", "linear"])
def test_many_steps_settle_at_the_closed_form(path, snr):
    """By the level rule r = 2 snr^2: at `V / (1 - r sigma^2 / (2 V))`, for a point (V = sigma^2) at `2 / (2 - r)`.

    A step on a Gaussian is `x -> a x + b + c z`, coordinate by coordinate; probing it gives a, b and c, and the law
    that it leaves invariant has mean b / (1 - a) and variance c^2 / (1 - a^2).
    """
    path, r, corrector = PATHS[path], 2 * snr**2, LangevinCorrector(snr, 1, "level")
    t = path.time_of(torch.tensor(0.3, dtype=F64))
    zero, one = torch.zeros(1, 3, dtype=F64), torch.ones(1, 3, dtype=F64)
    point = Gaussian(torch.tensor([0.7, -0.4, 0.2], dtype=F64), std=0.0)
    for law in (gaussian(), point):
        field, true = law.denoiser(path), law.perturbed(path, t)
        b = corrector.correct(field, zero, t, lambda: zero)
        a, c = corrector.correct(field, one, t, lambda: zero) - b, corrector.correct(field, zero, t, lambda: one) - b
        settled = true.variances / (1 - r * path.sigma(t) ** 2 / (2 * true.variances))
        assert torch.allclose((c**2 / (1 - a**2))[0], settled, rtol=1e-9)
        assert torch.allclose((b / (1 - a))[0], true.flat_mean, rtol=1e-9)
        if law is point:
            assert torch.allclose(settled / path.sigma(t) ** 2, torch.full((3,), 2 / (2 - r), dtype=F64))


def test_the_bias_of_a_run_is_the_closed_form():
    """2 / (2 - r) at r = 0.5, over 20 draws of 2,000 numbers 15 steps apart: a standard error of 0.7 %."""
    path, snr, t = Karras(), 0.5, torch.tensor(2.0, dtype=F64)
    corrector, seeds = LangevinCorrector(snr, 15, "level"), iter(range(1000))
    draw = lambda: numbers(2000, 1, seed=next(seeds))  # noqa: E731
    x, squares = torch.full((2000, 1), 0.3, dtype=F64), []
    for _ in range(21):
        x = corrector.correct(Still(path), x, t, draw)
        squares.append(float((x - 0.3).square().mean()) / 4)
    assert sum(squares[1:]) / 20 == pytest.approx(2 / (2 - 2 * snr**2), rel=0.03)


def test_the_snr_rule_settles_above_the_law_by_the_square_of_the_snr():
    """With D coordinates of variance V `|score|^2` is `D v / V^2`, so `eta = 2 snr^2 V^2 / v` and v = V (1 + snr^2).

    40,000 numbers: a standard error of 0.7 %; the rule V / (1 - snr^2) of a fixed step would be 0.9 % above.
    """
    path, snr, d = Karras(), 0.3, 5_000
    field, t = Gaussian(torch.zeros(d)).denoiser(path), torch.tensor(2.0, dtype=F64)
    x, seeds = torch.zeros(8, d), iter(range(1000))
    draw = lambda: torch.randn(8, d, generator=torch.Generator().manual_seed(next(seeds)))  # noqa: E731
    x = LangevinCorrector(snr, steps=60).correct(field, x, t, draw)
    assert float(x.square().mean()) == pytest.approx(5 * (1 + snr**2), rel=0.02)


@pytest.mark.parametrize("path", ["vp", "ve", "linear", "karras"])
def test_a_small_snr_leaves_a_right_marginal_right_and_mends_a_wrong_one(path):
    """On a Gaussian, moments exact. DDIM in few steps, deviations wrong by 4 % or more, and 40 corrections."""
    path, law = PATHS[path], gaussian()
    grid = make_grid(path, 9, "half-log-snr")[1:-1]  # inside: no closed form helps
    grid = grid[: int((path.sigma(grid) / path.alpha(grid) > 0.2).sum())]
    start, end = law.perturbed(path, grid[0]), law.perturbed(path, grid[-1])

    def error(solver, grid):
        _, variance = moments_after(solver, path, grid, start.flat_mean, start.variances)
        return float(((variance / end.variances).sqrt() - 1).abs().max())

    fine = torch.cat([a + (b - a) * torch.arange(8, dtype=F64) / 8 for a, b in pairwise(grid)] + [grid[-1:]])
    right = error(SRK(), fine)
    assert error(Both(SRK(), LangevinCorrector(0.05, 1, "level")), fine) < right + 0.0026  # r / 4
    wrong = error(DDIM(), grid)
    assert wrong > 0.04
    assert error(Both(DDIM(), LangevinCorrector(0.2, 40, "level")), grid) < 0.6 * wrong


# ---------------------------------------------------------------- in `sample`


def test_a_corrector_by_its_name_and_its_calls():
    field, path = mixture().denoiser(Linear()), Linear()
    info = sample(field, (3, 2), solver="ddpm", steps=6, corrector="langevin", seed=0, return_info=True)
    assert info.nfe == 6 + 5  # none at sigma = 0
    same = sample(field, (3, 2), solver="ddpm", steps=6, corrector=LangevinCorrector(0.16, 1, "score"), seed=0)
    assert torch.equal(info.x, same)
    levels = []
    by_level = LangevinCorrector(lambda level: 0.1, lambda level: levels.append(level) or 2 * (level < 1))
    info = sample(field, (3, 2), solver="ddpm", steps=6, corrector=by_level, seed=0, return_info=True)
    inner = info.grid[1:-1]
    assert levels == pytest.approx((path.sigma(inner) / path.alpha(inner)).tolist())
    assert info.nfe == 6 + 2 * int((path.sigma(inner) < path.alpha(inner)).sum())


def test_a_corrected_sample_does_not_depend_on_its_batch():
    field = mixture().denoiser(VP())
    options = {"solver": "reverse-diffusion", "steps": 8, "corrector": "langevin", "dtype": F64}
    together = sample(field, (20, 2), seed=list(range(20)), **options)
    assert torch.allclose(sample(field, (1, 2), seed=[17], **options), together[17:18], atol=1e-12)


@pytest.mark.parametrize("path", [VP(), VE()], ids=["vp", "ve"])
def test_corrector_only_sampling(path):
    """`Stay` moves nothing; the mean of a Gaussian comes out by corrections alone, by the exact recursion."""
    law, grid = gaussian(), make_grid(path, 12, "half-log-snr")
    x = numbers(3, 3)
    assert torch.equal(Stay().step(law.denoiser(path), x, *grid[3:5], None, None)[0], x)
    end = Stay().step(law.denoiser(path), x, grid[-2], grid[-1], None, None)[0]
    ended = float(path.sigma(grid[-1])) == 0
    assert torch.equal(end, law.denoiser(path)(x, grid[-2]) if ended else x)
    corrector, r = LangevinCorrector(0.3, 2, "level"), 2 * 0.3**2
    mean, variance = torch.zeros(3, dtype=F64), torch.full((3,), path.prior_std**2, dtype=F64)
    measured = moments_after(Both(Stay(), corrector), path, grid, mean, variance)
    last = grid[-2] if ended else grid[-1]
    for t in grid[1:]:
        if float(path.sigma(t)) == 0:
            break
        true = law.perturbed(path, t)
        pull = r * path.sigma(t) ** 2 / true.variances
        for _ in range(2):
            mean = true.flat_mean + (1 - pull) * (mean - true.flat_mean)
            variance = (1 - pull) ** 2 * variance + 2 * r * path.sigma(t) ** 2
    if ended:  # alpha_s E[x_0 | x] = m + shrink (x - alpha m)
        true, alpha = law.perturbed(path, last), path.alpha(last)
        shrink = alpha * law.variances / true.variances
        mean, variance = law.flat_mean + shrink * (mean - true.flat_mean), shrink**2 * variance
    assert torch.allclose(measured[0], mean, atol=1e-12)
    assert torch.allclose(measured[1], variance, rtol=1e-9)
    info = sample(law.denoiser(path), (2, 3), solver="stay", steps=12, corrector=corrector, seed=0, return_info=True)
    assert info.nfe == (2 * 11 + 1 if ended else 2 * 12)


def test_the_last_denoising_is_tweedie_s_and_only_where_noise_is_left():
    path = VE(sigma_min=0.1, sigma_max=20.0)
    field, options = Still(path), {"solver": "reverse-diffusion", "steps": 30, "seed": 0, "return_info": True}
    noisy = sample(field, (2000, 3), **options)
    assert float(noisy.x.std()) == pytest.approx(0.1, rel=0.2)
    clean = sample(field, (2000, 3), denoise=True, **options)
    assert torch.allclose(clean.x, torch.full((2000, 3), 0.3))
    assert (clean.nfe, noisy.nfe) == (31, 30)
    assert torch.equal(clean.trajectory[-1], noisy.x)
    law = mixture().denoiser(path)
    noisy, clean = (sample(law, (5, 2), solver="ddpm", seed=0, denoise=d) for d in (False, True))
    assert torch.allclose(clean, law(noisy, torch.tensor(path.t_min)))
    assert float((clean - noisy).abs().max()) > 0.01
    law = mixture().denoiser(VP())
    infos = [sample(law, (5, 2), seed=0, denoise=d, return_info=True) for d in (False, True)]
    assert torch.equal(infos[0].x, infos[1].x)
    assert infos[0].nfe == infos[1].nfe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr": 0.0}, "snr is 0.0: expected 0 < snr < 1"),
        ({"snr": -0.16}, r"snr is -0\.16"),
        ({"snr": 1.0}, "Try 0.16"),
        ({"steps": 0}, "steps is 0: expected a whole number of at least 1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"rule": "scor"}, "Did you mean 'score'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        LangevinCorrector(**options)


def test_bad_choices_are_refused_in_the_run():
    field, t = gaussian().denoiser(Karras()), torch.tensor(0.5, dtype=F64)
    with pytest.raises(ArgumentError, match=r"snr is 0\.0 at the level 0\.5"):
        LangevinCorrector(snr=lambda level: 0.0).correct(field, numbers(2, 3), t, lambda: numbers(2, 3))
    with pytest.raises(ArgumentError, match=r"steps is -1 at the level 0\.5"):
        LangevinCorrector(steps=lambda level: -1).correct(field, numbers(2, 3), t, lambda: numbers(2, 3))
    with pytest.raises(ArgumentError, match="Did you mean 'langevin'"):
        sample(field, (2, 3), corrector="langevn")
    with pytest.raises(ArgumentError, match="corrector is 3: expected a name"):
        sample(field, (2, 3), corrector=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="denoising"):
        sample(field, (2, 3), solver=Langevin(0.1), denoise=True)
