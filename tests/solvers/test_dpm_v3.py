"""DPM-Solver-v3: statistics with closed forms, the methods that it contains, its orders, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch

import undiffuse as ud
from solvers.measuring import F64, gaussian, inner_grid, mixture, numbers, strong_error
from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.fields import Denoiser, NetworkDenoiser
from undiffuse.solvers import Bound, DPMv3, ModelStatistics, Multistep, dpm_v3, estimating, model_statistics, sample
from undiffuse.solvers.dpm_v3 import divided
from undiffuse.solvers.estimating import fitted, measured
from undiffuse.solvers.tuned import profile_of
from worlds import PATHS

ENDS = ["vp", "linear", "karras", "cosine", "ve"]


def made(path, half_log_snr, linear, scaling, bias, event=(2,)) -> ModelStatistics:
    """Statistics of given numbers: each (k,), the same for all coordinates, or (k, *event)."""
    values = (v if v.ndim > 1 else v[:, None] for v in (linear, scaling, bias))
    return ModelStatistics(half_log_snr, *values, profile_of(path), repr(path), event)


def constant(path, linear: float, scaling: float, bias: float = 0.0) -> ModelStatistics:
    places = torch.linspace(-6, 6, 3, dtype=F64)
    return made(path, places, *(torch.full((3,), v, dtype=F64) for v in (linear, scaling, bias)))


def cubic(path) -> ModelStatistics:
    """Statistics that are no model's, and smooth: polynomials of degree 3 (four places make one)."""
    places = torch.tensor([-4.0, -1.5, 1.0, 4.0], dtype=F64)
    shape = torch.stack([torch.tanh(places), torch.cos(places)], 1)
    return made(path, places, 0.5 - 0.3 * shape, 0.4 * shape - 0.5, 0.2 * shape.flip(1))


def shares(law, places):
    """`l = sigma^2 / (alpha^2 c + sigma^2)` of coordinates of variance c, (k, D)."""
    return 1 / (1 + law.variances * torch.exp(2 * places[:, None]))


def inner_run(solver, field, x, grid):
    state = None
    run = Bound(field, grid=grid)
    for t, s in pairwise(grid.unbind()):
        x, state = solver.step(run, x, t, s, state, torch.zeros_like)
    return x


def unequal(path) -> torch.Tensor:
    return path.time_of(torch.tensor([-1.0, -0.75, -0.2, 0.05, 0.7, 1.0, 1.3], dtype=F64))


class Correlated(Denoiser):
    """Two coordinates with variances c_1 and c_2 along the diagonals of the plane."""

    variances = (1.5, 0.1)

    def forward(self, x_t, t, cond=None):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        up, down = ((x_t[:, 0] + sign * x_t[:, 1]) / 2 for sign in (1, -1))
        up, down = (v * alpha * c / (alpha**2 * c + sigma**2) for v, c in zip((up, down), self.variances))
        return torch.stack([up + down, up - down], 1)

    def draw(self, n):
        z = numbers(n, 2) * torch.tensor(self.variances, dtype=F64).sqrt() / math.sqrt(2)
        return torch.stack([z[:, 0] + z[:, 1], z[:, 0] - z[:, 1]], 1)


@pytest.mark.parametrize("path", ENDS)
def test_independent_gaussians_have_their_closed_form(path):
    """`f = -l m`: nothing is left that varies, s = 0 and `b = f' = 2 l (1 - l) m`."""
    law, path = gaussian(), PATHS[path]
    found = model_statistics(law.denoiser(path), numbers(8, 3), places=100)
    wanted = shares(law, found.half_log_snr)
    assert torch.allclose(found.linear, wanted, atol=1e-12)
    assert torch.equal(found.scaling, torch.zeros_like(wanted))
    assert torch.allclose(found.bias, 2 * wanted * (1 - wanted) * law.flat_mean, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("x_0", "cond"),
    [(torch.zeros(4, 2, dtype=torch.int64), None), (torch.zeros(4), None), (torch.zeros(4, 2), torch.zeros(3).long())],
)
def test_data_that_no_statistics_can_be_made_of(x_0, cond):
    with pytest.raises(ArgumentError, match="expected"):
        ud.model_statistics(ud.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).denoiser(ud.VP()), x_0, cond=cond)


