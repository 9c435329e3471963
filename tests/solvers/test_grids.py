"""Grids: ends, counts, spacing, and the times a caller may give."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from scipy.special import lambertw

from solvers.measuring import F64
from undiffuse.core.errors import ArgumentError
from undiffuse.paths import VE, VP, Karras, Linear, Path, Trig
from undiffuse.solvers import GRIDS, Bound, Euler, Heun, check_grid, karras, make_grid, mixed
from worlds import PATHS


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("path", PATHS)
def test_every_count_has_exact_ends_and_decreases(kind, path):
    path = PATHS[path]
    for steps in (*range(1, 65), 300):
        grid = make_grid(path, steps, kind)
        assert grid.dtype == F64
        assert len(grid) == steps + 1
        assert float(grid[0]) == path.t_max
        assert float(grid[-1]) == path.t_min
        assert bool((grid[1:] < grid[:-1]).all())
        # no network is called between t_min and t_low
        assert steps == 1 or float(grid[-2]) >= path.t_low


def test_the_spacing_is_the_one_named():
    def equal(values):
        steps = values.diff()
        return torch.allclose(steps, steps[:1].expand_as(steps), rtol=1e-9)

    linear = Linear()
    assert equal(make_grid(linear, 10, "time"))
    assert equal(make_grid(linear, 10, "quadratic").sqrt())
    assert equal(linear.angle(make_grid(linear, 10, "angle")))
    # on the straight line the canonical time is t
    assert equal(make_grid(linear, 10, "canonical") ** (2 / 3))
    assert torch.allclose(make_grid(Trig(), 10, "time"), make_grid(Trig(), 10, "angle"))
    assert equal(VP().half_log_snr(make_grid(VP(), 10, "half-log-snr")[:-1]))
    # EDM's own formula (Karras et al. 2022, eq. 5), with its appended 0
    i = torch.arange(10, dtype=F64)
    expected = (80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(make_grid(Karras(), 10, "karras")[:-1], expected)
    assert equal(VE().half_log_snr(make_grid(VE(), 10, "half-log-snr")))


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_takes_a_rho_of_the_caller_s(rho):
    """Karras et al. 2022, eq. 5, and its limit of large rho."""
    i = torch.arange(10, dtype=F64)
    expected = (80 ** (1 / rho) + i / 9 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    assert torch.allclose(make_grid(Karras(), 10, karras(rho))[:-1], expected, rtol=1e-9)
    limit = make_grid(Karras(), 10, karras(1e9))
    assert torch.allclose(limit, make_grid(Karras(), 10, "half-log-snr"), rtol=1e-5)


def test_a_mixture_of_time_and_its_root_in_closed_form():
    """(1 - w) u + w (1 - sqrt(1 - u)) = k / n with t = 1 - u is a quadratic in sqrt(t)."""
    w, k = 0.3, torch.arange(13, dtype=F64) / 12
    # (1 - w) t + w sqrt(t) = 1 - k
    root = (-w + (w**2 + 4 * (1 - w) * (1 - k)).sqrt()) / (2 * (1 - w))
    found = make_grid(Linear(), 12, mixed("time", "quadratic", w))
    assert torch.allclose(found, root.square(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("w", [0.2, 0.8])
def test_a_mixture_of_sigma_and_its_logarithm_in_closed_form(w):
    """On VE in sigma: `(1 - w) (t - b) / (a - b) + w log(t / b) / log(a / b) = c` has t by Lambert's function."""
    path, steps = Karras(), 9
    a, b = 80.0, 0.002
    c = 1 - torch.arange(steps, dtype=F64) / (steps - 1)
    p, q = (1 - w) / (a - b), w / math.log(a / b)
    expected = q / p * lambertw((p / q * torch.exp((c + p * b + q * math.log(b)) / q)).numpy()).real
    found = make_grid(path, steps, mixed(karras(1.0), "half-log-snr", w))
    assert torch.allclose(found[:-1], torch.as_tensor(expected), rtol=1e-9)
    assert float(found[-1]) == 0


@pytest.mark.parametrize("path", PATHS)
def test_mixed_is_half_of_the_angle_and_half_of_half_log_snr(path):
    path = PATHS[path]
    grid = make_grid(path, 17, "mixed")
    inner = torch.cat([torch.tensor([path.t_high], dtype=F64), grid[1:] if path.t_min == path.t_low else grid[1:-1]])
    total = sum((x - x[0]) / (x[-1] - x[0]) for x in (path.angle(inner), path.half_log_snr(inner))) / 2
    assert torch.allclose(total.diff(), torch.full_like(total[1:], 1 / (len(total) - 1)), rtol=1e-7)


def test_shares_0_and_1_are_the_two_grids():
    for path in PATHS.values():
        for first, second in (("time", "karras"), ("half-log-snr", "angle")):
            for share, kind in ((0, first), (1.0, second)):
                assert torch.equal(make_grid(path, 11, mixed(first, second, share)), make_grid(path, 11, kind))


