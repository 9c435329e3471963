"""An energy whose value and gradient are one compiled function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from undiffuse.fields.energy import Energy
from undiffuse.solvers.markov import Cond, Event, PerChain


class CompiledEnergy(Energy):
    """The same energy, its `(E(x), -grad E(x))` fused by `torch.compile`, for long runs of a kernel.

    The first call takes seconds and needs a C++ compiler (on a GPU, Triton); another batch size, dtype or mode
    (training, evaluation) may compile again. Differentiates `forward` alone, and records no gradient towards
    parameters: for sampling, not for training. Parameters are read at each call, so it may be kept while they train.

    Args:
        energy: any energy that torch can compile; its parameters are this module's.
        backend: of `torch.compile`.
    """

    def __init__(self, energy: Energy, backend: str = "inductor"):
        super().__init__()
        self.energy = energy
        self._both: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_both, backend=backend)

    def forward(self, x: Event, cond: Cond = None) -> PerChain:
        return self.energy(x, cond)

    def energy_and_score(self, x: Event, cond: Cond = None) -> tuple[PerChain, Event]:
        with torch.no_grad():
            slope, energy = self._both(self.energy, x.detach(), cond)
            return energy, slope.neg_()


def _both(energy: Energy, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    def total(y: Tensor) -> tuple[Tensor, Tensor]:
        value = energy(y, cond)
        return value.sum(), value

    return torch.func.grad(total, has_aux=True)(x)