def test_what_an_l_that_is_not_the_coordinate_s_own_leaves_is_followed_exactly():
    """l the mean of two coordinates': `f = (l_i - l) u - l_i m`, `s = -2 + l_i + 2 l_j`, whatever the samples are."""
    law = ud.oracles.Gaussian(torch.tensor([0.7, -0.4], dtype=F64), std=torch.tensor([1.0, 0.3], dtype=F64))
    places = torch.linspace(-3, 3, 90, dtype=F64)
    own = shares(law, places)
    linear = own.mean(1, keepdim=True).expand_as(own)
    found = measured(law.denoiser(ud.Linear()), numbers(20, 2), places)
    same, scaling, bias = fitted(places, found, linear)
    assert same is linear
    assert torch.allclose(scaling, -2 + own + 2 * own.flip(1), atol=1e-3)
    # f' = -l' u + (l_i - l) u' + l_i' (u - m), u' = -l_i (u - m), at u = 0.
    rate, mean_rate = -2 * own * (1 - own), (-2 * own * (1 - own)).mean(1, keepdim=True)
    at_zero = ((own - linear) * own - rate) * law.flat_mean
    assert torch.allclose(bias, at_zero + scaling * own * law.flat_mean, atol=2e-3)
    slope = (rate - mean_rate) - (own - linear) * own
    assert torch.allclose(scaling, slope / (own - linear), atol=1e-3)


def test_correlated_gaussians_have_their_closed_form():
    """`l = (l_1 + l_2) / 2`, `s = -2 + 3 l + (l_1 - l_2)^2 / (2 (l_1 + l_2))`, b = 0, to 5 standard errors."""
    field = Correlated(ud.VP())
    found = model_statistics(field, field.draw(4096), places=40)
    one, two = (1 / (1 + c * torch.exp(2 * found.half_log_snr)) for c in field.variances)
    inner = (found.half_log_snr > -1.5) & (found.half_log_snr < 3)
    linear = (one + two) / 2
    assert torch.allclose(found.linear[inner], linear[inner, None], atol=5 * 0.5 / math.sqrt(4096))
    scaling = -2 + 3 * linear + (one - two) ** 2 / (2 * (one + two))
    assert torch.allclose(found.scaling[inner], scaling[inner, None], atol=0.05)
    assert float(found.bias[inner].abs().max()) < 0.05
    pooled = model_statistics(field, field.draw(4096), places=40, shared=True)
    assert pooled.linear.shape == (40, 1)
    assert torch.allclose(pooled.linear, found.linear.mean(1, keepdim=True), atol=1e-12)
    assert torch.allclose(pooled.scaling[inner], scaling[inner, None], atol=0.05)


def test_a_remainder_that_is_next_to_nothing_is_not_followed_at_its_own_rate():
    """Eight modes on a circle are Gaussian, in noise, but for a remainder that grows like e^(7 lambda)."""
    angle = torch.arange(8, dtype=F64) * math.pi / 4
    law = ud.GaussianMixture(1.4 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.094, dtype=F64))
    found = model_statistics(law.denoiser(ud.VP()), law.sample(64, torch.Generator().manual_seed(0)), places=30)
    assert float(found.scaling.max()) == 1.0
    noise = numbers(64, 2)
    truth = ud.exact_flow(law.denoiser(ud.VP()), noise, ud.VP().t_max, 0.0)
    x = sample(law.denoiser(ud.VP()), noise=noise, solver=DPMv3(found), steps=6)
    assert float((x - truth).norm(dim=1).median()) < 0.05


@pytest.mark.parametrize("variable", ["angle", "half-log-snr"])
@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("path", ENDS)
def test_independent_gaussians_are_carried_from_end_to_end_in_three_steps(path, points, variable):
    law, path = gaussian(), PATHS[path]
    denoiser = law.denoiser(path)
    statistics = model_statistics(denoiser, numbers(8, 3), places=150)
    noise = path.prior_std * numbers(20, 3, seed=2)
    exact = law.flow(path, noise, path.t_max, path.t_min)
    error = float(
        (sample(denoiser, noise=noise, solver=DPMv3(statistics, points, variable=variable), steps=3) - exact)
        .abs()
        .max()
    )
    other = float((sample(denoiser, noise=noise, solver="dpmpp-2m", steps=3) - exact).abs().max())
    assert error < 6e-4 < 0.01 * other


def remainders_followed(linear=None) -> None:
    """Two coordinates with one l: every part of a step is needed, and three steps are exact."""
    law = ud.oracles.Gaussian(torch.tensor([0.7, -0.4], dtype=F64), std=torch.tensor([1.0, 0.3], dtype=F64))
    path, places = ud.Linear(), torch.linspace(-3, 3, 150, dtype=F64)
    field = law.denoiser(path)
    wanted = shares(law, places).mean(1, keepdim=True).expand(-1, 2) if linear is None else linear(places)
    found = made(path, places, *fitted(places, measured(field, numbers(20, 2), places), wanted))
    grid = path.time_of(torch.tensor([-1.0, -0.2, 0.9, 1.3], dtype=F64))
    x = numbers(8, 2)
    exact = law.flow(path, x, float(grid[0]), float(grid[-1]))
    for points in (1, 2):
        for corrector in (True, False):
            moved = inner_run(DPMv3(found, points, corrector), field, x, grid)
            assert float((moved - exact).abs().max()) < 2e-5


