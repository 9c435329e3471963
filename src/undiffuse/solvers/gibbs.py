"""Block Gibbs sampling of machines whose two layers are independent given each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.solvers.markov import Cond, Counted, Draws, Kernel


@runtime_checkable
class TwoLayers(Protocol):
    """Binary units in two layers, each independent given the other; the energy is that of the visible ones alone."""

    def hidden_given(self, x: Tensor) -> Tensor:
        """`P(h_j = 1 | x)`, (B, H)."""
        ...

    def visible_given(self, h: Tensor) -> Tensor:
        """`P(x_i = 1 | h)`, (B, V)."""
        ...


@dataclass(frozen=True)
class BlockGibbs(Kernel):
    """`h ~ p(h | x)`, then `x' ~ p(x | h)`: leaves `p(x)` invariant, is reversible, and never rejects.

    Raises:
        ArgumentError: at the first step, a target that is not made of two binary layers.
    """

    exact: ClassVar[bool] = True

    def init(self, target, x: Float[Tensor, "b v"], cond: Cond = None) -> TwoLayers:
        machine = target.target if isinstance(target, Counted) else target
        if not isinstance(machine, TwoLayers):
            raise ArgumentError(
                f"{type(machine).__name__} has no `hidden_given` and `visible_given`: BlockGibbs moves machines of two "
                f"binary layers, such as BernoulliRBM; for continuous x take MALA or HMC"
            )
        return machine

    def step(
        self, target, x: Float[Tensor, "b v"], state: TwoLayers, draw: Draws, cond: Cond = None
    ) -> tuple[Float[Tensor, "b v"], TwoLayers]:
        h = _bernoulli(state.hidden_given(x), draw)
        return _bernoulli(state.visible_given(h), draw), state


def _bernoulli(chance: Tensor, draw: Draws) -> Tensor:
    u = random.uniform(chance.shape, draw.generator, dtype=chance.dtype, device=chance.device)
    return (u < chance).to(chance.dtype)
