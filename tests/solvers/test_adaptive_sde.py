"""Adaptive steps of the reverse SDE: each sample by itself, one Brownian motion, the law of the data."""

from __future__ import annotations

import pytest
import torch

from solvers.measuring import F64, gaussian, inner_grid, mixture, moments_after, numbers
from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.metrics import energy_test
from undiffuse.oracles import GaussianMixture
from undiffuse.paths import VP, Linear
from undiffuse.solvers import SRK, AdaptiveSDE, Bound, StreamNoise, integrate, make_grid, sample
from undiffuse.solvers.adaptive_sde import _Tree
from worlds import PATHS

INFINITE = AdaptiveSDE(rtol=0.0, atol=float("inf"))


class Still(Denoiser):
    def forward(self, x_t, t, cond=None):
        return torch.full_like(x_t, 0.3)


def run(field, streams, cond=None, solver=AdaptiveSDE(0.05, 0.02), steps=3):  # noqa: B008
    """Ends and calls of each sample."""
    noise = StreamNoise(streams, (len(streams), 2), F64, torch.device("cpu"))
    grid = make_grid(field.path, steps, "canonical")
    bound = Bound(field, cond, grid)
    x = integrate(bound, field.path.prior_std * noise(), grid, solver, noise)
    return x, bound.per_sample


@pytest.mark.parametrize("path", ["vp", "ve", "linear"])
def test_a_sample_and_its_calls_do_not_depend_on_its_neighbours(path):
    law = GaussianMixture(
        mixture().flat_means, torch.tensor([0.5, 0.05, 0.6], dtype=F64), labels=torch.tensor([0, 1, 2])
    )
    field, cond = law.denoiser(PATHS[path]), torch.arange(40) % 3
    x, calls = run(field, Streams.of(5, 40), cond)
    assert len(calls.unique()) > 5  # they do differ
    for rows in ([17], [3, 17, 9], list(range(39, -1, -1))):
        rows = torch.tensor(rows)
        alone, own = run(field, Streams.of(5, 40).select(rows), cond[rows])
        assert torch.equal(own, calls[rows])
        assert torch.allclose(alone, x[rows], atol=1e-9)


@pytest.mark.parametrize("path", ["vp", "ve", "linear", "karras"])
def test_samples_have_the_law_of_the_data(path):
    """Energy distance below its 99 % quantile, seeds fixed; variances within 5 standard errors of their truth."""
    n, path, law = 2000, PATHS[path], mixture()
    end = law.perturbed(path, path.t_min)
    x = sample(law.denoiser(path), (n, 2), solver=AdaptiveSDE(0.02, 0.01), steps=4, seed=1, dtype=F64)
    result = energy_test(x, end.sample(n, torch.Generator().manual_seed(5)), permutations=200)
    assert result.distance < result.quantile
    true = end.covariance.diagonal()
    assert torch.allclose(x.var(0), true, rtol=5 * (2 / n) ** 0.5 * 0.8)


@pytest.mark.parametrize("path", ["vp", "ve", "linear"])
def test_with_infinite_tolerance_it_has_order_2(path):
    class Chosen(Streams):
        """Streams that hand out the draws of a noise callable."""

        def __init__(self, noise):
            super().__init__(torch.zeros(1, dtype=torch.int64))
            self.noise = noise

        def select(self, index):
            return self

        def normal(self, shape, *, dtype=torch.float32, device=None):
            return self.noise()

    class Probed(AdaptiveSDE):
        def step(self, field, x, t, s, state, noise):
            noise.branch = lambda: Chosen(noise)
            return super().step(field, x, t, s, state, noise)

    errors = []
    for n in (50, 100):
        grid = inner_grid(PATHS[path], n)
        start, end = (gaussian().perturbed(PATHS[path], t) for t in (grid[0], grid[-1]))
        mean, variance = moments_after(Probed(0.0, float("inf")), PATHS[path], grid, start.flat_mean, start.variances)
        errors.append(float((variance / end.variances - 1).abs().max()))
        assert torch.allclose(mean, end.flat_mean, atol=1e-4)
    assert torch.tensor(errors[0] / errors[1]).log2() == pytest.approx(2, abs=0.2)


