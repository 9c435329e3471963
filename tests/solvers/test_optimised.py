"""`optimise_grid`: against the best possible times in closed form, every named grid, and on unseen noises."""

from __future__ import annotations

import math

import pytest
import torch

import undiffuse as ud
from solvers.measuring import F64
from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.solvers import GRIDS, OptimisedGrid, fit_grid
from undiffuse.solvers.comparing import relative_errors

TURNS = torch.arange(8, dtype=F64) * math.pi / 4
RING = ud.GaussianMixture(2 * torch.stack([TURNS.cos(), TURNS.sin()], 1), torch.full((8,), 0.2, dtype=F64))


@pytest.mark.parametrize("steps", [2, 3])
def test_of_a_gaussian_ddim_s_best_times_are_equal_angles(steps):
    """N(0, s^2): with theta = atan(sigma / (s alpha)), DDIM multiplies x / hypot(s alpha, sigma) by cos(step in theta).

    (From E[x_0 | x] = alpha s^2 x / (alpha^2 s^2 + sigma^2).) The flow keeps it, the product of the cosines of a given
    sum is largest where all are equal, and it is below 1.
    """
    s, path = 0.3, ud.Linear()
    law = ud.GaussianMixture(torch.zeros(1, 1, dtype=F64), torch.tensor([s], dtype=F64))
    times = ud.optimise_grid(law.denoiser(path), (1,), steps, solver="ddim", n=48)
    theta = torch.atan2(path.sigma(times), s * path.alpha(times))
    equal = math.pi / 2 * torch.linspace(1, 0, steps + 1, dtype=F64)
    assert torch.allclose(theta, equal, atol=5e-3 * math.pi / 2)
    noise = torch.ones(1, 1, dtype=F64)
    x = ud.sample(law.denoiser(path), noise=noise, solver="ddim", grid=times)
    assert float(1 - x / s) == pytest.approx(1 - math.cos(math.pi / 2 / steps) ** steps, rel=1e-3)


@pytest.mark.parametrize("steps", [5, 10])
def test_it_beats_every_named_grid_on_unseen_noises(steps):
    denoiser = RING.denoiser(ud.Linear())
    times = ud.optimise_grid(denoiser, (2,), steps, solver="dpmpp-2m")
    noise = ud.Streams.of(77, 128).normal((128, 2), dtype=F64)
    truth = ud.exact_flow(denoiser, noise, 1.0, 0.0)

    def errors(grid):
        return relative_errors(ud.sample(denoiser, noise=noise, solver="dpmpp-2m", steps=steps, grid=grid), truth)

    assert float(times[-2]) >= ud.Linear().t_low
    rms, median = errors(times)
    for name in (None, *GRIDS):
        others = errors(name)
        assert rms < 0.8 * others[0], name
        assert median < 0.4 * others[1], name


def test_a_fitted_grid_and_a_tuned_solver_are_not_mistaken_for_each_other(tmp_path):
    grid = fit_grid(RING.denoiser(ud.VP()), (2,), 3, solver="ddim", n=16, most_rounds=1)
    with pytest.raises(CheckpointError, match="no fitted grid"):
        OptimisedGrid.load(
            ud.solvers.linear_table(ud.solvers.DDIM(), ud.VP(), 3, (2,)).save(tmp_path / "a.safetensors")
        )
    with pytest.raises(CheckpointError, match="undiffuse-grid-1"):
        ud.Tuned.load(grid.save(tmp_path / "b.safetensors"))
    with pytest.raises(CheckpointError, match="--only grid"):
        OptimisedGrid.load(tmp_path / "none.safetensors")


def test_what_it_says_of_itself():
    """`before` and `after` are errors of the last quarter of the noises, of the grid it began with and of its own."""
    denoiser, told = RING.denoiser(ud.VP()), []
    found = fit_grid(denoiser, (2,), 6, solver="ab2", n=32, seed=3, callback=lambda *now: told.append(now))
    noise = ud.Streams.of(3, 32).normal((32, 2), dtype=torch.float32)[24:]
    truth = ud.sample(denoiser, noise=noise, solver="abm-4", steps=100)
    assert found.about["start"] in {"own", *GRIDS}
    start = None if found.about["start"] == "own" else found.about["start"]
    for name, grid in (("before", start), ("after", found.grid(ud.VP()))):
        x = ud.sample(denoiser, noise=noise, solver="ab2", steps=6, grid=grid)
        rms, median = relative_errors(x, truth)
        assert found.about[name]["rms"] == pytest.approx(rms, rel=2e-3)  # float32
        assert found.about[name]["median"] == pytest.approx(median, rel=2e-3)
    assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
    shares = [share for _, _, share in told]
    assert shares == sorted(shares, reverse=True)
    assert found.about["rounds"] == len(told)


def test_a_grid_of_one_step_is_the_only_one():
    times = ud.optimise_grid(RING.denoiser(ud.Linear()), (2,), 1, solver="ddim", n=16)
    assert times.tolist() == [1.0, 0.0]


def test_it_is_kept_whole_and_for_its_path(tmp_path):
    found = fit_grid(RING.denoiser(ud.Linear()), (2,), 3, solver="ddim", n=16, most_rounds=1)
    file = found.save(tmp_path / "optimised-3.safetensors")
    again = OptimisedGrid.load(file)
    assert again == found
    assert again.about == found.about
    assert torch.equal(again.grid(ud.Linear()), torch.tensor(found.times, dtype=F64))
    with pytest.raises(ArgumentError, match="fitted on the path Linear"):
        again.grid(ud.VP())
    with pytest.raises(CheckpointError, match="no tuned solver"):
        ud.Tuned.load(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="altered"):
        OptimisedGrid.load(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "ddpm"}, "deterministic"),
        ({"solver": "dopri5"}, "deterministic"),
        ({"solver": "dpmp-2m"}, "Did you mean 'dpmpp-2m'"),
        ({"n": 8}, "at least 16"),
        ({"steps": 65}, "1 to 64"),
        ({"steps": 0}, "1 to 64"),
        ({"reference": 1}, "at least 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ArgumentError, match=message):
        fit_grid(RING.denoiser(ud.Linear()), (2,), **({"steps": 4} | options))
