"""Networks with one number per sample: energies. Smooth, since score matching takes their second derivatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from undiffuse.core.errors import ArgumentError
from undiffuse.nets.embedding import Cond, Embedding
from undiffuse.nets.mlp import event_shape

# E[silu(z)^2] = 0.3557 for z ~ N(0, 1): with this gain a layer hands on the variance that it got. Torch's own start
# loses a factor 8 in each, and the score of three layers then learns 200 times less in as many steps.
_GAIN = 0.3557**-0.5


def _layer(layer: nn.Linear | nn.Conv2d, normed: bool) -> nn.Module:
    """The layer, its weight divided by its largest singular value where asked for (Miyato et al. 2018).

    For a convolution that is the singular value of the weight as a matrix (out, in x taps).
    """
    nn.init.normal_(layer.weight, std=_GAIN * layer.weight[0].numel() ** -0.5)
    return parametrizations.spectral_norm(layer) if normed else layer


class EnergyMLP(nn.Module):
    """SiLU perceptron with one number per sample: `net(x, c_noise, cond) -> (B,)`.

    `h <- silu(W h + b + U e)`, e the embedding of noise label and class, then `w^T h + b`: infinitely differentiable.
    With spectral norm every W and w has largest singular value 1, so that `|E(x) - E(y)| <= 1.1^(layers + 1) |x - y|`
    (SiLU's slope is at most 1.1). It is estimated by one power iteration at each call in training mode, and stands
    still in evaluation mode.

    Args:
        shape: event shape, or the number of features.
        hidden: width of the hidden layers.
        layers: number of hidden layers behind the first.
        num_classes: number of class labels; -1 means no label. None: no labels.
        spectral_norm: normalise every layer that x passes.

    Raises:
        ArgumentError: a size below 1; at the call, an `x` of another event shape or a condition out of range.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        hidden: int = 128,
        layers: int = 2,
        *,
        num_classes: int | None = None,
        spectral_norm: bool = False,
    ):
        super().__init__()
        self.shape = event_shape(shape)
        if hidden < 1 or layers < 1:
            raise ArgumentError(f"hidden={hidden}, layers={layers}: expected positive numbers")
        sizes = [math.prod(self.shape)] + [hidden] * (layers + 1)
        self.embedding = Embedding(hidden, num_classes=num_classes)
        self.layers = nn.ModuleList(_layer(nn.Linear(m, n), spectral_norm) for m, n in itertools.pairwise(sizes))
        self.modulation = nn.Linear(hidden, hidden * len(self.layers), bias=False)
        self.last = _layer(nn.Linear(hidden, 1), spectral_norm)

    def forward(
        self, x: Float[Tensor, "b *event"], c_noise: Float[Tensor, " b"], cond: Cond = None
    ) -> Float[Tensor, " b"]:
        _check_event(x, self.shape, "EnergyMLP")
        dtype = self.modulation.weight.dtype
        shifts = self.modulation(self.embedding(c_noise, cond).to(dtype)).chunk(len(self.layers), dim=1)
        h = x.flatten(1).to(dtype)
        for layer, shift in zip(self.layers, shifts):
            h = F.silu(layer(h) + shift)
        return self.last(h)[:, 0].to(x.dtype)


class EnergyConv(nn.Module):
    """Convolutional energy of images: `net(x, c_noise, cond) -> (B,)`, at any number of channels.

    Level i halves the resolution by a 4x4 convolution at every second pixel to `width multipliers[i]` channels, adds
    `U e`, and refines by a residual 3x3 convolution: `h <- h + conv(silu(h))`. What is left, (H, W) / 2^levels, is
    flattened and goes through one hidden layer: the energy knows where things are.

    Args:
        shape: event shape [C, H, W]; H and W divisible by 2^levels.
        width: channels in units of which the multipliers count.
        multipliers: one per level.
        num_classes: number of class labels; -1 means no label. None: no labels.
        spectral_norm: divide every weight that x passes by its largest singular value, as a matrix (out, in x taps):
            a convolution's slope is then at most the square root of its taps per output pixel.

    Raises:
        ArgumentError: a size below 1, an indivisible height or width; at the call, an `x` of another event shape or a
            condition out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        *,
        num_classes: int | None = None,
        spectral_norm: bool = False,
    ):
        super().__init__()
        self.shape = event_shape(shape)
        if len(self.shape) != 3:
            raise ArgumentError(f"event shape {list(self.shape)}: EnergyConv takes [channels, height, width]")
        if not multipliers or min(width, *multipliers) < 1:
            raise ArgumentError(f"width={width}, multipliers={list(multipliers)}: expected one or more, all positive")
        unit = 2 ** len(multipliers)
        _check_size(*self.shape[1:], len(multipliers))
        self.widths = wide = [width * m for m in multipliers]
        pixels = (self.shape[1] // unit) * (self.shape[2] // unit)
        hidden = 4 * width
        self.embedding = Embedding(hidden, num_classes=num_classes)
        self.down = nn.ModuleList(
            _layer(nn.Conv2d(m, n, 4, stride=2, padding=1), spectral_norm)
            for m, n in zip([self.shape[0], *wide[:-1]], wide)
        )
        self.refine = nn.ModuleList(_layer(nn.Conv2d(n, n, 3, padding=1), spectral_norm) for n in wide)
        self.modulation = nn.Linear(hidden, sum(wide), bias=False)
        self.hidden = _layer(nn.Linear(wide[-1] * pixels, hidden), spectral_norm)
        self.last = _layer(nn.Linear(hidden, 1), spectral_norm)

    def forward(
        self, x: Float[Tensor, "b c h w"], c_noise: Float[Tensor, " b"], cond: Cond = None
    ) -> Float[Tensor, " b"]:
        _check_event(x, self.shape, "EnergyConv")
        dtype = self.modulation.weight.dtype
        shifts = self.modulation(self.embedding(c_noise, cond).to(dtype)).split(self.widths, dim=1)
        h = x.to(dtype)
        for i, (down, refine, shift) in enumerate(zip(self.down, self.refine, shifts)):
            h = down(F.silu(h) if i else h) + shift[:, :, None, None]
            h = h + refine(F.silu(h))
        return self.last(F.silu(self.hidden(F.silu(h).flatten(1))))[:, 0].to(x.dtype)


def _check_event(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(x.shape[1:]) != shape:
        sizes = ", ".join(str(n) for n in shape)
        raise ArgumentError(f"x has shape {tuple(x.shape)}: this {name} was built for (B, {sizes})")


def _check_size(height: int, width: int, levels: int) -> None:
    unit = 2**levels
    if height % unit == 0 and width % unit == 0:
        return
    most = next(n for n in range(levels, -1, -1) if height % 2**n == 0 and width % 2**n == 0)
    fits = [-(-n // unit) * unit for n in (height, width)]
    advice = f", or use {most} level{'s' if most > 1 else ''}" if most else ""
    raise ArgumentError(
        f"images of {height}x{width} with {levels} levels: height and width must be divisible by {unit}; pad them to "
        f"{fits[0]}x{fits[1]}{advice}"
    )
