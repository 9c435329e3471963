"""Picard's iteration ends where its rule does, in fewer rounds, for each sample by itself."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from solvers.measuring import F64, gaussian, mixture, numbers, strong_error
from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.oracles import Empirical
from undiffuse.paths import VP, Linear
from undiffuse.solvers import DDIM, Bound, Picard, make_grid, sample
from undiffuse.solvers.picard import _Iteration
from undiffuse.solvers.rules import RULES
from worlds import PATHS

EXPLICIT = ["ddim", "euler", "dpmpp-2m"]


# Out of alpha = 0 the multistep solver asks a little inside of the path, as no rule here does.
CASES = [(inner, path) for inner in EXPLICIT for path in ("vp", "ve", "linear", "zero-snr-table")]
CASES = [case for case in CASES if case[0] != "dpmpp-2m" or case[1] in ("vp", "ve")]


@pytest.mark.parametrize("window", [5, 64])
@pytest.mark.parametrize(("inner", "path"), CASES)
def test_it_ends_where_the_rule_does(inner, path, window):
    denoiser, noise = mixture().denoiser(PATHS[path]), PATHS[path].prior_std * numbers(12, 2)
    wanted = sample(denoiser, noise=noise, solver=inner, steps=40, return_info=True)
    solver = Picard(inner, window=window, tolerance=1e-11)
    found = sample(denoiser, noise=noise, solver=solver, steps=40, return_info=True)
    assert torch.equal(found.grid, wanted.grid)
    assert torch.allclose(found.x, wanted.x, rtol=0, atol=1e-8)
    # What a callback and the record are told is the rule's course too.
    for mine, theirs in zip(found.trajectory + found.denoised, wanted.trajectory + wanted.denoised, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-8)
    assert torch.equal(found.trajectory[-1], found.x)
    assert found.nfe == int(found.rounds.max()) <= 40


@pytest.mark.parametrize("path", ["vp", "linear", "karras"])
def test_the_trapezoid_on_a_gaussian_solves_each_step(path):
    """There `D(x, t) = k_t x + c_t`, so that the implicit step has a closed form."""
    path, law = PATHS[path], gaussian()
    grid = make_grid(path, 30, "canonical")
    alpha, sigma = path.alpha(grid), path.sigma(grid)
    gain = alpha[:, None] * law.variances / (alpha[:, None] ** 2 * law.variances + sigma[:, None] ** 2)
    shift = (1 - alpha[:, None] * gain) * law.flat_mean
    x = noise = path.prior_std * numbers(6, 3)
    for j in range(29):
        half = 0.5 * (alpha[j + 1] / sigma[j + 1] - alpha[j] / sigma[j])
        known = x / sigma[j] + half * (gain[j] * x + shift[j] + shift[j + 1])
        x = known / (1 / sigma[j + 1] - half * gain[j + 1])
    x = alpha[30] * (gain[29] * x + shift[29])
    found = sample(law.denoiser(path), noise=noise, solver=Picard("trapezoid", 16, 1e-12), grid=grid)
    assert torch.allclose(found, x, rtol=0, atol=1e-9)


def test_the_trapezoid_is_of_order_2():
    coarse, fine = strong_error(Picard("trapezoid", tolerance=1e-12), VP(), [40, 80])
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


def test_iteration_k_makes_the_first_k_points_exact():
    path, steps = Linear(), 24
    denoiser, noise = mixture().denoiser(path), numbers(5, 2)
    wanted = sample(denoiser, noise=noise, solver="ddim", steps=steps, return_info=True)
    work = _Iteration(Picard(window=100, tolerance=1e-300), Bound(denoiser, grid=wanted.grid), noise, wanted.grid, True)
    assert work.size == steps
    for k in range(1, steps + 1):
        if len(work.now.rows):
            with torch.no_grad():
                work.advance()
        assert torch.allclose(work.states[k], wanted.trajectory[k], rtol=0, atol=1e-13)
        # The points beyond are not: this is not the rule step by step in disguise.
        if k <= 3:
            assert bool((work.now.start == k).all())
            assert float((work.now.y[:, 2] * work.n[k + 2] - wanted.trajectory[k + 2]).abs().max()) > 1e-9
    assert len(work.now.rows) == 0


@pytest.mark.parametrize("inner", ["ddim", "dpmpp-2m"])
def test_every_count_of_steps(inner):
    path = VP()
    denoiser, noise = gaussian().denoiser(path), path.prior_std * numbers(2, 3)
    for steps in range(1, 65):
        solver = Picard(inner, window=16, tolerance=1e-10)
        found = sample(denoiser, noise=noise, solver=solver, steps=steps, return_info=True)
        assert len(found.trajectory) == steps + 1
        assert int(found.rounds.max()) <= steps
        assert torch.allclose(found.x, sample(denoiser, noise=noise, solver=inner, steps=steps), rtol=0, atol=1e-8)


def test_one_step_alone_is_the_rule_s():
    denoiser, x = mixture().denoiser(VP()), numbers(4, 2)
    t, s = torch.tensor([0.6, 0.5], dtype=F64)
    one, _ = Picard().step(Bound(denoiser), x, t, s, None, lambda: x)
    assert torch.allclose(one, DDIM().step(denoiser, x, t, s, None, lambda: x)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [6, 50])
def test_a_sample_does_not_depend_on_its_batch(window):
    denoiser, solver = mixture().denoiser(Linear()), Picard(window=window, batch=7)

    def drawn(n, seed):
        return sample(denoiser, (n, 2), solver=solver, steps=50, seed=seed, dtype=F64, return_info=True)

    many = drawn(40, 5)
    assert len(many.rounds.unique()) > 1
    for i in (0, 17, int(many.rounds.argmax())):
        alone = drawn(1, Streams.of(5, 1, first=i))
        assert torch.allclose(alone.x[0], many.x[i], rtol=0, atol=1e-10)
        assert (int(alone.rounds), int(alone.nfe_each)) == (int(many.rounds[i]), int(many.nfe_each[i]))


class Counting(Denoiser):
    """Keeps the rows of each call."""

    def __init__(self, inner):
        super().__init__(inner.path)
        self.inner, self.rows = inner, []

    def forward(self, x_t, t, cond=None):
        self.rows.append(len(x_t))
        return self.inner(x_t, t, cond)


def test_rounds_and_rows_are_counted():
    field = Counting(mixture().denoiser(Linear()))
    found = sample(field, (9, 2), solver=Picard(window=20), steps=60, seed=1, dtype=F64, return_info=True)
    assert sum(field.rows) == int(found.nfe_each.sum())
    assert len(field.rows) == found.nfe == int(found.rounds.max())  # 9 x 20 rows are one call
    assert field.rows[0] == 180
    assert torch.equal(found.speed_up, 60 / found.rounds)
    assert float(found.speed_up.min()) > 2
    # In smaller calls it is as many rounds.
    small = Counting(field.inner)
    again = sample(small, (9, 2), solver=Picard(window=20, batch=64), steps=60, seed=1, dtype=F64, return_info=True)
    assert (again.nfe, sum(small.rows)) == (found.nfe, sum(field.rows))
    assert max(small.rows) == 64
    assert torch.allclose(again.x, found.x, rtol=0, atol=1e-12)
    # One call for all, after the end: of every sample.
    denoised = sample(
        field, (9, 2), solver=Picard(window=20), steps=60, grid=found.grid[:50], seed=1, denoise=True, return_info=True
    )
    assert denoised.nfe == int(denoised.rounds.max())
    plain = sample(field, (9, 2), solver="heun", steps=5, return_info=True)
    assert plain.rounds.tolist() == plain.nfe_each.tolist() == [9] * 9


def test_every_row_has_its_own_condition():
    law = Empirical(numbers(30, 3), std=0.3, labels=torch.arange(30) % 3)
    path, cond = VP(), torch.tensor([2, 0, 1, 1, -1])
    noise = numbers(5, 3, seed=4)
    wanted = sample(law.denoiser(path), noise=noise, cond=cond, solver="ddim", steps=30)
    found = sample(law.denoiser(path), noise=noise, cond=cond, solver=Picard(window=12, tolerance=1e-10), steps=30)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-8)


def test_a_thousand_steps_of_the_digits_in_fifty_rounds():
    """Of 32 samples, and of a network's: docs/measured.md."""
    from sklearn.datasets import load_digits  # the processes below need not load it

    digits = torch.tensor(load_digits().data[:1000], dtype=F64) / 8 - 1
    denoiser = Empirical(digits, std=0.1).denoiser(VP())
    wanted = sample(denoiser, (2, 64), solver="ddim", steps=1000, seed=0, dtype=F64)
    found = sample(denoiser, (2, 64), solver=Picard(window=128), steps=1000, seed=0, dtype=F64, return_info=True)
    assert found.nfe <= 40
    assert float((found.x - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_tolerance_is_kept_in_single_precision(tolerance):
    denoiser, z = mixture().denoiser(VP()), numbers(200, 2).float()
    wanted = sample(denoiser, noise=z, solver="ddim", steps=200)
    found = sample(denoiser, noise=z, solver=Picard(window=40, tolerance=tolerance), steps=200)
    error = float((found - wanted).square().mean().sqrt())
    assert 1e-2 * tolerance < error < tolerance


def test_no_correction_between_the_steps():
    with pytest.raises(ArgumentError, match="Picard solves all steps at once"):
        sample(mixture().denoiser(VP()), (2, 2), solver="picard", corrector="langevin")
    with pytest.raises(ArgumentError, match="needs a Bound denoiser"):
        Picard().run(mixture().denoiser(VP()), numbers(2, 2), make_grid(VP(), 3))
    with pytest.raises(NotImplementedError, match="DDIM goes step by step"):
        DDIM().run(mixture().denoiser(VP()), numbers(2, 2), make_grid(VP(), 3))


class Broken(Denoiser):
    """NaN below t = 0.29; above it the mixture's."""

    def forward(self, x_t, t, cond=None):
        x_0 = mixture().denoiser(self.path)(x_t, t)
        return torch.where((t < 0.29).expand(len(x_t))[:, None], float("nan"), x_0)


@pytest.mark.parametrize("window", [3, 50])
def test_what_is_not_finite_names_its_step(window):
    grid = torch.linspace(1, 0, 51, dtype=F64)
    with pytest.raises(SamplingError, match=r"in step 36, from t = 0.28 to 0.26, in 4 of 4 .* not finite"):
        sample(Broken(Linear()), (4, 2), solver=Picard(window=window), grid=grid)


class Steep(Denoiser):
    """No fixed point of an implicit step: the sign of x, multiplied."""

    def forward(self, x_t, t, cond=None):
        return -50 * torch.sin(50 * x_t)


def test_a_trapezoid_that_does_not_converge_is_given_up():
    with pytest.raises(SamplingError, match="'trapezoid' did not come below a change of 1e-09 in 150 rounds"):
        sample(Steep(Linear()), (4, 2), solver=Picard("trapezoid", tolerance=1e-9), steps=5, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0: expected a whole number"),
        ({"window": 2.5}, "window is 2.5"),
        ({"batch": True}, "batch is True"),
        ({"tolerance": 0.0}, "tolerance is 0.0: expected a number above 0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"tolerance": math.inf}, "tolerance is inf"),
        ({"inner": "dimm"}, "unknown inner rule .*'dimm'. Did you mean 'ddim'"),
        ({"inner": "ddpm"}, "unknown inner rule .one without noise"),
        ({"inner": DDIM(eta=1.0)}, "expected the name of a rule without noise"),
        ({"group": "world"}, "group is 'world': expected a process group"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        Picard(**options)


@pytest.mark.parametrize(
    ("inner", "index"),
    [("ddim", 0), ("ddim", 2), ("euler", 0), ("euler", 2), *[("dpmpp-2m", i) for i in range(3)]]
    + [("trapezoid", i) for i in (0, 2, 3)],
)
def test_one_percent_is_noticed(inner, index):
    rule = RULES[inner]

    def mutated(field, times):
        return tuple(1.01 * w if i == index else w for i, w in enumerate(rule.weights(field, times)))

    test = test_the_trapezoid_on_a_gaussian_solves_each_step if rule.implicit else test_it_ends_where_the_rule_does
    with mock.patch.dict(RULES, {inner: replace(rule, weights=mutated)}), pytest.raises(AssertionError):
        test("vp") if rule.implicit else test(inner, "vp", 64)


def _share_of_one_process(rank, file, found):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    field = Counting(mixture().denoiser(Linear()))
    # The second process would have drawn other numbers: the first one's are taken.
    solver = Picard(window=13, group=dist.group.WORLD)
    noise = Streams.of(rank, 5).normal((5, 2), dtype=F64)
    ran = sample(field, noise=noise, solver=solver, steps=40, seed=rank, return_info=True)
    assert torch.equal(noise, Streams.of(rank, 5).normal((5, 2), dtype=F64))  # the caller's
    one = sample(field, (1, 2), solver=replace(solver, window=1), steps=3, seed=rank, dtype=F64)  # nothing to share
    torch.save((ran.x, ran.rounds, ran.nfe_each, sum(field.rows), one), f"{found}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path):
    mp.spawn(_share_of_one_process, (str(tmp_path / "meet"), str(tmp_path / "found")), nprocs=2)
    denoiser = mixture().denoiser(Linear())
    whole = sample(denoiser, (5, 2), solver=Picard(window=13), steps=40, seed=0, dtype=F64, return_info=True)
    alone = sample(denoiser, (1, 2), solver=DDIM(), steps=3, seed=0, dtype=F64)
    asked = 0
    for rank in range(2):
        x, rounds, rows, mine, one = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert torch.allclose(x, whole.x, rtol=0, atol=1e-12)
        assert torch.allclose(one, alone, rtol=0, atol=1e-12)
        assert torch.equal(rounds, whole.rounds)
        assert torch.equal(rows, whole.nfe_each)
        asked += mine
        assert 0.3 * int(rows.sum()) < mine < 0.7 * int(rows.sum())
    assert asked == int(whole.nfe_each.sum()) + 3
