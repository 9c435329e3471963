"""Where the Markov chains of contrastive training start: at the data, in noise, or where earlier ones stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.memory import GIB, free_memory
from undiffuse.core.random import Generator
from undiffuse.fields.denoiser import Cond, Event
from undiffuse.objectives.moves import random_affine


class Start(NamedTuple):
    """Chains about to run.

    Args:
        x: their states (B, *event).
        cond: their conditions.
        slots: rows of the buffer that they come from (B,); None: from no buffer.
        age: how many times each has been run before (B,).
    """

    x: Tensor
    cond: Cond
    slots: Tensor | None
    age: Tensor


class Starts(Protocol):
    """A way to start one chain per sample of a batch of data."""

    def begin(self, x: Tensor, cond: Cond, generator: Generator) -> Start: ...


def _uniform(shape: Sequence[int], generator: Generator, dtype, device) -> Tensor:
    return 2 * random.uniform(shape, generator, dtype=dtype, device=device) - 1


def _normal(shape: Sequence[int], generator: Generator, dtype, device) -> Tensor:
    return random.normal(shape, generator, dtype=dtype, device=device)


INITIAL = {"uniform": _uniform, "normal": _normal}


@dataclass(frozen=True)
class FromNoise:
    """Every chain starts in noise: short-run sampling (Nijkamp et al. 2019).

    Args:
        initial: "uniform" on [-scale, scale], or "normal" of standard deviation `scale`.

    Raises:
        ArgumentError: an unknown name; scale <= 0.
    """

    initial: str = "uniform"
    scale: float = 1.0

    def __post_init__(self):
        choose(self.initial, INITIAL, "initial law")
        if not self.scale > 0:
            raise ArgumentError(f"scale is {self.scale}: expected > 0, in the units of the data")

    def draw(self, shape: Sequence[int], generator: Generator = None, *, dtype=torch.float32, device=None) -> Tensor:
        """Noise of this law, shape (B, *event)."""
        return self.scale * INITIAL[self.initial](shape, generator, dtype, device)

    def begin(self, x: Event, cond: Cond, generator: Generator) -> Start:
        """One chain per row of x, under that row's condition."""
        return Start(self.draw(x.shape, generator, dtype=x.dtype, device=x.device), cond, None, _never(x))


@dataclass(frozen=True)
class FromData:
    """Every chain starts at a sample of the data (Hinton 2002)."""

    def begin(self, x: Event, cond: Cond, generator: Generator) -> Start:
        """One chain per row of x, at it. Nothing is drawn."""
        return Start(x, cond, None, _never(x))


def _never(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)


