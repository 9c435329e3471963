"""Solvers as tables: what they reproduce, what fitting them gains, and what they refuse."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from solvers.measuring import F64, mixture, numbers
from undiffuse.core.errors import ArgumentError, CheckpointError, SamplingError
from undiffuse.fields import Denoiser, NetworkDenoiser
from undiffuse.oracles import Empirical, GaussianMixture, exact_flow
from undiffuse.paths import VP, Karras, Linear
from undiffuse.solvers import Multistep, Tuned, get_solver, linear_table, sample, tune, tuning
from undiffuse.solvers.curves import Curves
from undiffuse.solvers.ends import noises
from undiffuse.solvers.grids import make_grid
from undiffuse.solvers.table_file import _seal, packed, unpacked
from worlds import PATHS

LINEAR = ["abm-4", "ddim", "heun", "dpmpp-2s", "unipc-3", "ab3"]


def ring() -> GaussianMixture:
    angle = 2 * math.pi * torch.arange(8, dtype=F64) / 8
    return GaussianMixture(1.4 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.1, dtype=F64))


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    return tune(ring().denoiser(Linear()), (2,), 5, n=256, seed=1, most_steps=60)


@pytest.mark.parametrize("path", ["vp", "linear", "karras", "ve"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_table_runs_as_the_solver_that_it_was_made_of(name, path):
    path, denoiser = PATHS[path], mixture().denoiser(PATHS[path])
    noise = path.prior_std * numbers(6, 2)
    wanted = sample(denoiser, noise=noise, solver=name, steps=6, return_info=True)
    table = linear_table(get_solver(name), path, 6, (2,))
    found = sample(denoiser, noise=noise, solver=table, return_info=True)
    assert found.nfe == wanted.nfe == table.calls
    assert torch.allclose(found.x, wanted.x, rtol=0, atol=1e-11 * path.prior_std)
    assert torch.equal(found.trajectory[-1], found.x)
    assert len(found.trajectory) == len(found.grid) == table.calls + 1


def test_one_weight_a_hundredth_off_is_seen():
    path, noise = Linear(), numbers(6, 2)
    denoiser, table = mixture().denoiser(path), linear_table(Multistep(), path, 5, (2,))
    wanted = sample(denoiser, noise=noise, solver=table)
    for i, row in enumerate(table.weights):
        for j in range(len(row)):
            if (i, j) == (0, 0) or abs(row[j]) < 1e-3:  # the first question is asked where all is noise
                continue
            off = tuple(
                w * (1 + 0.01 * ((i, j) == (k, m))) for k, r in enumerate(table.weights) for m, w in enumerate(r)
            )
            rows = tuple(off[k * (k + 1) // 2 : (k + 1) * (k + 2) // 2] for k in range(len(table.weights)))
            assert (sample(denoiser, noise=noise, solver=replace(table, weights=rows)) - wanted).abs().max() > 1e-7


def test_tuning_lowers_the_error_on_noise_of_another_seed(tuned):
    denoiser = ring().denoiser(Linear())
    noise = numbers(256, 2)
    truth = sample(denoiser, noise=noise, solver="abm-4", steps=100)
    before, after = ((sample(denoiser, noise=noise, solver=s, steps=5) - truth).norm(dim=1) for s in ("abm-4", tuned))
    assert after.median() < 0.12 * before.median()
    assert after.square().mean() < 0.6**2 * before.square().mean()
    about = tuned.about
    assert about["after"]["median"] < 0.12 * about["before"]["median"]


def test_it_is_the_same_again(tuned):
    assert tune(ring().denoiser(Linear()), (2,), 5, n=256, seed=1, most_steps=60) == tuned


def test_of_two_beginnings_the_better_fit_is_kept(tuned):
    denoiser, told = ring().denoiser(Linear()), []
    options = {"n": 256, "seed": 1, "most_steps": 60}
    one = tune(denoiser, (2,), 5, grids=["own"], **options)
    other = tune(denoiser, (2,), 5, grids=["angle"], **options)
    both = tune(denoiser, (2,), 5, grids=["angle", "own"], callback=told.append, **options)
    assert tuned == one  # the default begins on both
    assert tuned.about["grid"] == both.about["grid"] == "own"
    assert other.about["grid"] == "angle"
    assert both.about["after"]["median"] < 0.8 * other.about["after"]["median"]
    assert both.about["before"] == other.about["before"]  # of the first
    fits = [step for step in told if step.stage == "fit"]
    assert [step.done for step in fits] == sorted(step.done for step in fits)
    assert fits[-1].total == 120
    assert fits[-1].error < min(step.error for step in fits if step.done <= 60)


def test_grids_without_an_answer_are_passed_over():
    class Hole(Denoiser):
        """No answer at one time of the grid in the angle."""

        def forward(self, x_t, t, cond=None):
            x_0 = torch.tanh(x_t)
            return torch.where((t - make_grid(self.path, 4, "angle")[1]).abs() < 1e-6, math.nan * x_0, x_0)

    options = {"calls": 4, "n": 64, "most_steps": 10}
    about = tune(Hole(Linear()), (2,), **options).about
    assert about["after"]["median"] < about["before"]["median"]
    with pytest.raises(SamplingError, match="became infinite or NaN in step"):
        tune(Hole(Linear()), (2,), grids=["angle", "own"], **options)


def test_where_nothing_is_better_the_start_comes_back(monkeypatch):
    nothing = lambda self, angles, of_all=False: ([], torch.full((48,), math.inf))  # noqa: E731
    monkeypatch.setattr(tuning._Regression, "__call__", nothing)
    made = tune(mixture().denoiser(Linear()), (2,), 5, n=64)
    assert made == linear_table(get_solver("abm-4"), Linear(), 5, (2,))
    assert made.about["after"] == made.about["before"]
    assert made.about["steps"] == 0


@pytest.mark.parametrize("path", ["vp", "linear", "karras", "ve"])
def test_of_a_gaussian_one_call_is_enough(path):
    """The flow is affine, and so is the answer: noise and one answer make the end, mean + std z at alpha = 0."""
    path, law = PATHS[path], GaussianMixture(torch.tensor([[1.0, -0.5]], dtype=F64), torch.tensor([0.3], dtype=F64))
    denoiser, noise = law.denoiser(path), path.prior_std * numbers(6, 2)
    made = tune(denoiser, (2,), 1, n=32, reference=200, most_steps=1)
    truth = exact_flow(denoiser, noise, path.t_max, path.t_min)
    assert torch.allclose(sample(denoiser, noise=noise, solver=made), truth, rtol=0, atol=1e-3)


def test_curves_are_the_flow():
    mean, std = torch.tensor([[1.0, -0.5]], dtype=F64), torch.tensor([0.3], dtype=F64)
    denoiser = GaussianMixture(mean, std).denoiser(Linear())
    starts = noises(denoiser, (2,), None, 10, 0)
    curves = Curves.of(denoiser, starts, 100, 4)
    for angle in (math.pi / 2, 1.5, 0.9, 0.31, 0.003, 0.0):
        alpha, sigma = math.cos(angle), math.sin(angle)
        wanted = alpha * mean + math.hypot(0.3 * alpha, sigma) * starts.start
        assert torch.allclose(curves.at(angle), wanted, rtol=0, atol=3e-6)
    assert torch.allclose(curves.ends.x, mean + 0.3 * starts.start, rtol=0, atol=1e-6)


def test_curves_that_do_not_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr("undiffuse.solvers.curves.free_memory", lambda: 2**20)
    with pytest.raises(ArgumentError, match=r"0\.0 GiB are free: give fewer noises"):
        tune(mixture().denoiser(Linear()), (2,), 5, n=1024)


def test_the_nearest_sum_is_found_among_terms_that_repeat():
    known = torch.stack([numbers(50), numbers(50, seed=1), torch.zeros(50, dtype=F64), 2 * numbers(50)])
    goal = 3 * known[0] - 0.5 * known[1]
    found = tuning._nearest(known, goal)
    assert torch.allclose(found @ known, goal, atol=1e-9)
    assert found[2] == 0
    off = goal + torch.arange(50) * (torch.arange(50) < 10)
    weights = torch.where(torch.arange(50) < 10, 1e-14, 1.0).to(F64)
    assert torch.allclose(tuning._nearest(known[:2], off, weights), torch.tensor([3.0, -0.5], dtype=F64), atol=1e-6)


def test_the_search_finds_a_valley_beside_a_cliff_and_never_leaves_for_worse():
    valley = np.array([0.5, -0.3, 0.1, 0.4])
    score = lambda z: math.inf if z[0] > 0.6 else float(((z - valley) ** 2).sum())  # noqa: E731
    told = []
    z, least, tried = tuning._search(score, 126, 0, lambda *now: told.append(now))
    assert np.linalg.norm(z - valley) < 0.2
    assert least == score(z)
    assert [count for count, _ in told] == list(range(1, tried + 1))
    assert tuning._search(lambda z: float(z @ z), 126, 0, lambda *now: None)[1] == 0
    assert tuning._search(lambda z: math.inf, 126, 0, lambda *now: None)[1:] == (math.inf, 25)


@pytest.mark.parametrize("path", ["vp", "linear", "karras"])
def test_angles_are_moved_within_the_path(path):
    path = PATHS[path]
    denoiser, angles = (
        mixture().denoiser(path),
        linear_table(Multistep(), path, 6, (2,), make_grid(path, 6, "angle")).angles,
    )
    places = tuning._Angles(denoiser, angles)
    assert places(np.zeros(4)) == pytest.approx(angles, abs=4e-3)  # none nearer to the top than a gap of 1e-3
    top, low = path.angle(torch.tensor([path.t_max, denoiser.t_low], dtype=F64)).tolist()
    for z in np.random.default_rng(0).normal(size=(20, 4)):
        moved = [top, *places(z), low]
        assert all(a > b for a, b in itertools.pairwise(moved))


def test_what_is_said_of_the_errors_is_so(tuned):
    """The last quarter of the noises, measured by hand."""
    from undiffuse.core.random import Streams

    denoiser = ring().denoiser(Linear())
    noise = Streams.of(1, 256).normal((256, 2), dtype=F64)[192:]
    truth = sample(denoiser, noise=noise, solver="abm-4", steps=100)
    for solver, key in (("abm-4", "before"), (tuned, "after")):
        gap = (sample(denoiser, noise=noise, solver=solver, steps=5) - truth).square().sum(1)
        length = truth.square().sum(1).mean()
        # abm-4 chooses by the answers, and its table does not.
        close = {"before": 0.01, "after": 1e-6}[key]
        assert tuned.about[key]["rms"] == pytest.approx(float((gap.mean() / length).sqrt()), rel=close)


@pytest.mark.parametrize("path", [VP(), Karras()])
def test_other_paths_gain_too(path):
    made = tune(mixture().denoiser(path), (2,), 6, n=128, most_steps=40).about
    assert made["after"]["median"] < 0.5 * made["before"]["median"]


def test_a_network_is_fitted_and_left_as_it_was():
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x, label, cond=None):
            return torch.tanh(self.layer(torch.cat([x, label[:, None]], 1)))

    denoiser = NetworkDenoiser(Net(), Linear(), prediction="velocity").train()
    before = [p.clone() for p in denoiser.parameters()]
    made = tune(denoiser, (2,), 4, n=64, most_steps=20, batch=20)
    assert made.prediction == "velocity"
    assert made.about["after"]["median"] < 0.7 * made.about["before"]["median"]
    assert denoiser.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, denoiser.parameters()))
    with pytest.raises(ArgumentError, match="predicts 'velocity', not 'data'"):
        sample(NetworkDenoiser(Net(), Linear(), prediction="data"), (2, 2), solver=made)


def test_conditions_stay_with_their_noises():
    """A model whose classes are far apart can only be tuned where each trajectory keeps its class."""

    class Classes(Denoiser):
        def forward(self, x_t, t, cond=None):
            assert cond is not None
            return torch.tanh(x_t) + 5.0 * cond[:, None].to(x_t)

    labels = torch.arange(64) % 3
    made = tune(Classes(Linear()), (2,), 4, n=64, cond=labels, most_steps=20, batch=10)
    assert made.about["before"]["median"] < 0.05
    assert made.about["after"]["median"] < made.about["before"]["median"]


def test_a_file_brings_back_the_same_samples(tuned, tmp_path):
    again = Tuned.load(tuned.save(tmp_path / "solvers" / "tuned-5.safetensors"))
    assert again == tuned
    assert again.about == tuned.about
    assert [file.name for file in (tmp_path / "solvers").iterdir()] == ["tuned-5.safetensors"]
    denoiser = ring().denoiser(Linear())
    assert torch.equal(*(sample(denoiser, (9, 2), solver=s, seed=3) for s in (tuned, again)))


def test_files_that_are_not_whole_are_refused(tuned, tmp_path):
    file = tuned.save(tmp_path / "one.safetensors")
    whole = file.read_bytes()
    (tensors, words), deep = unpacked(file), "[" * 100_000
    with pytest.raises(CheckpointError, match="there is no file"):
        Tuned.load(tmp_path / "none.safetensors")
    for content, said in (
        (whole[:-9], "cut short"),
        (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], "altered"),
        (b"", "cut short"),
        (packed(tensors, {"about": {}}), "holds no solver that can be used"),
        (packed(tensors, ["about"]), "no table"),
        (packed(tensors, words | {"about": 3}), "no table"),
        (save(tensors, {"format": "undiffuse-solver-1", "sha256": _seal(tensors, "")}), "can be used: 'words'"),
        (save(tensors, {"format": "undiffuse-solver-1", "words": deep, "sha256": _seal(tensors, deep)}), "can be used"),
        (whole.replace(b"undiffuse-solver-1", b"undiffuse-solver-2"), "holds no tuned solver"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            Tuned.load(file)


def test_numpy_s_numbers_can_be_saved_and_a_profile_cut_short_is_of_no_path(tuned, tmp_path):
    made = replace(tuned.with_about(seed=np.int64(3)), event=tuple(np.array([2])))
    again = Tuned.load(made.save(tmp_path / "one.safetensors"))
    assert again.about["seed"] == 3
    assert again.event == (2,)
    with pytest.raises(ArgumentError, match="made for the path"):
        sample(ring().denoiser(Linear()), (2, 2), solver=replace(again, profile=again.profile[:5]))


def test_a_table_of_a_grid_that_does_not_fit():
    for grid, words in ((make_grid(Linear(), 9), "grid has 10 times"), (make_grid(Linear(), 2).flip(0), "decrease")):
        with pytest.raises(ArgumentError, match=words):
            linear_table(get_solver("dpmpp-2m"), Linear(), 2, (2,), grid)


def test_another_path_count_shape_or_grid_is_refused(tuned):
    field = ring().denoiser(Linear())
    for denoiser, options, words in (
        (ring().denoiser(VP()), {}, "made for the path Linear"),
        (ring().denoiser(VP(beta_max=19)), {}, "made for the path Linear"),
        (field, {"steps": 6}, "made for 5 calls"),
        (field, {"grid": "time", "steps": 5}, "times of its own"),
        (field, {"corrector": "langevin"}, "all steps at once"),
    ):
        with pytest.raises(ArgumentError, match=words):
            sample(denoiser, (2, 2), solver=tuned, **options)
    with pytest.raises(ArgumentError, match=r"tuned for \(2,\)"):
        sample(field, (2, 3), solver=tuned)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calls": 0}, "calls is 0"),
        ({"calls": 65}, "1 to 64"),
        ({"calls": 2.0}, "whole number"),
        ({"n": 31}, "at least 32"),
        ({"batch": 0}, "batch is 0"),
        ({"start": "heun"}, "9 calls"),
        ({"start": "ddpm"}, "deterministic"),
        ({"start": "abm4"}, "abm-4"),
        ({"grids": "angle"}, "expected names of grids"),
        ({"grids": []}, "expected names of grids"),
        ({"grids": ["own", "angel"]}, "Did you mean 'angle'"),
    ],
)
def test_bad_arguments_of_tune(changes, words):
    with pytest.raises(ArgumentError, match=words):
        tune(mixture().denoiser(Linear()), (2,), **{"calls": 5, "n": 32, **changes})


def test_numbers_that_make_no_table_are_refused(tuned):
    for changes, words in (
        ({"angles": tuned.angles[::-1]}, "must not rise"),
        ({"angles": tuned.angles[1:]}, "rows"),
        ({"weights": ((math.nan,), *tuned.weights[1:])}, "infinite or NaN"),
    ):
        with pytest.raises(ArgumentError, match=words):
            replace(tuned, **changes)


def test_an_empirical_law_can_be_differentiated_by_time():
    law = Empirical(numbers(40, 3), std=0.1)
    x = numbers(5, 3)
    means = lambda angle: law.posterior_means(x, torch.cos(angle), torch.sin(angle), None)[0].sum()  # noqa: E731
    angle = torch.tensor(0.7, dtype=F64, requires_grad=True)
    slope = torch.autograd.grad(means(angle), angle)[0]
    around = (means(angle.detach() + 1e-5) - means(angle.detach() - 1e-5)) / 2e-5
    assert slope == pytest.approx(float(around), rel=1e-6)