class Unit(Streams):
    """Draw k is 1 in row k and 0 elsewhere: what is made of the draws is read off row by row."""

    def select(self, index):
        return Unit(self.keys[index])

    def normal(self, shape, *, dtype=torch.float32, device=None):
        return torch.eye(shape[0], dtype=dtype)[self.draw].reshape(shape)


def test_the_noise_of_any_parts_is_one_brownian_motion():
    """Leaves of unequal depth: independent increments, each with the variance of its step in SNR; unit draws."""
    n, path = 12, VP()
    tree = _Tree(path, torch.zeros(n, 1, dtype=F64), 0.6, 0.1, Unit.of(0, n))
    rows, parts, spreads = torch.arange(n), [], []

    def leaf():
        snr = tree._snr(torch.stack([tree.times(rows[:1], 0.0)[0], tree.times(rows[:1], 1.0)[0]]))
        parts.append(tree.noise[:, 0].clone())
        spreads.append(float(snr[1] - snr[0]))
        tree.advance(rows)
        tree.round += 1

    def halve(times):
        for _ in range(times):
            tree.split(rows)
            tree.round += 1

    whole = tree.noise[:, 0].clone()
    halve(2)
    leaf()
    halve(1)
    leaf()
    leaf()
    leaf()
    assert not bool(tree.open.any())
    assert torch.allclose(sum(parts), whole)
    increments = torch.stack(parts)
    assert torch.allclose(increments @ increments.T, torch.tensor(spreads, dtype=F64).diag(), atol=1e-12)
    ends = (path.alpha(torch.tensor([0.1, 0.6])) / path.sigma(torch.tensor([0.1, 0.6]))).square()
    assert sum(spreads) == pytest.approx(float(ends[0] - ends[1]), rel=1e-6)


def test_the_first_try_is_ancestral_sampling_and_the_result_heun_s():
    path, field = VP(), mixture().denoiser(VP())
    t, s = path.time_of(torch.tensor([-0.2, 0.1], dtype=F64))
    noise = StreamNoise(Streams.of(3, 5), (5, 2), F64, torch.device("cpu"))
    w = Streams.of(3, 5).fold(0).normal((5, 2), dtype=F64)
    x, bound = numbers(5, 2), Bound(field)
    moved, _ = INFINITE.step(bound, x, t, s, INFINITE.init(bound, x, t), noise)
    first = field(x, t)
    mean, std = path.posterior(x, first, t, s)
    mean, _ = path.posterior(x, 0.5 * (first + field(mean + std * w, s)), t, s)
    assert torch.allclose(moved, mean + std * w, atol=1e-12)


def test_a_smaller_tolerance_takes_more_calls_and_an_easy_law_few():
    field = mixture().denoiser(VP())
    calls = [
        float(run(field, Streams.of(1, 50), solver=AdaptiveSDE(t, t / 2))[1].double().mean()) for t in (0.2, 0.05, 0.01)
    ]
    # The error of a step is of order h^(3/2): four times the calls for a tolerance eight times smaller, somewhat.
    assert calls[0] < 0.7 * calls[1] < 0.7 * 0.6 * calls[2]
    assert float(run(Still(VP()), Streams.of(1, 50))[1].double().mean()) < 30


@pytest.mark.parametrize("path", ["vp", "ve", "linear", "zero-snr-table"])
def test_every_count_makes_that_many_steps(path):
    path = PATHS[path]
    for steps in (1, 2, 3, 17, 64):
        info = sample(Still(path), (2, 3), solver="adaptive-sde", steps=steps, seed=1, return_info=True)
        assert len(info.trajectory) == steps + 1
        if path.t_low > path.t_min:
            assert torch.allclose(info.x, torch.full((2, 3), 0.3), atol=1e-5)


def test_one_step_of_the_grid_goes_through_all_levels():
    # The interval that ends in sigma = 0 is walked to t_low before its closed form.
    n, law, path = 1000, mixture(), Linear()
    x = sample(law.denoiser(path), (n, 2), solver=AdaptiveSDE(0.02, 0.01), steps=1, seed=2, dtype=F64)
    result = energy_test(x, law.sample(n, torch.Generator().manual_seed(6)), permutations=200)
    assert result.distance < result.quantile