class ReplayBuffer(nn.Module):
    """Chains that go on from step to step (Tieleman 2008; Du and Mordatch 2019).

    A batch takes random rows. A row that has never been written, and any other with chance `reinit`, starts anew from
    noise, with the condition of the batch's sample; the others go on under the condition they were begun with. Rows
    and ages are buffers of the module: a checkpoint holds them, and a resumed run has the same chains.

    With `moved`, some of the chains that go on are carried elsewhere first, by `random_affine`: what lies near the data
    and is none of it (a digit upside down) is seen while training, which chains from noise seldom reach (Du et al.
    2021, data augmentation transitions).

    Args:
        shape: of an event.
        size: number of chains kept.
        reinit: chance that a chain starts anew.
        initial, scale: see `FromNoise`.
        labelled: keep an integer label with each chain, for energies with a condition of that kind.
        moved: chance that a chain that goes on is moved first, and counted as new; of images only.

    Raises:
        ArgumentError: a number out of range; more memory than there is, with both figures. At the start of chains,
            `moved` for events that are no images.
    """

    x: Tensor
    age: Tensor
    label: Tensor

    # Every process holds the same rows: nothing needs to be sent when a step begins.
    keeps_its_buffers = True

    def __init__(
        self,
        shape: Sequence[int],
        size: int = 8192,
        reinit: float = 0.05,
        initial: str = "uniform",
        scale: float = 1.0,
        labelled: bool = False,
        moved: float = 0.0,
    ):
        super().__init__()
        if size < 1 or not 0 <= reinit <= 1 or not 0 <= moved <= 1:
            raise ArgumentError(
                f"replay buffer: size {size}, reinit {reinit}, moved {moved}: expected size >= 1 and both chances in "
                "[0, 1]"
            )
        self.noise = FromNoise(initial, scale)
        self.reinit, self.labelled, self.moved = float(reinit), labelled, float(moved)
        _check_memory(size, shape)
        self.register_buffer("x", torch.zeros(size, *shape))
        self.register_buffer("age", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("label", torch.full((size if labelled else 0,), -1, dtype=torch.int64))

    def __len__(self) -> int:
        return self.age.shape[0]

    def begin(self, x: Event, cond: Cond, generator: Generator) -> Start:
        """One chain per row of x.

        Raises:
            ArgumentError: events of another shape; a condition that the buffer cannot keep.
        """
        self._check(x, cond)
        n = x.shape[:1]
        slots = random.integers(len(self), n, generator, device=x.device)
        coin = random.uniform(n, generator, dtype=torch.float64, device=x.device)
        noise = self.noise.draw(x.shape, generator, dtype=x.dtype, device=x.device)
        age = self.age[slots]
        anew = (coin < self.reinit) | (age == 0)
        state = torch.where(_padded(anew, x), noise, self.x[slots].to(x.dtype))
        if isinstance(cond, Tensor):
            cond = torch.where(anew, cond, self.label[slots].to(cond))
        if self.moved:
            moves = (random.uniform(n, generator, dtype=torch.float64, device=x.device) < self.moved) & ~anew
            state = torch.where(_padded(moves, x), random_affine(state, generator), state)
            anew = anew | moves
        return Start(state, cond, slots, age.masked_fill(anew, 0))

    def _check(self, x: Tensor, cond: Cond) -> None:
        if x.shape[1:] != self.x.shape[1:]:
            raise ArgumentError(
                f"x has shape {tuple(x.shape)}: this replay buffer holds events of shape {tuple(self.x.shape[1:])}"
            )
        if self.moved and x.ndim != 4:
            raise ArgumentError(
                f"moved is {self.moved:g} for events of shape {list(x.shape[1:])}: expected images [C, H, W], or 0"
            )
        if cond is not None and not (self.labelled and _are_labels(cond)):
            raise ArgumentError(
                f"a replay buffer {'keeps integer labels (B,)' if self.labelled else 'without labels'} was given "
                "conditions: build it with labelled=True for integer labels, else start chains at 'data' or in 'noise'"
            )

    @torch.no_grad()
    def write(
        self,
        slots: Int[Tensor, " n"],
        x: Float[Tensor, "n *event"],
        age: Int[Tensor, " n"],
        label: Int[Tensor, " n"] | None = None,
    ) -> None:
        """Put chains back. Of several in one row the last stays; age 0 marks a chain to be begun anew."""
        rows = last_of_each(slots)
        place = slots[rows]
        self.x[place] = x[rows].to(self.x)
        self.age[place] = age[rows]
        if self.labelled and label is not None:
            self.label[place] = label[rows]


def _padded(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def _are_labels(cond: Cond) -> TypeGuard[Tensor]:
    return isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point()


def labels_of(cond: Cond, like: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The condition where it is integer labels, else -1 for each."""
    return cond if _are_labels(cond) else torch.full_like(like, -1)


def last_of_each(slots: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Indices of the last occurrence of each value."""
    order = torch.sort(slots, stable=True).indices
    ranked = slots[order]
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:-1] = ranked[1:] != ranked[:-1]
    return order[last]


STARTS = {"data": FromData, "noise": FromNoise, "buffer": ReplayBuffer}


# ---------------------------------------------------------------- memory


def _check_memory(size: int, shape: Sequence[int]) -> None:
    needed, free = size * (4 * math.prod(shape) + 8), free_memory()
    if needed > free:
        raise ArgumentError(
            f"a replay buffer of {size:,} events of shape {list(shape)} takes {needed / GIB:.3g} GiB and "
            f"{free / GIB:.3g} GiB of memory are free: reduce its size to {max(1, size * free // needed // 2):,}, "
            "or the size of the events"
        )
