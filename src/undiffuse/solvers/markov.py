"""Markov kernels that sample `p(x) = exp(-E(x)) / Z`: what they share, and the one loop that runs them.

A kernel is a frozen value. What it remembers from step to step (a momentum, an energy already computed) travels in
`state`, so that a run can be cut anywhere and rows of a batch never meet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.random import Generator
from undiffuse.fields.energy import HasScore
from undiffuse.solvers.during import denormals_as_zero, evaluating

Event = Float[Tensor, "b *event"]
PerChain = Float[Tensor, " b"]
Cond = Tensor | dict[str, Tensor] | None


@runtime_checkable
class HasEnergy(HasScore, Protocol):
    """What a kernel that accepts or rejects needs of a model, over its score."""

    def energy_and_score(self, x: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        """`(E(x), -grad E(x))`, (B,) and (B, *event)."""
        ...


class Draws:
    """The random numbers of a run: each call is one draw.

    Args:
        like: its shape (B, *event), dtype and device are those of the normals.
        generator: streams (row i then does not depend on its neighbours), a torch generator, or None: torch's own.
    """

    def __init__(self, like: Tensor, generator: Generator = None):
        self.shape, self.dtype, self.device = tuple(like.shape), like.dtype, like.device
        self.generator = generator

    def normal(self) -> Tensor:
        """Standard normals, (B, *event)."""
        return random.normal(self.shape, self.generator, dtype=self.dtype, device=self.device)

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), (B,)."""
        return random.uniform(self.shape[:1], self.generator, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Chains:
    """What a run returns.

    Attributes:
        x: the last states, (B, *event).
        samples: the states kept, (n, B, *event), n = steps // thin; None where `keep` is False.
        acceptance: mean probability of acceptance after burn-in, (B,); None for a kernel that never rejects.
        diverged: chain -> step (from 0, burn-in counted) that led it out of the finite numbers; it stayed where it
            was before.
        evals: calls of the target.
        details: what else the kernel has to say, by name.
    """

    x: Tensor
    samples: Tensor | None = None
    acceptance: Tensor | None = None
    diverged: dict[int, int] = field(default_factory=dict)
    evals: int = 0
    details: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel(ABC):
    """A way to move every chain of a batch one step.

    Attributes:
        exact: whether `exp(-E)` is left invariant for any step size.
    """

    exact: ClassVar[bool] = False

    def init(self, target: HasScore, x: Event, cond: Cond = None) -> Any:
        """What the first step needs to know: nothing."""
        return None

    @abstractmethod
    def step(self, target: HasScore, x: Event, state: Any, draw: Draws, cond: Cond = None) -> tuple[Event, Any]:
        """`(x, state)` one step later. A row whose energy is not a number comes back as NaN: the loop stops it."""

    def acceptance(self, state: Any) -> PerChain | None:
        """Probability with which the last step's proposals were accepted, (B,); None: nothing is ever rejected."""
        return None

    def details(self, state: Any) -> dict[str, Tensor]:
        """Further numbers of a run, for `Chains.details`."""
        return {}

    def run(
        self,
        target: HasScore,
        x: Event,
        steps: int,
        *,
        cond: Cond = None,
        generator: Generator = None,
        burn_in: int = 0,
        thin: int = 1,
        keep: bool = False,
        callback: Callable[[int, Tensor], object] | None = None,
    ) -> Chains:
        """Move B chains `burn_in + steps` times.

        The target is put in evaluation mode for the run, no gradient is recorded, and x is not written to. A chain
        whose state becomes infinite or NaN stays at its last finite state and is listed; the others go on.

        Args:
            target: the model: anything with a score; an `Energy` for a kernel that accepts or rejects.
            x: starting states, (B, *event).
            steps: steps after burn-in.
            cond: passed to every call of the target.
            generator: see `Draws`.
            burn_in: steps before anything is kept or counted as accepted.
            thin: keep every thin-th state.
            keep: return the states, (steps // thin, B, *event).
            callback: called with the step's index (from 0, burn-in counted) and the states after it.

        Raises:
            ArgumentError: counts out of range; starting states that are not finite (their rows); a target that
                returns another shape.
            SamplingError: every chain diverged; says at which step.
        """
        _check_counts(steps, burn_in, thin, keep)
        _check_start(x)
        draw, counted, guard = Draws(x, generator), Counted(target), _Guard()
        x = _side_by_side(x.detach())
        samples: list[Tensor] = []
        accepted = None
        with evaluating(target), denormals_as_zero(x):
            state = self.init(counted, x, cond)
            for index in range(burn_in + steps):
                moved, state = self.step(counted, x, state, draw, cond)
                x = guard(index, x, moved)
                chance = self.acceptance(state)
                if chance is not None and index >= burn_in:
                    accepted = chance if accepted is None else accepted + chance
                if keep and index >= burn_in and (index - burn_in + 1) % thin == 0:
                    samples.append(x)
                if callback is not None:
                    callback(index, x)
        return Chains(
            x.contiguous(),
            torch.stack(samples) if keep else None,
            None if accepted is None else accepted / steps,
            guard.diverged,
            counted.calls,
            self.details(state),
        )


# Few values and many chains: loops over an event's values are too short to vectorise, loops over chains are not. On an
# energy of 8 modes in the plane, 10,000 chains, a step takes 0.85 of the time.
_FEW, _MANY = 16, 256


def _side_by_side(x: Tensor) -> Tensor:
    """x laid out with equal coordinates of all chains next to each other, where that is faster."""
    if x.ndim != 2 or not 1 < x.shape[1] <= _FEW or x.shape[0] < _MANY or x.device.type != "cpu":
        return x
    return x.T.contiguous().T


class Counted:
    """A target whose calls are counted and whose answers have the shape of the question."""

    def __init__(self, target: HasScore):
        self.target, self.calls = target, 0

    def score(self, x: Tensor, cond: Cond = None) -> Tensor:
        self.calls += 1
        return self._like(_ask(self.target.score, x, cond), x)

    def energy_and_score(self, x: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        if not isinstance(self.target, HasEnergy):
            raise ArgumentError(
                f"{type(self.target).__name__} has no `energy_and_score`: a kernel that accepts or rejects compares "
                "energies, which a score alone does not give. Give an Energy, or use Langevin or Underdamped"
            )
        self.calls += 1
        energy, score = _ask(self.target.energy_and_score, x, cond)
        if energy.shape != x.shape[:1]:
            raise ArgumentError(
                f"the energy has shape {tuple(energy.shape)} for x of shape {tuple(x.shape)}: expected one number per "
                f"sample, ({x.shape[0]},)"
            )
        return energy, self._like(score, x)

    def _like(self, score: Tensor, x: Tensor) -> Tensor:
        if score.shape != x.shape:
            raise ArgumentError(
                f"the score has shape {tuple(score.shape)} for x of shape {tuple(x.shape)}: expected the same"
            )
        return score


def _ask(method: Callable, x: Tensor, cond: Cond) -> Any:
    """The method's answer; a function that takes a `view` of x, which asks for rows in memory, gets them."""
    try:
        return method(x, cond)
    except RuntimeError as error:
        if x.is_contiguous() or "view" not in str(error):
            raise
    return method(x.contiguous(), cond)


class _Guard:
    """Keeps chains at their last finite state, and remembers which step they failed in."""

    def __init__(self):
        self.diverged: dict[int, int] = {}
        self.alive: Tensor | None = None  # (B,), from the first failure on

    def __call__(self, index: int, before: Tensor, after: Tensor) -> Tensor:
        if self.alive is not None:
            after = torch.where(over_events(self.alive, after), after, before)
        # One pass, one number: a sum is finite unless some entry is not (or the sum overflows, settled next).
        if bool(torch.isfinite(after.sum())):
            return after
        finite = finite_rows(after)
        if bool(finite.all()):
            return after
        for row in (~finite).nonzero()[:, 0].tolist():
            self.diverged[row] = index
        self.alive = finite if self.alive is None else self.alive & finite
        if not bool(self.alive.any()):
            raise SamplingError(
                f"all {len(finite)} chains became infinite or NaN, the last in step {index}, the first in step "
                f"{min(self.diverged.values())}. Try a smaller step size, a bound on the score (clip), or a tempered "
                "energy; check the energy at the starting states"
            )
        return torch.where(over_events(finite, after), after, before)


def over_events(rows: Tensor, x: Tensor) -> Tensor:
    """A (B,) tensor, seen so that it broadcasts against x of shape (B, *event)."""
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def finite_rows(x: Tensor) -> Tensor:
    """(B,): whether all of a row is finite."""
    return torch.isfinite(x.flatten(1)).all(1) if x.ndim > 1 else torch.isfinite(x)


def _check_counts(steps: int, burn_in: int, thin: int, keep: bool) -> None:
    for name, value, least in (("steps", steps, 1), ("burn_in", burn_in, 0), ("thin", thin, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(f"{name} is {value!r}: expected a whole number of at least {least}")
    if keep and thin > steps:
        raise ArgumentError(f"thin is {thin} and steps {steps}: no state would be kept; expected thin <= steps")


def _check_start(x: Tensor) -> None:
    if x.ndim == 0 or x.shape[0] == 0:
        raise ArgumentError(f"x has shape {tuple(x.shape)}: expected (B, *event), one row per chain, B >= 1")
    finite = finite_rows(x)
    if not bool(finite.all()):
        rows = (~finite).nonzero()[:, 0].tolist()
        raise ArgumentError(
            f"{len(rows)} of {len(x)} starting states are infinite or NaN: rows {', '.join(map(str, rows[:8]))}"
            f"{', ...' if len(rows) > 8 else ''}; draw them anew"
        )
