"""A compiled energy answers as the energy does, before and after its parameters change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from solvers.transitions import F64
from undiffuse.fields.energy import Energy, FunctionEnergy, NetworkEnergy
from undiffuse.solvers.compiled import CompiledEnergy
from undiffuse.solvers.langevin import MALA, Langevin


class Quartic(Energy):
    """`w sum x^4 / 4 + cond`, whose score is -w x^3."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5, dtype=F64))

    def forward(self, x, cond=None):
        return self.weight * x.pow(4).sum(1) / 4 + (0 if cond is None else cond)


def test_the_same_energy_and_score():
    energy = Quartic()
    fast = CompiledEnergy(energy, backend="eager")
    x = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for cond in (None, torch.arange(6.0, dtype=F64)):
        value, score = fast.energy_and_score(x, cond)
        assert torch.allclose(score, -1.5 * x**3)
        assert torch.allclose(value, 0.375 * x.pow(4).sum(1) + (0 if cond is None else cond))
    with torch.no_grad():
        energy.weight.fill_(3.0)
    assert torch.allclose(fast.score(x), -3 * x**3)
    assert not fast.score(x).requires_grad
    assert torch.allclose(fast(x), energy(x))


@pytest.mark.parametrize("kernel", [Langevin(0.05), MALA(0.1)], ids=["langevin", "mala"])
def test_the_same_chains(kernel):
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, 1)).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, c_noise, cond):
            return self.net(x)

    energy = NetworkEnergy(Net(), prior_std=1.0)
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    ends = [
        kernel.run(target, x, 4, generator=torch.Generator().manual_seed(1)).x
        for target in (energy, CompiledEnergy(energy, backend="eager"))
    ]
    assert torch.allclose(*ends, atol=1e-12)
    assert net[1].training


@pytest.mark.slow
def test_the_default_backend():
    """Needs a C++ compiler."""
    energy = FunctionEnergy(lambda x: -torch.logsumexp(-(x[:, None] - torch.eye(2)).square().sum(-1), 1))
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(CompiledEnergy(energy).score(x), energy.score(x).detach(), atol=1e-5)