def test_a_remainder_of_which_all_is_known_is_carried_exactly():
    remainders_followed()
    remainders_followed(lambda places: torch.ones(len(places), 2, dtype=F64))


@pytest.mark.parametrize("part", dpm_v3.Carriage._fields)
def test_a_part_of_a_step_a_hundredth_off_is_seen(part):
    original = dpm_v3.carriage

    def off(*args):
        found = original(*args)
        return found._replace(**{part: 1.01 * getattr(found, part)})

    with mock.patch.object(dpm_v3, "carriage", off), pytest.raises(AssertionError):
        remainders_followed()


@pytest.mark.parametrize("index", range(3))
def test_a_statistic_a_hundredth_off_is_seen(index):
    original = fitted

    def off(*args):
        return tuple(v * (1.01 if i == index else 1.0) for i, v in enumerate(original(*args)))

    if index != 1:  # s = 0 there
        with mock.patch.object(estimating, "fitted", off), pytest.raises(AssertionError):
            test_independent_gaussians_have_their_closed_form("vp")
    with mock.patch(f"{__name__}.fitted", off), pytest.raises(AssertionError):
        remainders_followed()


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize(("linear", "scaling", "prediction"), [(0.0, -1.0, "noise"), (1.0, 0.0, "data")])
@pytest.mark.parametrize("path", ["vp", "linear", "karras"])
def test_without_statistics_it_is_the_noise_s_or_the_data_s_method(
    path, linear, scaling, prediction, points, corrector
):
    path = PATHS[path]
    field, grid = mixture().denoiser(path), unequal(path)
    x = mixture().perturbed(path, grid[0]).sample(6, torch.Generator().manual_seed(0))
    for variable in ("half-log-snr", "angle"):
        solver = DPMv3(constant(path, linear, scaling), points, corrector, variable)
        other = Multistep(points, prediction, variable, corrector, scale=1.0)
        assert torch.allclose(inner_run(solver, field, x, grid), inner_run(other, field, x, grid), rtol=0, atol=1e-12)


def test_a_constant_b_is_in_the_polynomial_already():
    """`f' = b` is a straight line of the half log-SNR, which two points have of themselves, and one has not."""
    path = ud.VP()
    field, grid = mixture().denoiser(path), unequal(path)[:3]
    x = mixture().perturbed(path, grid[0]).sample(6, torch.Generator().manual_seed(0))
    plain, shifted = (DPMv3(constant(path, 1.0, 0.0, b), 2, False, "half-log-snr") for b in (0.0, 0.3))
    moved, state = plain.step(Bound(field), x, grid[0], grid[1], None, torch.zeros_like)
    end = plain.step(Bound(field), moved, grid[1], grid[2], state, torch.zeros_like)[0]
    other = shifted.step(Bound(field), x, grid[0], grid[1], None, torch.zeros_like)
    assert float((other[0] - moved).abs().max()) > 1e-3
    last = shifted.step(Bound(field), moved, grid[1], grid[2], other[1], torch.zeros_like)[0]
    assert torch.allclose(last, end, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["vp", "ve", "sub-vp", "cosine", "linear", "trig", "karras"])
@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"points": 1, "corrector": False}, (100, 200)),
        ({"points": 1}, (100, 200)),
        ({"points": 2}, (100, 200)),
        ({"points": 3, "corrector": False, "variable": "half-log-snr"}, (100, 200)),
        ({"points": 3, "variable": "half-log-snr"}, (200, 400)),
        ({"points": 3}, (200, 400)),
        ({"points": 3, "pseudo": True}, (200, 400)),
    ],
    ids=str,
)
def test_the_declared_order_is_the_measured_one(settings, counts, path):
    """With statistics that are no model's: any are right, good ones make the error small."""
    path = PATHS[path]
    solver = DPMv3(cubic(path), **settings)
    coarse, fine = strong_error(solver, path, list(counts))
    assert math.log(coarse / fine) / math.log(counts[1] / counts[0]) == pytest.approx(solver.order, abs=0.2)


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_good_statistics_make_the_error_smaller_than_2m_s(path):
    path = PATHS[path]
    field = mixture().denoiser(path)
    statistics = model_statistics(field, mixture().sample(256, torch.Generator().manual_seed(0)))
    noise = numbers(64, 2)
    truth = ud.exact_flow(field, noise, path.t_max, path.t_min)
    for steps in (5, 8, 10):
        ours, theirs = (
            (sample(field, noise=noise, solver=s, steps=steps) - truth).square().mean().sqrt()
            for s in (DPMv3(statistics), "dpmpp-2m")
        )
        assert ours < 0.3 * theirs


