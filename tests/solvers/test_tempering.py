"""Parallel tempering: the swap's law, what a swap moves, and weights that a plain chain gets wrong."""

from __future__ import annotations

import math

import pytest
import torch

from solvers.transitions import F64, Chosen, Wavy, grid
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import Energy
from undiffuse.solvers.hamiltonian import HMC
from undiffuse.solvers.langevin import MALA, Langevin
from undiffuse.solvers.markov import Draws
from undiffuse.solvers.tempering import ParallelTempering, swap_log_ratio


class Far(Energy):
    """`0.8 N(4, 1) + 0.2 N(-4, 1)`, up to a constant: the barrier is 8 nats."""

    def forward(self, x, cond=None):
        y = x[:, 0]
        return y.square() / 2 - torch.logaddexp(4 * y + math.log(0.8), -4 * y + math.log(0.2))

    def energy_and_score(self, x, cond=None):
        return self(x), -x + 4 * torch.tanh(4 * x + math.log(2))


def share(samples) -> float:
    return float((samples > 0).double().mean())


def test_the_swap_leaves_the_joint_law_invariant():
    """`E f(x)` before and after a swap, x from p and x' from p^(1/T), on a grid of both; 1 % of the ratio shows."""
    x, _ = grid(9.0, 1201)
    energy, hot = Wavy()(x[:, None]), 2.5
    joint = torch.softmax(-energy, 0)[:, None] * torch.softmax(-energy / hot, 0)
    chance = swap_log_ratio(energy[:, None], energy, 1.0, hot).clamp(max=0).exp()
    for f in (x, x.square(), torch.cos(1.3 * x)):
        assert abs(float((joint * chance * (f - f[:, None])).sum())) < 1e-6


def test_a_swap_moves_states_with_their_energies_and_scores():
    """Steps too short to move anything, every offer accepted: replicas 0 and 1 change places, then 1 and 2."""
    kernel = ParallelTempering(MALA(1e-30), [1.0, 2.0, 5.0])
    x = torch.tensor([[0.3], [-1.0]], dtype=F64)
    state = kernel.init(Wavy(), x)
    places = torch.tensor([0.3, -1.0, 1.1, 0.7, -2.0, 2.2], dtype=F64)[:, None]
    energy, score = Wavy().energy_and_score(places)
    temperature = torch.tensor([1.0, 1, 2, 2, 5, 5], dtype=F64)
    point = state.point._replace(energy=energy / temperature, score=score / temperature[:, None])
    state = state._replace(x=places, point=point)
    for expected in ([1.1, 0.7, 0.3, -1.0, -2.0, 2.2], [1.1, 0.7, -2.0, 2.2, 0.3, -1.0]):
        x, state = kernel.step(Wavy(), x, state, Chosen(*[torch.zeros(2, 1, dtype=F64)] * 3))
        assert torch.allclose(state.x[:, 0], torch.tensor(expected, dtype=F64))
        assert torch.equal(x, state.x[:2])
        energy, score = Wavy().energy_and_score(state.x)
        assert torch.allclose(state.point.energy * temperature, energy)
        assert torch.allclose(state.point.score * temperature[:, None], score)


def test_replicas_are_independent_and_hot_ones_hotter():
    """On N(0, 1) the replica at temperature T has variance T. 20,000 chains: standard error 1 %, bound 4 of them."""
    kernel, n = ParallelTempering(HMC(0.5, 3), [1.0, 3.0]), 20_000
    energy = Wavy(0.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=generator)
    state, draw = kernel.init(energy, x), Draws(x, generator)
    for _ in range(12):
        x, state = kernel.step(energy, x, state, draw)
    cold, hot = state.x.reshape(2, n)
    assert float(cold.var()) == pytest.approx(1.0, rel=0.04)
    assert float(hot.var()) == pytest.approx(3.0, rel=0.04)
    assert abs(float(torch.corrcoef(torch.stack([cold, hot]))[0, 1])) < 4 / math.sqrt(n)


@pytest.mark.parametrize("kernel", [MALA(0.5), HMC(0.6, 4)], ids=["mala", "hmc"])
def test_weights_of_distant_modes(kernel):
    """From a start of half and half: Langevin stays there, 0.3 from the truth; parallel tempering is within 0.02.

    512 chains and 200 kept states each: the standard error of the share, from the spread of the chains' own means, is
    below 0.006.
    """
    x = torch.tensor([-4.0, 4.0]).repeat(256)[:, None]
    plain = Langevin(0.1).run(Far(), x, 600, generator=torch.Generator().manual_seed(0), burn_in=100, keep=True)
    assert abs(share(plain.samples) - 0.8) > 0.15
    tempered = ParallelTempering(kernel, [1.0, 2.0, 4.0, 8.0])
    run = tempered.run(Far(), x, 600, generator=torch.Generator().manual_seed(1), burn_in=100, keep=True, thin=3)
    error = float((run.samples[..., 0] > 0).double().mean(0).std()) / math.sqrt(len(x))
    assert error < 0.006
    assert abs(share(run.samples) - 0.8) < 0.02
    assert run.details["swap_rate"].shape == (3,)
    assert float(run.details["swap_rate"].min()) > 0.3
    assert float(run.acceptance.mean()) > 0.7


def test_the_swap_rate_on_a_gaussian():
    """On N(0, I_2) energies are exponential of mean T, so the mean swap probability is 2 / (1 + T).

    E min(1, exp((1 - 1/T)(E - E'))) for E ~ Exp(mean 1), E' ~ Exp(mean T): the parts E > E' and E < E' are both
    1 / (1 + T). 5,000 chains, 300 offers of which the first few are out of equilibrium: bound 0.005.
    """
    hot, n = 3.0, 5000
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 2, generator=generator)
    run = ParallelTempering(HMC(0.8, 2), [1.0, hot]).run(Wavy(0.0), x, 600, generator=generator)
    assert float(run.details["swap_rate"]) == pytest.approx(2 / (1 + hot), abs=0.005)


def test_a_replica_that_fails_stops_its_chain():
    """Energy NaN beyond |x| = 12, which no replica at temperature 1 reaches from here in 60 steps."""

    class Cliff(Wavy):
        def energy_and_score(self, x, cond=None):
            energy, score = super().energy_and_score(x)
            return torch.where(x[:, 0].abs() > 12, math.nan, energy), score

    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(400, 1)
    run = ParallelTempering(HMC(0.8, 2), [1.0, 20.0]).run(Cliff(0.0), x, 60, generator=generator)
    assert 0 < len(run.diverged) < 400
    assert HMC(0.8, 2).run(Cliff(0.0), x, 60, generator=generator).diverged == {}
    assert bool(torch.isfinite(run.x).all())


def test_a_chain_does_not_depend_on_its_neighbours():
    x = torch.linspace(-4, 4, 6, dtype=F64)[:, None]
    kernel = ParallelTempering(HMC(0.5, 2), [1.0, 2.0, 4.0])
    many = kernel.run(Far(), x, 12, generator=Streams.of(7, 6)).x
    few = kernel.run(Far(), x[:2], 12, generator=Streams.of(7, 2)).x
    assert torch.equal(many[:2], few)


def test_bad_ladders_are_refused():
    for temperatures in ([1.0], [2.0, 4.0], [1.0, 1.0], [1.0, 4.0, 2.0], [1.0, math.inf]):
        with pytest.raises(ArgumentError, match="expected 1, then larger"):
            ParallelTempering(MALA(0.1), temperatures)
    with pytest.raises(ArgumentError, match="expected MALA or HMC"):
        ParallelTempering(Langevin(0.1), [1.0, 2.0])
