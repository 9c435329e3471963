"""The classical methods: order conditions, one step against velocities written out, steps at the ends of a path."""

from __future__ import annotations

import pytest
import torch

import undiffuse as ud
from solvers.measuring import F64, mixture, numbers
from undiffuse.oracles import exact_flow
from undiffuse.solvers import RK4, Bound, Euler, Heun, Midpoint, RungeKutta, integrate
from worlds import PATHS

METHODS = {"euler": Euler(), "heun": Heun(), "midpoint": Midpoint(), "rk4": RK4()}


def squared(method: RungeKutta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nodes c, matrix A, weights b."""
    n = len(method.nodes)
    a = torch.zeros(n, n, dtype=F64)
    for i, row in enumerate(method.rows, start=1):
        a[i, : len(row)] = torch.tensor(row, dtype=F64)
    return torch.tensor(method.nodes, dtype=F64), a, torch.tensor(method.weights, dtype=F64)


@pytest.mark.parametrize("name", METHODS)
def test_a_tableau_meets_the_order_conditions(name):
    """Hairer, Norsett and Wanner 1993, table II.2.2: the conditions of all trees of up to four nodes."""
    method = METHODS[name]
    c, a, b = squared(method)
    assert torch.allclose(a.sum(1), c, atol=1e-15)
    conditions = {
        1: [(b.sum(), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        4: [(b @ c**3, 1 / 4), ((b * c) @ a @ c, 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
    }
    for order, equations in conditions.items():
        met = all(abs(float(value) - wanted) < 1e-15 for value, wanted in equations)
        assert met == (order <= method.order)
    assert method.evals_per_step == len(method.nodes)


@pytest.mark.parametrize("path", ["vp", "ve", "linear", "trig", "karras", "ddpm-table"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_method_in_velocities(name, path):
    """The weights of x and of the answers, against the same step made of the field's own velocities."""
    path, (c, a, b) = PATHS[path], squared(METHODS[name])
    denoiser, x = mixture().denoiser(path), numbers(5, 2)
    t, s = path.time_of(torch.tensor([-0.7, 0.9], dtype=F64))
    velocities: list[torch.Tensor] = []
    for i in range(len(b)):
        at = x + (s - t) * sum((a[i, j] * velocities[j] for j in range(i)), start=0 * x)
        velocities.append(denoiser.velocity(at, t + c[i] * (s - t)))
    wanted = x + (s - t) * sum(weight * v for weight, v in zip(b, velocities))
    assert torch.allclose(integrate(denoiser, x, torch.stack([t, s]), METHODS[name]), wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("name", "order"), [("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("path", ["linear", "trig", "cosine", "zero-snr-table"])
def test_from_alpha_0_to_inside_the_order_is_kept(name, order, path):
    path = PATHS[path]
    denoiser, x = mixture().denoiser(path), path.prior_std * numbers(16, 2)
    end = path.time_of(torch.tensor(-0.5, dtype=F64))
    if path is PATHS["zero-snr-table"]:  # a chain: smooth between its times only
        grid = torch.linspace(1, float(end), 21, dtype=F64)
        wanted = exact_flow(denoiser, x, 1.0, end)
        assert torch.allclose(integrate(denoiser, x, grid, METHODS[name]), wanted, atol=0.02)
        return
    wanted = exact_flow(denoiser, x, path.t_max, end)

    def error(steps):
        grid = torch.linspace(path.t_max, float(end), steps + 1, dtype=F64)
        return float((integrate(denoiser, x, grid, METHODS[name]) - wanted).square().mean().sqrt())

    assert error(20) / error(40) == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("path", ["linear", "vp", "cosine", "trig", "karras", "ddpm-table"])
@pytest.mark.parametrize("name", ["midpoint", "rk4"])
def test_the_last_step_is_of_second_order_in_the_noise(name, path):
    """What one step from sigma / alpha = u to 0 is wrong by: u^2 with `alpha_s E[x_0 | x]`, u^3 with two calls."""
    path, law = PATHS[path], mixture()
    denoiser, end = law.denoiser(path), torch.tensor(path.t_min, dtype=F64)
    errors = {"heun": [], name: []}
    for level in (0.08, 0.04):
        t = path.time_of(-torch.tensor(level, dtype=F64).log())
        # On the exact trajectory that ends in x_0.
        x_0 = law.sample(32, torch.Generator().manual_seed(0))
        x = exact_flow(denoiser, x_0, end, t)
        for solver, found in errors.items():
            x_s = integrate(denoiser, x, torch.stack([t, end]), METHODS[solver])
            found.append(float((x_s - x_0).square().mean().sqrt()))
    ratios = {solver: torch.tensor(found[0] / found[1]).log2() for solver, found in errors.items()}
    assert float(ratios["heun"]) == pytest.approx(2, abs=0.15)
    assert float(ratios[name]) > 2.8
    assert errors[name][0] < 0.1 * errors["heun"][0]


@pytest.mark.parametrize("path", ["linear", "vp", "karras"])
def test_the_last_step_asks_nothing_below_t_low_nor_extrapolates_from_pure_noise(path):
    path, x = PATHS[path], numbers(4, 2)
    denoiser, end = mixture().denoiser(path), torch.tensor(path.t_min, dtype=F64)
    low = torch.tensor(path.t_low, dtype=F64)
    closed = [low] if float(path.alpha(torch.tensor(path.t_max))) > 0 else [low, torch.tensor(path.t_max, dtype=F64)]
    for t in closed:
        field = Bound(denoiser, grid=torch.stack([t, end]))
        x_s = integrate(field, x, field.grid, RK4())
        assert field.calls == 1
        assert torch.allclose(x_s, path.alpha(end) * denoiser(x, t), atol=1e-14)


def test_stages_inside_a_step_are_foreseen():
    """The path is asked for its scales once, and the times go to the device of x once, whatever the steps."""

    class Counting(ud.VP):
        asked = 0

        def alpha(self, t):
            Counting.asked += 1
            return super().alpha(t)

    def asked(solver, steps):
        path = Counting()
        grid = ud.make_grid(path, steps)[:-1]
        field = Bound(Still(path), grid=grid)
        Counting.asked = 0
        integrate(field, numbers(2, 3), grid, solver)
        return Counting.asked

    for solver in METHODS.values():
        assert asked(solver, 5) == asked(solver, 25)


class Still(ud.Denoiser):
    def forward(self, x_t, t, cond=None):
        return torch.full_like(x_t, 0.3)