def test_divided_differences_stand_for_derivatives():
    nodes, points = [0.3, -0.2, 0.9], np.array([0.5, 1.1])
    square = divided(nodes, points).T @ np.square(nodes)
    gap = points - nodes[0]
    assert square == pytest.approx(nodes[0] ** 2 + gap * (nodes[0] + nodes[1]) + gap**2, abs=1e-14)


def test_half_a_corrector_is_used_where_the_noise_is_less_than_the_data():
    path = ud.Linear()
    field, x = mixture().denoiser(path), numbers(4, 2)
    for first, last, like in ((-1.5, -0.1, False), (0.1, 1.5, True)):
        grid = path.time_of(torch.linspace(first, last, 5, dtype=F64))
        half, other = (inner_run(DPMv3(cubic(path), 2, c), field, x, grid) for c in ("half", like))
        assert torch.equal(half, other)
    assert DPMv3(cubic(path), 2, "half").order == 2


def test_a_model_without_noise_in_its_data_ends_in_its_mean():
    """Two points: l tends to 1, and the last step is the closed form E[x_0]."""
    law = ud.Empirical(torch.tensor([[-1.0, 0.5], [1.0, -0.3]], dtype=F64))
    field = law.denoiser(ud.Linear())
    statistics = model_statistics(field, law.sample(64, torch.Generator().manual_seed(0)))
    assert float(statistics.linear[-1].min()) > 0.999
    x = sample(field, (64, 2), solver=DPMv3(statistics), steps=10, seed=1, dtype=F64)
    assert float((x[:, None] - law.data).norm(dim=2).min(1).values.median()) < 1e-4


def test_out_of_pure_noise_a_model_that_knows_its_data_makes_a_straight_line():
    """E[x_0] = m whatever x: l = 1, and the flow is `alpha m + sigma z`."""

    class Known(Denoiser):
        def forward(self, x_t, t, cond=None):
            return torch.full_like(x_t, 3.0)

    path, z = ud.Linear(), numbers(4, 2)
    solver = DPMv3(model_statistics(Known(path), 3.0 + 0 * z))
    grid = torch.tensor([1.0, 0.7, 0.4], dtype=F64)
    x = inner_run(solver, Known(path), z, grid)
    assert torch.allclose(x, 0.6 * 3.0 + 0.4 * z, rtol=0, atol=1e-9)


def test_between_places_a_cubic_is_itself_and_beyond_them_it_stays():
    places = torch.tensor([-2.0, -1.2, 0.1, 0.7, 1.9, 2.4], dtype=F64)
    values = 0.3 * places**3 - places + 0.5
    found = made(ud.VP(), places, values, 2 * values, 3 * values)
    asked = torch.tensor([[-1.9, -1.2, 0.3], [1.0, 2.2, 2.4]], dtype=F64)
    wanted = (0.3 * asked**3 - asked + 0.5)[..., None]
    for factor, value in enumerate(found.at(asked), 1):
        assert torch.allclose(value, factor * wanted, atol=1e-13)
    assert torch.equal(found.at(torch.tensor(9.0, dtype=F64))[0], found.linear[-1])


def test_batches_and_a_callback_change_nothing():
    field, x_0 = mixture().denoiser(ud.VP()), numbers(20, 2)
    told = []
    one = model_statistics(field, x_0, places=5, batch=7, callback=lambda *now: told.append(now))
    two = model_statistics(field, x_0, places=5)
    assert told[-1] == (100, 100)
    for a, b in zip(one.values, two.values):
        assert torch.allclose(a, b, atol=1e-9)


def test_data_of_half_precision_are_as_good_as_of_single():
    field, x_0 = mixture().denoiser(ud.VP()), numbers(64, 2).bfloat16()
    half, single = (model_statistics(field, x, places=9) for x in (x_0, x_0.float()))
    assert all(map(torch.equal, half.values, single.values))


