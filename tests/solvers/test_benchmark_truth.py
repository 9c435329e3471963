"""The instrument of `benchmarks/solvers.py`: its true trajectories and its two errors, where both are known."""

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import undiffuse as ud

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def truth():
    return benchmark("solver_truth")


@pytest.fixture
def solvers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return benchmark("solvers")


@pytest.fixture(scope="module")
def gaussian():
    return ud.GaussianMixture(torch.tensor([[1.5, -0.5]], dtype=torch.float64), torch.tensor([[0.3, 2.0]]).double())


@pytest.fixture(scope="module")
def case(truth, gaussian):
    noise = ud.Streams.of(3, 5).normal((5, 2), dtype=torch.float64)
    states, end = truth.trajectories(gaussian, noise)
    return truth.Case("gaussian", gaussian, torch.from_numpy(states), torch.from_numpy(end))


def flow(case, alpha, sigma):
    """Of one Gaussian `N(m, s^2)`: `alpha m + sqrt(alpha^2 s^2 + sigma^2) z`, coordinate by coordinate."""
    mean, variance, noise = case.law.flat_means[0], case.law.variances[0], case.states[0]
    return alpha * mean + (alpha**2 * variance + sigma**2).sqrt() * noise


def test_the_end_is_that_of_the_closed_form(case):
    torch.testing.assert_close(case.end, flow(case, 1.0, 0.0), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 80.0), (1.0, 21.0), (0.01, 1.0), (1e-6, 0.999999)])
def test_a_start_lies_on_the_curve_at_any_scale(case, alpha, sigma):
    """Between the nodes too, to 1e-10 of its size."""
    torch.testing.assert_close(case.start(alpha, sigma) / sigma, flow(case, alpha, sigma) / sigma, rtol=0, atol=1e-10)


def test_a_start_with_more_signal_is_refused(case):
    with pytest.raises(ValueError, match="too easy"):
        case.start(1.0, 19.0)


def test_a_peer_gets_the_posterior_of_the_signal_and_of_the_noise(case):
    """`alpha E[x_0] + sigma E[eps]` is x; E[x_0] is the Gaussian's; at sigma = 0 the noise is 0."""
    x, alpha, sigma = torch.tensor([[0.7, -1.1]]).double(), 0.6, 0.9
    mean, variance = case.law.flat_means, case.law.variances
    x_0, eps = case.both(x, alpha, sigma)
    known = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
    torch.testing.assert_close(x_0, known)
    torch.testing.assert_close(alpha * x_0 + sigma * eps, x)
    assert not case.both(x, 1.0, 0.0)[1].any()
    assert case.calls == 2


def test_the_ring_has_unit_variance_and_modes_of_0_2_in_3(truth):
    law = truth.ring()
    radius, std = law.flat_means.norm(dim=1), law.variances.sqrt()
    covariance = law.flat_means.T @ law.flat_means / 8 + law.variances.mean() * torch.eye(2)
    torch.testing.assert_close(covariance, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(std.flatten() / radius, torch.full((8,), 0.2 / 3, dtype=torch.float64))


def test_the_two_errors(truth):
    """Truth of length 5 in each of 3 rows, gaps 0, 1 and 7: RMS sqrt(50 / 3) / 5, median 1 / 5."""
    end = torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, -5.0]]).double()
    gap = torch.tensor([[0.0, 0.0], [0.6, 0.8], [7.0, 0.0]]).double()
    rms, median = truth.errors(end + gap, end)
    assert rms == pytest.approx(math.sqrt(50 / 3) / 5)
    assert median == pytest.approx(0.2)


def test_a_truth_is_computed_once(truth, tmp_path):
    made = []

    def make():
        made.append(1)
        return np.ones((2, 3, 1)), np.zeros((3, 1))

    for _ in range(2):
        states, end = truth.cached(tmp_path / "new" / "flow.npz", make)
        assert states.sum() == 6
        assert end.shape == (3, 1)
    assert len(made) == 1
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["flow.npz"]


@pytest.fixture
def network(solvers, monkeypatch, gaussian):
    """A run whose network is the Gaussian's denoiser, in single precision, of three classes."""

    class Run:
        facts = SimpleNamespace(shape=[2], num_classes=3)

        def denoiser(self):
            class Single(ud.Denoiser):
                def forward(self, x_t, t, cond=None):
                    assert x_t.dtype == torch.float32
                    asked.append(cond)
                    return gaussian.denoiser(ud.Linear())(x_t, t)

            return Single(ud.Linear())

    asked = []
    monkeypatch.setattr(ud, "load_run", lambda folder: Run())
    return solvers.NetworkCase(Path("run"), 5, 3), asked


def closed_form(case, gaussian, alpha, sigma):
    mean, variance = gaussian.flat_means[0], gaussian.variances[0]
    return alpha * mean + (alpha**2 * variance + sigma**2).sqrt() * case.noise


def test_the_flow_of_a_network_is_that_of_its_answers(network, gaussian):
    case, _ = network
    torch.testing.assert_close(case.end, closed_form(case, gaussian, 1.0, 0.0), rtol=0, atol=1e-5)
    for alpha, sigma in ((0.0, 1.0), (1.0, 80.0), (0.04, 0.96), (1.0, 20.0)):
        expected = closed_form(case, gaussian, alpha, sigma) / sigma
        torch.testing.assert_close(case.start(alpha, sigma) / sigma, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="too easy"):
        case.start(1.0, 19.0)


def test_a_network_is_asked_of_each_row_in_its_class(solvers, network, gaussian):
    case, asked = network
    assert case.labels(7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    asked.clear()
    x, alpha, sigma = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double(), 0.6, 0.9
    x_0, eps = case.both(x, alpha, sigma)
    mean, variance = gaussian.flat_means, gaussian.variances
    known = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
    torch.testing.assert_close(x_0, known, rtol=0, atol=1e-6)
    torch.testing.assert_close(alpha * x_0 + sigma * eps, x)
    solvers.Ours("ddim", None, case.path).run(case, 3)
    assert [len(cond) for cond in asked] == [5, 1, 1, 1, 5, 5, 5]
    assert all(cond.tolist() == [0, 1, 2, 0, 1][: len(cond)] for cond in asked)


@pytest.mark.parametrize(("solver", "calls", "steps"), [("ddim", 7, 7), ("heun", 7, 4), ("heun", 8, 4), ("heun", 1, 1)])
def test_a_column_is_given_the_most_steps_that_fit(solvers, case, solver, calls, steps):
    """Heun's method takes two calls a step, one in the last: 2 n - 1."""
    choice = solvers.Ours(solver, "time", ud.Linear())
    x = ud.sample(case.law.denoiser(ud.Linear()), noise=case.states[0], solver=solver, grid="time", steps=steps)
    torch.testing.assert_close(choice.run(case, calls), x)


def test_a_run_starts_on_the_true_curve_of_its_path(solvers, case):
    """On a path that starts at sigma = 80 many steps lead to the true end; from pure noise they would miss by 0.5 %."""
    x = solvers.Ours("heun", "karras", ud.Karras()).run(case, 199)
    assert case.errors(x)[0] < 1e-3


def test_the_geometric_mean_is_over_5_to_30_calls_and_sees_a_failure(solvers):
    own = {5: (1.0, 1.0), 20: (1.0, 100.0), 50: (1.0, 7.0)}
    assert solvers.geometric_mean(own) == pytest.approx(10.0)
    assert solvers.geometric_mean(own | {6: (1.0, math.inf)}) == math.inf
