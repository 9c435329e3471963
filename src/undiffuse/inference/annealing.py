"""Chains that walk from a base to a target through a ladder of energies, and the weights they collect."""

from __future__ import annotations

import itertools
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.random import Generator
from undiffuse.fields.energy import Energy
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.markov import Kernel

Event = Float[Tensor, "b *event"]
Cond = Tensor | dict[str, Tensor] | None


@runtime_checkable
class Base(Protocol):
    """Where annealing starts: a normalised density that can be sampled exactly, such as a law or a known energy."""

    event: tuple[int, ...]

    def sample(self, n: int, generator: Generator = None) -> Tensor: ...

    def log_prob(self, x: Tensor, cond: Cond = None) -> Tensor: ...

    def score(self, x: Tensor, cond: Cond = None) -> Tensor: ...


@runtime_checkable
class OwnPath(Protocol):
    """An energy with its own way from a base, taken instead of the geometric one."""

    def anneal(self, base: Base, beta: float) -> Energy:
        """The energy at 0 < beta < 1."""
        ...


class Geometric(Energy):
    """`(1 - beta) (-log p_base) + beta E`."""

    def __init__(self, energy: Energy, base: Base, beta: float):
        super().__init__()
        self.energy, self.base, self.beta = energy, base, beta

    def forward(self, x: Event, cond: Cond = None) -> Float[Tensor, " b"]:
        return self.beta * self.energy(x, cond) - (1 - self.beta) * self.base.log_prob(x, cond)

    def energy_and_score(self, x: Event, cond: Cond = None) -> tuple[Float[Tensor, " b"], Event]:
        energy, score = self.energy.energy_and_score(x, cond)
        base, base_score = -self.base.log_prob(x, cond), self.base.score(x, cond)
        return (1 - self.beta) * base + self.beta * energy, (1 - self.beta) * base_score + self.beta * score


class Annealing:
    """The energies from base to target, and the chains that walk along them."""

    def __init__(self, energy: Energy, base: Base, kernel: Kernel, temperatures: int | Tensor, steps: int):
        event = getattr(energy, "event", base.event)
        if tuple(event) != tuple(base.event):
            raise ArgumentError(
                f"the energy has events of shape {tuple(event)}, the base of shape {tuple(base.event)}: they must agree"
            )
        if not kernel.exact:
            raise ArgumentError(
                f"{type(kernel).__name__} leaves no density exactly invariant, so the weights would be biased: take an "
                f"exact kernel, such as MALA or HMC"
            )
        self.energy, self.base, self.kernel, self.steps = energy, base, kernel, steps
        self.betas = _betas(temperatures)
        self.own = energy if isinstance(energy, OwnPath) else None

    @torch.no_grad()
    def walk(self, x: Event, generator: Generator, *, down: bool) -> tuple[Float[Tensor, " b"], Tensor | None]:
        """`log w` of every chain, (B,) float64, and the mean acceptance at each inner beta, (K - 1,), or None.

        Up from samples of the base; or down from samples of the target, in the reverse order of all that is done.
        """
        log_weights = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        rungs, accepted = list(itertools.pairwise(self.betas.tolist())), []
        with evaluating(self.energy):
            for before, beta in reversed(rungs) if down else rungs:
                if down and beta < 1:
                    x = self._move(x, beta, generator, accepted)
                log_weights = log_weights + self._gain(x, before, beta)
                if not down and beta < 1:
                    x = self._move(x, beta, generator, accepted)
        accepted = accepted[::-1] if down else accepted
        return log_weights, torch.stack(accepted) if accepted else None

    def _between(self, beta: float) -> Energy:
        return self.own.anneal(self.base, beta) if self.own else Geometric(self.energy, self.base, beta)

    def _at(self, x: Event, beta: float) -> Tensor:
        """`E_k(x)`, normalised at beta = 0."""
        if beta == 0:
            return -self.base.log_prob(x).double()
        value = (self.energy if beta == 1 else self._between(beta))(x)
        if value.shape != x.shape[:1]:
            raise ArgumentError(
                f"the energy returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}: expected ({len(x)},)"
            )
        return value.double()

    def _gain(self, x: Event, before: float, beta: float) -> Tensor:
        """`E_{k-1}(x) - E_k(x)`."""
        if self.own:
            gain = self._at(x, before) - self._at(x, beta)
        else:
            gain = (beta - before) * (self._at(x, 0) - self._at(x, 1))
        _refuse(~torch.isfinite(gain), "weights are not finite", beta)
        return gain

    def _move(self, x: Event, beta: float, generator: Generator, accepted: list[Tensor]) -> Event:
        chains = self.kernel.run(self._between(beta), x, self.steps, generator=generator)
        stopped = torch.zeros(len(x), dtype=torch.bool)
        stopped[list(chains.diverged)] = True
        _refuse(stopped, "chains met an energy that is no number", beta)
        if chains.acceptance is not None:
            accepted.append(chains.acceptance.double().mean())
        return chains.x


def _refuse(bad: Tensor, what: str, beta: float) -> None:
    if not bool(bad.any()):
        return
    rows = bad.nonzero()[:, 0].tolist()
    raise SamplingError(
        f"{len(rows)} of {len(bad)} {what} at beta = {beta:g}: chains {', '.join(map(str, rows[:8]))}"
        f"{', ...' if len(rows) > 8 else ''}. Take a base, or samples, where both energies are finite"
    )


def _betas(temperatures: int | Tensor) -> Float[Tensor, " k"]:
    if not isinstance(temperatures, Tensor):
        if temperatures < 1:
            raise ArgumentError(f"temperatures is {temperatures}: expected at least 1 step from beta = 0 to 1")
        return torch.arange(temperatures + 1, dtype=torch.float64) / temperatures
    betas = temperatures.detach().cpu().double()
    if betas.ndim != 1 or len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not bool((betas.diff() > 0).all()):
        raise ArgumentError(
            f"temperatures of shape {tuple(betas.shape)}, {betas.flatten()[:3].tolist()} ... "
            f"{betas.flatten()[-1:].tolist()}: expected betas that increase from 0 to 1"
        )
    return betas
