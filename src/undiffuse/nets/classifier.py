"""Networks with a number per class: classifiers of noisy data, for `undiffuse.fields.NetworkClassifier`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError
from undiffuse.nets.embedding import Embedding
from undiffuse.nets.mlp import event_shape


class ClassifierMLP(nn.Module):
    """SiLU perceptron of any event: `net(x, c_noise) -> logits (B, K)`; `h <- silu(W h + b + U e)`, e of the noise.

    Args:
        shape: event shape, or the number of features.
        classes: K.
        hidden: width of the hidden layers.
        layers: number of hidden layers behind the first.

    Raises:
        ArgumentError: a size below 1, fewer than 2 classes.
    """

    def __init__(self, shape: int | Sequence[int], classes: int, hidden: int = 128, layers: int = 2):
        super().__init__()
        self.shape = event_shape(shape)
        _check(classes, hidden=hidden, layers=layers)
        sizes = [math.prod(self.shape)] + [hidden] * (layers + 1)
        self.embedding = Embedding(hidden)
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in itertools.pairwise(sizes))
        self.modulation = nn.Linear(hidden, hidden * len(self.layers), bias=False)
        self.last = nn.Linear(hidden, classes)

    def forward(self, x: Float[Tensor, "b *event"], c_noise: Float[Tensor, " b"]) -> Float[Tensor, "b k"]:
        shifts = self.modulation(self.embedding(c_noise).to(x.dtype)).chunk(len(self.layers), dim=1)
        h = x.flatten(1)
        for layer, shift in zip(self.layers, shifts):
            h = F.silu(layer(h) + shift)
        return self.last(h)


class ClassifierConv(nn.Module):
    """Convolutional classifier of images: `net(x, c_noise) -> logits (B, K)`.

    Level i refines by a residual 3x3 convolution with the noise added, `h <- h + conv(silu(h + U e))`, and (but for the
    last) halves the resolution by a 4x4 convolution at every second pixel. What is left is flattened and goes through
    one hidden layer.

    Args:
        shape: [C, H, W]; H and W divisible by 2^(levels - 1).
        classes: K.
        width: channels in units of which the multipliers count.
        multipliers: one per level.

    Raises:
        ArgumentError: a size below 1, fewer than 2 classes, an indivisible height or width.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int = 32, multipliers: Sequence[int] = (1, 2)):
        super().__init__()
        self.shape = event_shape(shape)
        _check(classes, width=width, **{f"multipliers[{i}]": m for i, m in enumerate(multipliers)})
        unit = 2 ** (len(multipliers) - 1)
        if len(self.shape) != 3 or not multipliers or self.shape[1] % unit or self.shape[2] % unit:
            raise ArgumentError(
                f"event shape {list(self.shape)}, {len(multipliers)} levels: expected [channels, height, width], "
                f"height and width divisible by 2^(levels - 1) = {unit}"
            )
        self.widths = wide = [width * m for m in multipliers]
        hidden = 4 * width
        self.embedding = Embedding(hidden)
        self.modulation = nn.Linear(hidden, sum(wide), bias=False)
        self.first = nn.Conv2d(self.shape[0], wide[0], 3, padding=1)
        self.refine = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1) for n in wide)
        self.down = nn.ModuleList(nn.Conv2d(m, n, 4, stride=2, padding=1) for m, n in itertools.pairwise(wide))
        pixels = (self.shape[1] // unit) * (self.shape[2] // unit)
        self.hidden = nn.Linear(wide[-1] * pixels, hidden)
        self.last = nn.Linear(hidden, classes)

    def forward(self, x: Float[Tensor, "b c h w"], c_noise: Float[Tensor, " b"]) -> Float[Tensor, "b k"]:
        shifts = self.modulation(self.embedding(c_noise).to(x.dtype)).split(self.widths, dim=1)
        h = self.first(x)
        for i, (refine, shift) in enumerate(zip(self.refine, shifts)):
            h = self.down[i - 1](F.silu(h)) if i else h
            h = h + refine(F.silu(h + shift[:, :, None, None]))
        return self.last(F.silu(self.hidden(F.silu(h).flatten(1))))


def _check(classes: int, **sizes: int) -> None:
    if classes < 2 or min(sizes.values()) < 1:
        given = ", ".join(f"{name}={value}" for name, value in {"classes": classes, **sizes}.items())
        raise ArgumentError(f"{given}: expected at least 2 classes, and sizes of at least 1")
