"""`sample`: counts, streams, placement, records, errors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from solvers.measuring import F64, SOLVERS, gaussian, mixture, numbers
from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser, NetworkDenoiser
from undiffuse.oracles import GaussianMixture
from undiffuse.paths import VE, VP, Karras, Linear
from undiffuse.solvers import EDM, GRIDS, RK4, Bound, Midpoint, Singlestep, Solver, integrate, make_grid, sample
from undiffuse.solvers.annealed import AnnealedLangevin
from undiffuse.solvers.reverse import StochasticHeun
from undiffuse.solvers.runge_kutta import RungeKutta
from worlds import PATHS


def calls_of(solver: Solver, path, steps: int, grid: torch.Tensor) -> int:
    """Network calls a run must make: a step to sigma = 0, and out of alpha = 0 EDM's, stochastic Heun's and
    DPM-Solver's, take one.

    The midpoint rule and RK4 make two to sigma = 0 where half of sigma / alpha is not below t_low and alpha not 0.
    Annealed Langevin dynamics makes K at each level, 1 for the last denoising, 1 out of alpha = 0.
    """
    if isinstance(solver, AnnealedLangevin):
        levels = (path.sigma(grid) > 0) & (path.alpha(grid) > 0)
        ends = (float(path.sigma(grid[-1])) == 0 and bool(levels.any())) + (float(path.alpha(grid[0])) == 0)
        return solver.steps_per_level * int(levels.sum()) + int(ends)
    if solver.evals_per_step == 1:
        return steps
    short = {steps - 1} if float(path.sigma(grid[-1])) == 0 else set()
    if isinstance(solver, Midpoint | RK4) and short:
        alpha, sigma, low = path.alpha(grid[-2]), path.sigma(grid[-2]), torch.tensor(path.t_low, dtype=F64)
        two = float(alpha) > 0 and 0.5 * sigma / alpha >= path.sigma(low) / path.alpha(low)
        return solver.evals_per_step * (steps - 1) + 1 + int(two)
    if isinstance(solver, EDM | StochasticHeun) and float(path.alpha(grid[0])) == 0:
        short.add(0)
    if isinstance(solver, Singlestep) and float(path.alpha(grid[0])) == 0:
        short.add(0)
    return solver.evals_per_step * steps - (solver.evals_per_step - 1) * len(short)


class Still(Denoiser):
    """The denoiser of a law that is one point: every exponential solver is exact on it."""

    def forward(self, x_t, t, cond=None):
        return torch.full_like(x_t, 0.3)


@pytest.mark.parametrize("path", ["vp", "ve", "linear", "zero-snr-table"])
@pytest.mark.parametrize("name", [name for name in SOLVERS if " eta=0.5" not in name and name != "ddim eta=1"])
def test_every_count_makes_that_many_steps(name, path):
    path, solver = PATHS[path], SOLVERS[name]
    solver = AnnealedLangevin(steps_per_level=1) if name == "annealed-langevin" else solver  # K calls: test_annealed
    for steps in range(1, 65):
        seen = []
        # Methods in the path's own time are not stable on every grid, and at this point not on all of their own.
        in_time = isinstance(solver, RungeKutta) or getattr(solver, "prediction", "") == "velocity"
        kind = list(GRIDS)[steps % len(GRIDS)] if steps < 20 and not in_time else None
        asked = {"solver": solver, "steps": steps, "grid": kind, "seed": 1, "dtype": F64}
        info = sample(Still(path), (2, 3), **asked, callback=seen.append, return_info=True)
        assert [step.index for step in seen] == list(range(steps))
        assert len(info.grid) == steps + 1
        assert len(info.trajectory) == steps + 1
        assert info.nfe == seen[-1].nfe == calls_of(solver, path, steps, info.grid)
        # The path's time is no line in the noise there: ab2 and its like are exact in the limit only.
        if path.t_low > path.t_min and not (in_time and path is PATHS["zero-snr-table"]):
            assert torch.allclose(info.x, torch.full((2, 3), 0.3, dtype=F64), atol=1e-5)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("path", ["vp", "linear", "ve"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "edm", "heun", "midpoint", "rk4"])
def test_every_grid_runs_and_converges(name, path, kind):
    if kind == "curved-angle" and (name, path) in (("edm", "linear"), ("heun", "ve"), ("midpoint", "ve")):
        pytest.skip("its first step is the multistep method's: long, and asked inside the path where alpha = 0")
    path, law = PATHS[path], gaussian()
    noise = path.prior_std * numbers(20, 3)
    exact = law.flow(path, noise, path.t_max, path.t_min)

    def error(steps):
        x = sample(law.denoiser(path), noise=noise, solver=name, steps=steps, grid=kind)
        return float((x - exact).norm() / exact.norm())

    # 4e-4: where 60 steps are already better than that, signs cancel, or the closed step from t_low is what is left
    assert error(120) < max(0.75 * error(60), 4e-4)
    assert error(120) < 0.04


class Listening:
    """A corrector that only draws and remembers."""

    def __init__(self):
        self.draws = []

    def correct(self, field, x, t, noise):
        self.draws.append(noise())
        return x


@pytest.mark.parametrize("name", SOLVERS)
def test_sample_17_does_not_depend_on_its_batch(name):
    denoiser = mixture().denoiser(Linear())

    def row(seed, n, which):
        heard = Listening()
        info = sample(
            denoiser, (n, 2), solver=SOLVERS[name], steps=12, seed=seed, dtype=F64, corrector=heard, return_info=True
        )
        return torch.stack([info.trajectory[0][which], *(d[which] for d in heard.draws)]), info.x[which]

    noise, x = row(5, 64, 17)
    for seed, n, which in [
        (Streams.of(5, 1, first=17), 1, 0),
        (Streams.of(5, 7, first=14), 7, 3),
        (Streams.of(5, 64).select(torch.arange(63, -1, -1)), 64, 63 - 17),
    ]:
        other_noise, other_x = row(seed, n, which)
        assert torch.equal(noise, other_noise)
        assert torch.allclose(x, other_x, atol=1e-10)
    # one seed per sample
    noise, x = row(list(range(40)), 40, 17)
    for seed, n, which in [([17], 1, 0), ([3, 17], 2, 1), (17, 1, 0)]:
        other_noise, other_x = row(seed, n, which)
        assert torch.equal(noise, other_noise)
        assert torch.allclose(x, other_x, atol=1e-10)


def test_draws_are_of_different_numbers():
    heard = Listening()
    info = sample(gaussian().denoiser(VP()), (2, 3), steps=4, solver="ddpm", seed=0, corrector=heard, return_info=True)
    draws = torch.stack([info.trajectory[0] / VP().prior_std, *heard.draws])
    assert len(draws.flatten().unique()) == draws.numel()
    assert torch.equal(draws[0], Streams.of(0, 2).normal((2, 3)))


@pytest.mark.parametrize("name", ["ddpm", "edm churn=2"])
def test_given_noise_takes_the_place_of_draw_0(name):
    denoiser = gaussian().denoiser(VP())
    info = sample(denoiser, (4, 3), solver=SOLVERS[name], steps=6, seed=9, return_info=True)
    again = sample(denoiser, noise=info.trajectory[0], solver=SOLVERS[name], steps=6, seed=9)
    assert torch.equal(info.x, again)


def test_the_seed_in_the_record_makes_the_sample_again():
    denoiser = gaussian().denoiser(VP())
    info = sample(denoiser, (4, 3), solver="ddpm", steps=6, return_info=True)
    assert torch.equal(info.x, sample(denoiser, (4, 3), solver="ddpm", steps=6, seed=info.seed))
    assert not torch.equal(info.x, sample(denoiser, (4, 3), solver="ddpm", steps=6))


@pytest.mark.parametrize("name", SOLVERS)
def test_global_generators_are_not_touched(name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    sample(gaussian().denoiser(VP()), (4, 3), solver=SOLVERS[name], steps=5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


def test_the_record_holds_the_run():
    path, seen = VP(), []
    denoiser = gaussian().denoiser(path)
    info = sample(denoiser, (4, 3), steps=7, seed=1, callback=seen.append, return_info=True)
    assert torch.equal(info.trajectory[-1], info.x)
    assert torch.equal(info.grid, make_grid(path, 7, "curved-angle"))
    for i, step in enumerate(seen):
        assert (step.t, step.s) == (float(info.grid[i]), float(info.grid[i + 1]))
        assert step.x is info.trajectory[i + 1]
        assert torch.allclose(info.denoised[i], denoiser(info.trajectory[i], step.t), atol=1e-6)
    # one tensor of times: its own count of steps
    assert sample(denoiser, (4, 3), grid=torch.tensor([1.0, 0.4, 0.0]), return_info=True).nfe == 2


def test_a_run_may_start_inside_the_path():
    law, path = gaussian(), VP()
    x = law.perturbed(path, 0.5).sample(10, torch.Generator().manual_seed(0))
    grid = torch.linspace(0.5, 0, 201, dtype=F64).square() * 2
    out = sample(law.denoiser(path), noise=x, grid=grid)
    assert torch.allclose(out, law.flow(path, x, 0.5, 0.0), atol=2e-3)


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.seen = []

    def forward(self, x, c_noise, cond=None):
        self.seen.append((x.dtype, c_noise.shape, cond, self.training, torch.is_grad_enabled()))
        return self.drop(self.layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_a_network_runs_in_its_dtype_and_x_in_float32_at_least(dtype):
    net = Net(dtype)
    net.drop.eval()
    field = NetworkDenoiser(net, VP(), "v")
    cond = torch.arange(5)
    x = sample(field, (5, 3), steps=3, cond=cond, seed=0)
    assert x.dtype == torch.promote_types(dtype, torch.float32)
    assert {s[0] for s in net.seen} == {dtype}
    assert {s[1] for s in net.seen} == {torch.Size([5])}
    assert all(torch.equal(s[2], cond) for s in net.seen)
    assert not any(s[3] or s[4] for s in net.seen)
    # every module is back as it was, the one in evaluation mode too
    assert (net.training, net.layer.training, net.drop.training) == (True, True, False)
    assert sample(field, (5, 3), steps=3, cond=cond, dtype=F64).dtype == F64
    assert sample(field, noise=numbers(5, 3), steps=3, cond=cond).dtype == F64
    assert sample(field, noise=numbers(5, 3).half(), steps=3, cond=cond).dtype == torch.float32


def test_conditions_may_be_dictionaries():
    net = Net(torch.float32)
    cond = {"label": torch.arange(5), "vector": torch.zeros(5, 2)}
    sample(NetworkDenoiser(net, VP(), "v"), (5, 3), steps=1, cond=cond)
    assert torch.equal(net.seen[0][2]["label"], cond["label"])


def test_the_corrector_acts_after_every_step_that_keeps_noise():
    class Shift:
        def __init__(self):
            self.times = []

        def correct(self, field, x, t, noise):
            self.times.append(float(t))
            assert torch.isfinite(field.score(x, t)).all()
            return x + 1.0

    denoiser, corrector = gaussian().denoiser(Linear()), Shift()
    info = sample(denoiser, (2, 3), solver="ddim", steps=4, seed=0, corrector=corrector, return_info=True)
    assert corrector.times == info.grid[1:-1].tolist()
    assert info.nfe == 4 + 3
    plain = sample(denoiser, (2, 3), solver="ddim", steps=4, seed=0, return_info=True)
    assert torch.allclose(info.trajectory[1], plain.trajectory[1] + 1)
    shift = Shift()
    sample(gaussian().denoiser(VE()), (2, 3), solver="ddim", steps=4, corrector=shift)
    assert len(shift.times) == 4


class Broken(Denoiser):
    def __init__(self, path, until):
        super().__init__(path)
        self.until = until

    def forward(self, x_t, t, cond=None):
        return x_t * (float("nan") if float(t) < self.until else 1.0)


def test_a_sample_that_is_not_finite_names_its_step():
    grid = torch.tensor([1.0, 0.7, 0.5, 0.2, 0.0])
    with pytest.raises(SamplingError, match=r"in step 3, from t = 0.2 to 0, in 3 of 3 .* answer was not finite"):
        sample(Broken(VP(), until=0.3), (3, 2), grid=grid)
    start = torch.ones(3, 2)
    start[1, 0] = float("inf")
    with pytest.raises(SamplingError, match=r"in step 0, .*in 1 of 3 samples \(first: 1\)"):
        sample(gaussian().denoiser(VP()), noise=torch.cat([start, start[:, :1]], 1), solver="euler")


def test_a_last_denoising_that_is_not_finite_is_told():
    class Last(Denoiser):
        def forward(self, x_t, t, cond=None):
            return x_t * (float("nan") if float(t) == self.path.t_min else 1.0)

    with pytest.raises(SamplingError, match="last denoising"):
        sample(Last(VE()), (3, 2), solver="ddim", steps=5, denoise=True)


@pytest.mark.parametrize("solver", ["abm-4", "heun", "picard", "dopri5", "unipc-2"])
def test_samples_may_be_single_numbers(solver):
    law = GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([[0.2], [0.3]], dtype=F64))
    noise = numbers(6, 1)

    class Reshaped(Denoiser):
        def forward(self, x_t, t, cond=None):
            return law.denoiser(self.path)(x_t.reshape(-1, 1), t).reshape(x_t.shape)

    flat, column = (sample(Reshaped(Linear()), noise=z, solver=solver, steps=5) for z in (noise[:, 0], noise))
    assert torch.equal(flat, column[:, 0])


def test_integrate_refuses_to_draw_without_noise():
    with pytest.raises(ArgumentError, match="noise"):
        integrate(gaussian().denoiser(VP()), numbers(2, 3), make_grid(VP(), 3), SOLVERS["ddpm"])
    times = torch.tensor([0.5, 0.2], dtype=F64)
    with pytest.raises(ArgumentError, match=r"EDM\(steps=\.\.\.\)"):
        EDM(S_churn=1.0).step(gaussian().denoiser(VP()), numbers(2, 3), *times, None, lambda: numbers(2, 3))


def test_a_field_that_changes_the_shape_is_refused():
    class Wide(Denoiser):
        def forward(self, x_t, t, cond=None):
            return torch.cat([x_t, x_t], 1)

    with pytest.raises(ArgumentError, match=r"returned shape \(2, 6\)"):
        Bound(Wide(VP()))(numbers(2, 3), torch.tensor(0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the shape"),
        ({"shape": (4, 3), "noise": torch.zeros(4, 2)}, "expected floats of shape"),
        ({"shape": (0, 3)}, "all at least 1"),
        ({"shape": 16}, "whole numbers"),
        ({"shape": (4, 2.0)}, "whole numbers"),
        ({"shape": (4, 3), "seed": 1.5}, "seed is 1.5: expected a whole number"),
        ({"shape": (4, 3), "seed": 2**70}, "whole number of 64 bits"),
        ({"shape": (4, 3), "dtype": "float32"}, "such as torch.float32"),
        ({"noise": torch.zeros(4, 3, dtype=torch.int64)}, "expected floats"),
        ({"shape": (4, 3), "solver": "hein"}, "Did you mean 'heun'"),
        ({"shape": (4, 3), "steps": 0}, "at least 1"),
        ({"shape": (4, 3), "grid": "kar"}, "unknown grid"),
        ({"shape": (4, 3), "grid": torch.tensor([0.0, 1.0])}, "decrease strictly"),
        ({"shape": (4, 3), "seed": [1, 2]}, "one integer for each of 4"),
        ({"shape": (4, 3), "cond": torch.zeros(3)}, "one row for each of 4"),
        ({"shape": (4, 3), "cond": {"label": torch.zeros(3)}}, "label is shape"),
        ({"shape": (4, 3), "dtype": torch.int64}, "floating-point"),
        ({"shape": (4, 3), "device": "cuda:77"}, "cannot be used here"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        sample(gaussian().denoiser(Karras()), **options)


@pytest.mark.parametrize(
    "make", [lambda: EDM(S_churn=-1.0), lambda: EDM(S_min=2.0, S_max=1.0), lambda: EDM(S_noise=0.0)]
)
def test_bad_churn_is_refused(make):
    with pytest.raises(ArgumentError, match="S_churn >= 0"):
        make()