@pytest.mark.parametrize("path", ["linear", "cosine", "trig"])
@pytest.mark.parametrize("steps", [1, 5])
def test_what_a_network_says_of_pure_noise_may_vary(path, steps):
    """Out of alpha = 0 no half of a step has a smaller error; the law is still that of the data."""
    path = PATHS[path]
    exact = gaussian().denoiser(path)

    class Wrong(Denoiser):
        def forward(self, x_t, t, cond=None):
            return exact(x_t, t) + 0.03 * torch.tanh(x_t)

    assert torch.isfinite(
        sample(Wrong(path), (8, *gaussian().flat_mean.shape), solver="adaptive-sde", steps=steps, seed=0, dtype=F64)
    ).all()
    x = sample(
        exact, (4000, *gaussian().flat_mean.shape), solver=AdaptiveSDE(0.0, 0.005), steps=steps, seed=1, dtype=F64
    )
    assert torch.allclose(x.var(0) / gaussian().variances, torch.ones(()).double(), atol=5 * (2 / 4000) ** 0.5)


def test_the_step_out_of_pure_noise_is_ddim_s():
    path, x = Linear(), numbers(5, 2)
    bound = Bound(mixture().denoiser(path))
    noise = StreamNoise(Streams.of(3, 5), (5, 2), F64, torch.device("cpu"))
    end = torch.tensor([1.0, 0.9995], dtype=F64)
    moved, _ = INFINITE.step(bound, x, end[0], end[1], INFINITE.init(bound, x, end[0]), noise)
    assert torch.allclose(moved, 0.0005 * bound(x, end[0]) + 0.9995 * x, rtol=0, atol=1e-12)
    assert not torch.allclose(moved, 0.9995 * x, rtol=0, atol=1e-5)


def test_what_cannot_be_done_is_said():
    class Rough(Denoiser):
        def forward(self, x_t, t, cond=None):
            return 1e3 * torch.sin(1e9 * x_t)

    with pytest.raises(SamplingError, match=r"halved 20 times .* above the tolerance"):
        sample(Rough(VP()), (2, 3), solver=AdaptiveSDE(0.0, 1e-12), steps=2, seed=0, dtype=F64)

    class Broken(Denoiser):
        def forward(self, x_t, t, cond=None):
            return x_t * float("nan")

    with pytest.raises(SamplingError, match="in step 0"):
        sample(Broken(VP()), (2, 3), solver="adaptive-sde", steps=2, seed=0)
    grid, x, field = make_grid(VP(), 2, "time"), numbers(2, 3), gaussian().denoiser(VP())
    with pytest.raises(ArgumentError, match="StreamNoise"):
        integrate(field, x, grid, AdaptiveSDE(), lambda: x)
    with pytest.raises(ArgumentError, match="as a Bound"):
        AdaptiveSDE().init(field, x, grid[0])
    with pytest.raises(ArgumentError, match="atol 0"):
        AdaptiveSDE(atol=0.0)


def test_bound_at_calls_some_rows_at_their_times_and_counts_them():
    law = GaussianMixture(mixture().flat_means, torch.full((3,), 0.3, dtype=F64), labels=torch.tensor([0, 1, 2]))
    field, x, t = law.denoiser(VP()), numbers(4, 2), torch.tensor([0.2, 0.7], dtype=F64)
    labels, rows = torch.tensor([0, 1, 2, 1]), torch.tensor([3, 0])
    bound = Bound(field, labels)
    bound(x, t[0])
    bound.track(4)
    answer = bound.at(x[rows], t, rows)
    assert torch.allclose(answer[0], field(x[3:4], t[0], labels[3:4])[0])
    assert torch.allclose(answer[1], field(x[:1], t[1], labels[:1])[0])
    bound(x, t[1])
    assert bound.calls == 3
    assert bound.per_sample is not None
    assert bound.per_sample.tolist() == [3, 2, 2, 3]
    assert SRK().order == AdaptiveSDE().order == 2
