"""A residual perceptron for 2-D and tabular data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError
from undiffuse.nets.embedding import Cond, Embedding


def event_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """A size or a list of sizes as a tuple of positive ints."""
    sizes = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    if not sizes or min(sizes) < 1:
        raise ArgumentError(f"event shape {list(sizes)}: expected one or more positive sizes")
    return sizes


class ResidualLayer(nn.Module):
    """h <- h + W_2 silu(W_1 silu(norm(h)) (1 + s(e)) + b(e)), W_2 zero at the start."""

    def __init__(self, hidden: int, embedding: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.first = nn.Linear(hidden, hidden)
        self.modulation = nn.Linear(embedding, 2 * hidden)
        self.second = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulation(e).chunk(2, dim=1)
        inner = self.first(F.silu(self.norm(h)))
        return h + self.second(F.silu(inner * (1 + scale) + shift))


class MLP(nn.Module):
    """Residual SiLU perceptron: `net(x, c_noise, cond) -> (B, *event)` in the type of x, exactly 0 before training.

    Args:
        shape: event shape, or the number of features.
        hidden: width of the hidden layers.
        layers: number of residual layers, each of two linear maps.
        num_classes: number of class labels; -1 means no label. None: no labels.
        cond_dim: size of a vector condition; a row of NaN means absent. None: no vector.
        embedding: "sinusoidal" or "fourier" features of the noise label.
        noise_scale: factor on the noise label before its features.

    Raises:
        ArgumentError: a size below 1; at the call, an `x` of another event shape or a condition out of range.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        hidden: int = 128,
        layers: int = 3,
        *,
        num_classes: int | None = None,
        cond_dim: int | None = None,
        embedding: str = "sinusoidal",
        noise_scale: float = 1.0,
    ):
        super().__init__()
        self.shape = event_shape(shape)
        if hidden < 1 or layers < 1:
            raise ArgumentError(f"hidden={hidden}, layers={layers}: expected positive numbers")
        size = math.prod(self.shape)
        self.embedding = Embedding(
            hidden, noise=embedding, num_classes=num_classes, cond_dim=cond_dim, noise_scale=noise_scale
        )
        self.first = nn.Linear(size, hidden)
        self.layers = nn.ModuleList(ResidualLayer(hidden, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.last = nn.Linear(hidden, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, x: Float[Tensor, "b *event"], c_noise: Float[Tensor, " b"], cond: Cond = None
    ) -> Float[Tensor, "b *event"]:
        if tuple(x.shape[1:]) != self.shape:
            raise ArgumentError(f"x has shape {tuple(x.shape)}: this MLP was built for (B, {_list(self.shape)})")
        e = self.embedding(c_noise, cond).to(self.first.weight.dtype)
        h = self.first(x.flatten(1).to(self.first.weight.dtype))
        for layer in self.layers:
            h = layer(h, e)
        return self.last(F.silu(self.norm(h))).reshape(x.shape).to(x.dtype)


def _list(shape: tuple[int, ...]) -> str:
    return ", ".join(str(n) for n in shape)