def test_conditions_stay_with_their_samples():
    class Classes(Denoiser):
        """x_0 is 5 times its class, and the model knows."""

        def forward(self, x_t, t, cond=None):
            assert cond is not None
            return 5.0 * cond[:, None].to(x_t) + 0 * x_t

    labels = torch.arange(30) % 3
    x_0 = 5.0 * labels[:, None].to(F64).expand(-1, 2)
    found = model_statistics(Classes(ud.Linear()), x_0, cond=labels, places=6, batch=7)
    assert torch.allclose(found.linear, torch.ones_like(found.linear))
    assert float(found.scaling.abs().max()) < 1e-6  # f = -E[x_0] is another for each class, and does not change
    x = sample(Classes(ud.Linear()), (30, 2), solver=DPMv3(found), steps=3, cond=labels, seed=0, dtype=F64)
    assert torch.allclose(x, x_0, atol=1e-9)


@pytest.fixture(scope="module")
def known() -> ModelStatistics:
    return model_statistics(mixture().denoiser(ud.Linear()), numbers(8, 2), places=6)


def test_a_file_brings_back_the_same_samples(known, tmp_path):
    known = known.with_about(step=3)
    again = ModelStatistics.load(known.save(tmp_path / "solvers" / "dpm-v3.safetensors"))
    assert [file.name for file in (tmp_path / "solvers").iterdir()] == ["dpm-v3.safetensors"]
    assert (again.about, again.profile, again.event) == (known.about, known.profile, (2,))
    field = mixture().denoiser(ud.Linear())
    assert torch.equal(*(sample(field, (9, 2), solver=DPMv3(s), steps=4, seed=3) for s in (known, again)))


def test_files_that_are_not_whole_are_refused(known, tmp_path):
    file = known.save(tmp_path / "one.safetensors")
    whole = file.read_bytes()
    with pytest.raises(CheckpointError, match="undiffuse statistics RUN"):
        ModelStatistics.load(tmp_path / "none.safetensors")
    for content, words in (
        (whole[:-9], "cut short"),
        (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], "altered"),
        (b"", "cut short"),
        (whole.replace(b"undiffuse-statistics-1", b"undiffuse-statistics-2"), "holds no statistics"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            ModelStatistics.load(file)


def test_another_path_shape_or_prediction_is_refused(known):
    field = mixture().denoiser(ud.Linear())
    for denoiser, shape, words in (
        (mixture().denoiser(ud.VP()), (2, 2), "of the path Linear"),
        (field, (2, 3), r"these statistics are of \(2,\)"),
    ):
        with pytest.raises(ArgumentError, match=words):
            sample(denoiser, shape, solver=DPMv3(known), steps=3)
    net = torch.nn.Module()
    with pytest.raises(ArgumentError, match="predicts 'velocity', not 'data'"):
        sample(
            NetworkDenoiser(net, ud.Linear(), prediction="data"),
            (2, 2),
            solver=DPMv3(replace(known, prediction="velocity")),
            steps=3,
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": 0}, "1 to 4"),
        ({"points": 2.0}, "1 to 4"),
        ({"corrector": "full"}, "'half'"),
        ({"variable": "time"}, "variable"),
        ({"statistics": "dpm-v3.safetensors"}, "ModelStatistics.load"),
    ],
)
def test_bad_settings(known, changes, words):
    with pytest.raises(ArgumentError, match=words):
        DPMv3(**{"statistics": known, **changes})


def test_bad_arguments_of_statistics(known):
    field = mixture().denoiser(ud.VP())
    for x_0, changes, words in (
        (numbers(1, 2), {}, "at least 2"),
        (numbers(4, 2), {"places": 1}, "places is 1"),
        (numbers(4, 2), {"batch": 0}, "batch is 0"),
        (numbers(4, 2) * math.nan, {}, "infinite or NaN"),
    ):
        with pytest.raises(ArgumentError, match=words):
            model_statistics(field, x_0, **changes)
    for changes, words in (
        ({"half_log_snr": known.half_log_snr.flip(0)}, "rising"),
        ({"linear": known.linear[:, :1].expand(-1, 3)}, "expected"),
        ({"bias": known.bias * math.inf}, "finite"),
        ({"scaling": known.scaling.float()}, "float64"),
    ):
        with pytest.raises(ArgumentError, match=words):
            replace(known, **changes)


def test_the_name_alone_says_what_is_missing():
    with pytest.raises(ArgumentError, match="undiffuse statistics RUN"):
        sample(mixture().denoiser(ud.Linear()), (2, 2), solver="dpm-v3", steps=3)


def test_the_grid_within_reach_of_the_order_test():
    """The inner grid of the order test is where the cubic statistics are, not their constant ends."""
    grid = inner_grid(ud.VP(), 4)
    assert float(ud.VP().half_log_snr(grid).abs().max()) < 4
