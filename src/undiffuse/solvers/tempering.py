"""Parallel tempering: hot replicas cross barriers and hand their states down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.solvers.markov import Cond, Draws, Event, HasEnergy, Kernel, PerChain, finite_rows, over_events
from undiffuse.solvers.metropolis import Metropolis, Point


class Ladder(NamedTuple):
    """State of `ParallelTempering`: K replicas of B chains, stacked along the batch, coldest first."""

    x: Tensor  # (K B, *event)
    point: Point  # energies and scores divided by their row's temperature
    steps: int
    chances: Tensor  # (K - 1,), sums of the mean probability of a swap


class _Stacked(Draws):
    """K draws of B rows for each draw of K B rows: what a chain gets does not depend on its neighbours."""

    def __init__(self, draw: Draws, replicas: int):
        self.draw, self.replicas = draw, replicas

    def normal(self) -> Tensor:
        return torch.cat([self.draw.normal() for _ in range(self.replicas)])

    def uniform(self) -> Tensor:
        return torch.cat([self.draw.uniform() for _ in range(self.replicas)])


class _Tempered:
    """`E / T` with a temperature for each row."""

    def __init__(self, target: HasEnergy, temperatures: Tensor):
        self.target, self.temperatures = target, temperatures

    def score(self, x: Tensor, cond: Cond = None) -> Tensor:
        return self.target.score(x, cond) / over_events(self.temperatures, x)

    def energy_and_score(self, x: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        energy, score = self.target.energy_and_score(x, cond)
        return energy / self.temperatures, score / over_events(self.temperatures, x)


def swap_log_ratio(energy: PerChain, hotter: PerChain, cold: float, hot: float) -> PerChain:
    """Logarithm of the acceptance ratio of a swap, `(1 / T - 1 / T') (E(x) - E(x'))`, energies at temperature 1."""
    return (1 / cold - 1 / hot) * (energy - hotter)


@dataclass(frozen=True, eq=False)
class ParallelTempering(Kernel):
    """Replicas of the densities `p^(1 / T_k)`, moved by one kernel, that swap states with their neighbours.

    After each move neighbours (k, k + 1) offer each other their states, even k in even steps, odd k in odd ones, and
    accept with probability `min(1, exp((1 / T_k - 1 / T_k+1) (E(x_k) - E(x_k+1))))` (Geyer 1991). What a run returns is
    the replica at temperature 1. At temperature T the kernel's preconditioner is T times its own: the same drift, the
    noise times sqrt(T). The density to the power 1 / T must be integrable.

    `Chains.details["swap_rate"]`, (K - 1,), is the mean probability of a swap between neighbours. Near 0: put a
    temperature between them. The calls of the target are those of the kernel, with K B rows each.

    Args:
        kernel: MALA or HMC.
        temperatures: 1 first, strictly increasing, at least two.

    Raises:
        ArgumentError: other temperatures; a kernel that does not accept or reject, and so knows no energies.
    """

    exact: ClassVar[bool] = True

    kernel: Metropolis
    temperatures: Sequence[float]

    def __post_init__(self):
        if not isinstance(self.kernel, Metropolis):
            raise ArgumentError(f"kernel is {self.kernel!r}: swaps compare energies; expected MALA or HMC")
        given = tuple(float(t) for t in self.temperatures)
        object.__setattr__(self, "temperatures", given)
        if len(given) < 2 or given[0] != 1 or not all(a < b < float("inf") for a, b in pairwise(given)):
            raise ArgumentError(f"temperatures are {given}: expected 1, then larger and larger, at least two")

    def init(self, target: HasEnergy, x: Event, cond: Cond = None) -> Ladder:  # type: ignore[override]
        replicas = len(self.temperatures)
        stacked = torch.cat([x] * replicas)
        rows = self._rows(x)
        point = self.kernel.init(_Tempered(target, rows), stacked, _repeated(cond, replicas))
        point = point._replace(root=point.root.scaled(rows.sqrt(), stacked))
        return Ladder(stacked, point, 0, x.new_zeros(replicas - 1))

    def step(  # type: ignore[override]
        self, target: HasEnergy, x: Event, state: Ladder, draw: Draws, cond: Cond = None
    ) -> tuple[Event, Ladder]:
        replicas, rows = len(self.temperatures), self._rows(x)
        stacked = torch.cat([x, state.x[len(x) :]])
        tempered, many = _Tempered(target, rows), _Stacked(draw, replicas)
        stacked, point = self.kernel.step(tempered, stacked, state.point, many, _repeated(cond, replicas))
        order, chances = self._swaps((point.energy * rows).reshape(replicas, -1), state.steps % 2, draw)
        wide = over_events(rows, stacked)
        stacked, energy, score = stacked[order], (point.energy * rows)[order] / rows, (point.score * wide)[order] / wide
        # A replica that failed stops its chain: the loop sees the coldest one only.
        failed = ~finite_rows(stacked).reshape(replicas, -1).all(0)
        coldest = stacked[: len(x)].masked_fill(over_events(failed, x), float("nan"))
        point = Point(point.root, energy, score, point.chance)
        return coldest, Ladder(stacked, point, state.steps + 1, state.chances + chances)

    def _rows(self, x: Tensor) -> Tensor:
        """The temperature of each of the K B rows."""
        return x.new_tensor(self.temperatures).repeat_interleave(len(x))

    def _swaps(self, energy: Float[Tensor, "k b"], first: int, draw: Draws) -> tuple[Tensor, Tensor]:
        """Which row each row takes its state from, (K B,), and the mean probability of each swap, (K - 1,)."""
        replicas, chains = energy.shape
        order = torch.arange(replicas, device=energy.device)[:, None].repeat(1, chains)
        chances = energy.new_zeros(replicas - 1)
        for k in range(first, replicas - 1, 2):
            ratio = swap_log_ratio(energy[k], energy[k + 1], *self.temperatures[k : k + 2])
            chance = ratio.clamp(max=0).exp().nan_to_num(nan=0.0)
            swap = (draw.uniform() < chance).long()
            order[k] += swap
            order[k + 1] -= swap
            chances[k] = chance.mean()
        return (order * chains + torch.arange(chains, device=energy.device)).reshape(-1), chances

    def acceptance(self, state: Ladder) -> PerChain:
        return state.point.chance[: len(state.x) // len(self.temperatures)]

    def details(self, state: Ladder) -> dict[str, Tensor]:
        offered = [(state.steps + 1 - k % 2) // 2 for k in range(len(self.temperatures) - 1)]
        return {"swap_rate": state.chances / state.chances.new_tensor(offered).clamp(min=1)}


def _repeated(cond: Cond, replicas: int) -> Cond:
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {name: torch.cat([value] * replicas) for name, value in cond.items()}
    return torch.cat([cond] * replicas)
