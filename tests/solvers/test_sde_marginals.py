"""Simulated forward SDE, reverse SDE and PF-ODE have the oracle's marginals: two-sample tests at five times.

Each compares n simulated points with n draws of the oracle's law at that time. Where the laws are equal the energy
distance exceeds the 99 % quantile of its permutation null once in a hundred tests; the seeds are fixed. At n = 1500 a
scale that is 10 % off is found where x is mostly data (p < 0.01), 1 % nowhere: exact moments find that (test_sde.py,
test_orders.py).
"""

from __future__ import annotations

import pytest
import torch

from solvers.measuring import F64
from undiffuse.core.random import Streams
from undiffuse.fields.sde import ForwardSDE, ReverseSDE, euler_maruyama
from undiffuse.metrics import energy_test
from undiffuse.oracles import GaussianMixture
from undiffuse.solvers import SOLVERS, SRK, Heun, integrate
from worlds import PATHS

STEPS = 400  # equal in half log-SNR, between 3 and -3
AT = [40, 120, 200, 280, 380]  # the five times, counted from the data
SEEDS = {"exact draws": 1, "forward": 2, "reverse": 3, "reverse, srk": 4, "ode": 5, "ode, heun": 6, "reverse, sa-3": 7}


def law() -> GaussianMixture:
    """Three modes, one of them small and narrow."""
    means = torch.tensor([[-1.2, 0.4], [1.0, 0.8], [0.2, -1.3]], dtype=F64)
    return GaussianMixture(means, torch.tensor([0.3, 0.5, 0.15], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64))


def times_of(path):
    return path.time_of(torch.linspace(3.0, -3.0, STEPS + 1, dtype=F64))


def simulated(process, path, n, seed):
    """States at the five times, (5, n, 2)."""
    times, streams, draws = times_of(path), Streams.of(seed, n), Streams.of(seed, n).fold("data")
    field = law().denoiser(path)
    if process == "exact draws":
        return path.simulate(law().sample(n, draws), times[AT], streams)
    if process == "forward":
        x = law().perturbed(path, times[0]).sample(n, draws)
        return euler_maruyama(ForwardSDE(path), x, times, streams)[AT]
    x = law().perturbed(path, times[-1]).sample(n, draws)
    back = [STEPS - k for k in AT]
    if process in ("reverse", "ode"):
        sde = ReverseSDE(field, eta=1.0 if process == "reverse" else 0.0)
        return euler_maruyama(sde, x, times.flip(0), streams)[back]
    states = [x]
    solver = {"reverse, srk": SRK(), "reverse, sa-3": SOLVERS["sa-3"]()}.get(process, Heun())
    draw = lambda: streams.normal((n, 2), dtype=F64)  # noqa: E731
    grid = times.flip(0)[:: 1 if solver == Heun() else 4]  # half log-SNRs 0.06 apart are enough with noise
    integrate(field, x, grid, solver, draw, callback=lambda step: states.append(step.x))
    return torch.stack(states)[[k // (1 if solver == Heun() else 4) for k in back]]


def check(process, name, n):
    path, seed = PATHS[name], SEEDS[process]
    states, times = simulated(process, path, n, seed), times_of(path)[AT]
    for k, (x, t) in enumerate(zip(states, times)):
        reference = law().perturbed(path, t).sample(n, Streams.of(100 * seed + k, n))
        result = energy_test(x, reference, permutations=300, seed=seed)
        assert result.distance < result.quantile, (float(t), result)


@pytest.mark.parametrize("process", SEEDS)
@pytest.mark.parametrize("name", ["vp", "linear"])
def test_marginals_are_those_of_the_oracle(name, process):
    check(process, name, 300)


@pytest.mark.slow
@pytest.mark.parametrize("process", SEEDS)
@pytest.mark.parametrize("name", PATHS)
def test_marginals_are_those_of_the_oracle_on_every_path(name, process):
    check(process, name, 1500)


def test_a_wrong_process_is_found():
    """The reverse SDE with 0.7 of its drift, and with half of its noise."""
    path, n = PATHS["vp"], 600
    times, streams = times_of(path).flip(0), Streams.of(0, n)
    x = law().perturbed(path, times[0]).sample(n, Streams.of(0, n).fold("data"))
    reference = law().perturbed(path, times[-1]).sample(n, Streams.of(7, n))
    right = ReverseSDE(law().denoiser(path))
    for wrong, factor in (("drift", 0.7), ("diffusion", 0.5)):
        sde = ReverseSDE(law().denoiser(path))
        part = getattr(right, wrong)
        setattr(sde, wrong, lambda *args, part=part, factor=factor: factor * part(*args))
        end = euler_maruyama(sde, x, times, streams)[-1]
        result = energy_test(end, reference, permutations=300)
        assert result.distance > result.quantile, wrong