@pytest.mark.parametrize("path", PATHS)
def test_every_mixture_decreases_at_every_count(path):
    path = PATHS[path]
    spacings = [mixed("time", "half-log-snr", 0.1), mixed("quadratic", karras(3.0), 0.9), mixed("angle", "canonical")]
    for spacing in spacings:
        for steps in range(1, 65):
            grid = make_grid(path, steps, spacing)
            assert (float(grid[0]), float(grid[-1]), len(grid)) == (path.t_max, path.t_min, steps + 1)
            assert bool((grid[1:] < grid[:-1]).all())
            assert steps == 1 or float(grid[-2]) >= path.t_low


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixed("time", "angle", 1.5), "in \\[0, 1\\]"),
        (lambda: mixed("time", "angel"), "Did you mean 'angle'"),
        (lambda: karras(0.0), "above 0"),
        (lambda: karras(float("inf")), "half-log-snr"),
    ],
)
def test_wrong_mixtures_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize("kind", ["half-log-snr", "karras"])
def test_levels_start_below_an_infinite_noise_and_end_above_none(kind):
    path = Linear()
    grid = make_grid(path, 10, kind)
    assert float(grid[-2]) == path.t_low
    inner = path.half_log_snr(grid[1:-1])
    assert torch.isfinite(inner).all()
    spread = inner if kind == "half-log-snr" else torch.exp(-inner / 7)
    first = path.half_log_snr(torch.tensor(path.t_high, dtype=F64))
    first = first if kind == "half-log-snr" else torch.exp(-first / 7)
    assert torch.allclose(torch.cat([first[None], spread]).diff(), spread.diff().mean().expand(9), rtol=1e-9)


def test_equal_steps_do_not_fall_below_t_low():
    grid = make_grid(VP(), 200, "quadratic")
    assert float(grid[-2]) == VP().t_low


def test_runge_kutta_avoids_steps_that_turn_the_noise():
    # VE's time is log sigma: a canonical step there is longer than Euler's method allows.
    for solver in (Euler(), Heun()):
        assert torch.equal(solver.default_grid(VE(), 20), make_grid(VE(), 20, "karras"))
        for path in (VP(), Linear(), Karras()):
            assert torch.equal(solver.default_grid(path, 20), make_grid(path, 20, "canonical"))


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "10"])
def test_steps_must_be_a_count(steps):
    with pytest.raises(ArgumentError, match="at least 1"):
        make_grid(VP(), steps)


def test_unknown_kinds_offer_the_nearest():
    with pytest.raises(ArgumentError, match="Did you mean 'karras'"):
        make_grid(VP(), 5, "karas")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (torch.tensor([1, 0]), "expected a name"),
        (torch.zeros(2, 2), "one-dimensional"),
        (torch.tensor([1.0]), "2 or more"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), r"time 2 is 0.5 after 0.5"),
        (torch.tensor([0.0, 1.0]), "decrease strictly"),
        (torch.tensor([1.5, 0.0]), "expected times in"),
        (torch.tensor([1.0, -0.1]), "expected times in"),
        (torch.tensor([1.0, float("nan"), 0.0]), "expected times in"),
    ],
)
def test_a_bad_grid_is_refused(grid, message):
    with pytest.raises(ArgumentError, match=message):
        check_grid(VP(), grid)


def test_a_float32_grid_may_touch_the_ends():
    path = Karras(sigma_max=80.1)
    times = check_grid(path, torch.tensor([80.1, 1.0, 0.0], dtype=torch.float32))
    assert times.dtype == F64
    assert float(times[0]) <= path.t_max


class Bent(Path):
    """`alpha = 1 - t`, `sigma = t^power`: no value, its power may change."""

    power = 1.0

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t**self.power


class Named:
    """What a `Bound` needs of a denoiser."""

    def __init__(self, path):
        self.path = path


def test_what_is_kept_of_a_path_is_of_that_path_as_it_is():
    """Grids, scales and rates are kept for paths that are equal, with the same functions; for no others."""
    quarter = torch.tensor(0.25, dtype=F64)

    def seen(path):
        field = Bound(Named(path), grid=torch.tensor([0.5, 0.25], dtype=F64))
        return [float(make_grid(path, 2, "angle")[1]), *field.scales(quarter), *field.rates(quarter)]

    path = Bent()
    assert seen(path) == pytest.approx([0.5, 0.75, 0.25, -1.0, 1.0], abs=1e-12)
    path.power = 2.0
    # The middle of the angle: t^2 = 1 - t.
    assert seen(path) == pytest.approx([(5**0.5 - 1) / 2, 0.75, 0.0625, -1.0, 0.5], abs=1e-12)
    usual = seen(VP())
    assert seen(VP(beta_max=10.0))[1:] != usual[1:]
    with mock.patch.object(VP, "sigma", lambda self, t: 0.5 * t):
        assert seen(VP())[2] == 0.125
    assert seen(VP()) == usual


def test_a_path_that_compares_by_less_than_it_is_made_of_keeps_nothing():
    class Slow(VP):
        def __init__(self, power):
            super().__init__()
            object.__setattr__(self, "power", power)

        def alpha(self, t):
            return super().alpha(t**self.power)

    assert Slow(1.0) == Slow(3.0)
    times = torch.tensor([0.5, 0.25], dtype=F64)
    found = [Bound(Named(Slow(power)), grid=times).scales(times[1])[0] for power in (1.0, 3.0)]
    wanted = [float(VP().alpha(torch.tensor(0.25**power, dtype=F64))) for power in (1.0, 3.0)]
    assert found == pytest.approx(wanted, rel=1e-12)


def test_a_grid_is_the_caller_s_own():
    grid = make_grid(Linear(), 4, "angle")
    before = grid.clone()
    grid.mul_(2)
    assert torch.equal(make_grid(Linear(), 4, "angle"), before)
