"""Contrastive divergence: lower the energy of the data, raise that of the model's own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError, SamplingError, TrainingError, choose
from undiffuse.core.random import Generator
from undiffuse.fields.denoiser import Cond, Event
from undiffuse.fields.energy import Energy
from undiffuse.objectives.starts import FromData, FromNoise, ReplayBuffer, Start, Starts, labels_of

PerSample = Float[Tensor, " b"]
Gather = Callable[[Tensor], Tensor]

# Steps over which the figures of `diagnostics` are averaged.
WINDOW = 20
# Chains whose score is measured: its norm is a figure to look at, not worth a pass over the batch.
_SCORED = 32


class Chains(Protocol):
    """What a kernel returns: the last states, the share of accepted moves, and which chains left the finite numbers."""

    @property
    def x(self) -> Tensor: ...
    @property
    def acceptance(self) -> Tensor | None: ...
    @property
    def diverged(self) -> dict[int, int]: ...


class Kernel(Protocol):
    """A Markov chain that leaves exp(-E) invariant, or nearly so."""

    def run(self, target: Any, x: Any, steps: int, *, cond: Any = None, generator: Any = None) -> Chains: ...


@dataclass(frozen=True)
class Stop:
    """When training is given up as divergent.

    Args:
        energy: largest mean |E| over the data or over the chains of a step.
        gap: largest |mean E(chains) - mean E(data)| that may last.
        patience: number of steps in a row after which a larger gap ends training.

    Raises:
        ArgumentError: a value that is not positive.
    """

    energy: float = 1e4
    gap: float = 100.0
    patience: int = 50

    def __post_init__(self):
        if not (self.energy > 0 and self.gap > 0 and self.patience >= 1):
            raise ArgumentError(f"{self}: expected energy > 0, gap > 0 and patience >= 1")


class _Held(NamedTuple):
    """What a call leaves to be settled: chains (n, *event), their rows of the buffer, ages and labels, figures."""

    x: Tensor
    slots: Tensor
    age: Tensor
    label: Tensor
    figures: Tensor


class ContrastiveDivergence(nn.Module):
    """`E(x+) - E(x-) + penalty (E(x+)^2 + E(x-)^2)`, x- a state of a Markov chain with the model's law (Hinton 2002).

    Where the chains have converged, the mean gradient without the penalty is that of the negative log-likelihood,
    `E_data grad E - E_model grad E`. The value itself measures nothing; see `diagnostics`. Per sample, one chain each.

    No gradient flows through the chains. While they run, the model is in evaluation mode with its parameters frozen.

    Args:
        kernel: moves the chains: `kernel.run(energy, x, steps, cond=, generator=)`, for instance a Langevin kernel.
        steps: of the kernel, per training step (the k of CD-k).
        start: "data" (CD-k), "noise" (short-run), or a `FromNoise` or `ReplayBuffer` (persistent).
        penalty: weight of the squares, which keep the energies near zero; it draws the minimiser away from the truth.
        data_noise: standard deviation of Gaussian noise added to the data.
        stop: when to give up.

    `deferred`: False, and every call writes its chains back at once. True, as the trainer has it: `settle` does, once
    per step for all of its micro-batches and processes.

    Raises:
        ArgumentError: a number out of range, an unknown start. TrainingError: training diverges, see `Stop`.
    """

    step: Tensor
    over: Tensor
    running: Tensor

    def __init__(
        self,
        kernel: Kernel,
        steps: int,
        start: str | Starts = "data",
        penalty: float = 0.1,
        data_noise: float = 0.0,
        stop: Stop | None = None,
    ):
        super().__init__()
        if steps < 1 or penalty < 0 or data_noise < 0:
            raise ArgumentError(
                f"contrastive divergence: steps {steps}, penalty {penalty}, data_noise {data_noise}: expected at least "
                "one step of the kernel and no negative number"
            )
        self.kernel, self.steps = kernel, steps
        self.start: Starts = choose(start, _BY_NAME, "start")() if isinstance(start, str) else start
        self.penalty, self.data_noise, self.stop = penalty, data_noise, stop or Stop()
        self.deferred = False
        self._held: list[_Held] = []
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("over", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(len(_FIGURES), dtype=torch.float64))

    def forward(self, model: Energy, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample:
        if self.data_noise:
            x = x + self.data_noise * random.normal(x.shape, generator, dtype=x.dtype, device=x.device)
        begun = self.start.begin(x, cond, generator)
        with frozen(model):
            chains = self._run(model, begun, generator)
            score = model.score(chains.x[:_SCORED], _rows(begun.cond, _SCORED)).flatten(1).norm(dim=1).mean()
        # In one pass, so that a network that changes from call to call (spectral norm) judges both alike.
        energy = at_least_float(model(torch.cat([x, chains.x]), _joined(cond, begun.cond)))
        on_data, on_chains = energy.tensor_split(2)
        self._hold(begun, chains, (on_data, on_chains), score)
        if not self.deferred:
            self.settle()
        squares = self.penalty * (on_data.square() + on_chains.square()) if self.penalty else 0.0
        return on_data - on_chains + squares

    def _run(self, model: Energy, begun: Start, generator: Generator) -> Chains:
        try:
            return self.kernel.run(model, begun.x, self.steps, cond=begun.cond, generator=generator)
        except SamplingError as error:
            raise TrainingError(f"the chains of step {int(self.step) + 1} failed: {error}") from error

    @torch.no_grad()
    def _hold(self, begun: Start, chains: Chains, energies: tuple[Tensor, Tensor], score: Tensor) -> None:
        """Keep what `settle` needs."""
        n = len(chains.x)
        way = (chains.x - begun.x).flatten(1).square().mean(1).sqrt()
        accepted = chains.acceptance if chains.acceptance is not None else torch.full_like(way, torch.nan)
        age = (begun.age + 1).index_fill(0, _index(chains.diverged, begun.age), 0)
        columns = [*energies, way, accepted, age, score.expand(n)]
        self._held.append(
            _Held(
                chains.x,
                begun.slots if begun.slots is not None else begun.age,
                age,
                labels_of(begun.cond, like=age),
                torch.stack([c.detach().double() for c in columns], 1),
            )
        )

    @torch.no_grad()
    def settle(self, gather: Gather = lambda rows: rows) -> None:
        """Close a step: write the chains back, take in the figures, stop where training diverges.

        Args:
            gather: rows of this process -> rows of all processes, in their order; all must end up with the same.

        Raises:
            TrainingError: see `Stop`; says which figure, at which step, and what to try.
        """
        if not self._held:
            return
        held = _Held(*(torch.cat(parts) for parts in zip(*self._held)))
        self._held = []
        if isinstance(self.start, ReplayBuffer):
            self.start.write(*(gather(part) for part in (held.slots, held.x, held.age, held.label)))
        figures = gather(held.figures).mean(0).to(self.running)
        self.step += 1
        self.running.lerp_(figures, 1 / min(int(self.step), WINDOW))
        self._check(*figures[:2].tolist())

    def _check(self, on_data: float, on_chains: float) -> None:
        gap, step = on_chains - on_data, int(self.step)
        # Written so that a NaN counts as too large.
        self.over.copy_(self.over + 1 if not abs(gap) <= self.stop.gap else torch.zeros_like(self.over))
        what = None
        if not max(abs(on_data), abs(on_chains)) <= self.stop.energy:
            what = f"the mean energy is {on_data:.4g} on the data and {on_chains:.4g} on the chains, "
            what += f"beyond stop.energy = {self.stop.energy:g}"
        elif int(self.over) >= self.stop.patience:
            what = f"the energy gap (chains - data) is {gap:.4g} and has been beyond stop.gap = {self.stop.gap:g} "
            what += f"for {int(self.over)} steps in a row"
        if what is not None:
            raise TrainingError(
                f"training diverges at step {step}: {what}. Try a smaller training.lr or training.clip, a larger "
                "penalty, more noise or smaller steps in the kernel, or its clip"
            )

    def diagnostics(self) -> dict[str, float]:
        """Means over about the last 20 steps.

        `energy_data`, `energy_chains`, `energy_gap` (chains - data; near 0 where the chains follow the model),
        `chain_move` (root mean square change of a coordinate over a run), `chain_acceptance` (of kernels that reject),
        `chain_age` (how many runs a chain has behind it), `score_norm` (of the model, at the chains).
        """
        values: dict[str, float] = dict(zip(_FIGURES, self.running.tolist()))
        values["energy_gap"] = values["energy_chains"] - values["energy_data"]
        return {name: value for name, value in values.items() if value == value}


_BY_NAME: dict[str, Callable[[], Starts]] = {"data": FromData, "noise": FromNoise}
_FIGURES = ("energy_data", "energy_chains", "chain_move", "chain_acceptance", "chain_age", "score_norm")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of parameters, inside the block; afterwards every flag is as it was.

    Under autocast this also keeps casts of weights made inside from being reused outside, where they need a graph.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module, _ in modes:
        module.training = False
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def at_least_float(energy: PerSample) -> PerSample:
    """A difference of energies needs more digits than bfloat16 has."""
    return energy.to(torch.promote_types(energy.dtype, torch.float32))


def _index(diverged: dict[int, int], like: Tensor) -> Tensor:
    return torch.tensor(sorted(diverged), dtype=torch.int64, device=like.device)


def _rows(cond: Cond, n: int) -> Cond:
    return {k: v[:n] for k, v in cond.items()} if isinstance(cond, dict) else None if cond is None else cond[:n]


def _joined(a: Any, b: Any) -> Cond:
    """Two conditions of the same kind, one after the other."""
    if a is None:
        return None
    return {k: torch.cat([a[k], b[k]]) for k in a} if isinstance(a, dict) else torch.cat([a, b])
