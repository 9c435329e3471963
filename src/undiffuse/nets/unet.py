"""One configurable U-Net."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.nets.blocks import (
    Attention,
    Double,
    Halve,
    NormAct,
    ResidualBlock,
    Resize,
    Same,
    Stage,
    zero,
)
from undiffuse.nets.embedding import Cond, Embedding
from undiffuse.nets.mlp import event_shape

Resizer = Callable[[int, Halve | Double], nn.Module]

MODULATIONS = {"scale-shift": True, "shift": False}


class UNet(nn.Module):
    """Convolutional U-Net: `net(x, c_noise, cond) -> (B, C, H, W)` in the type of x, exactly 0 before
    training.

    Level i works at resolution (H, W) / 2^i with `width * multipliers[i]` channels. On the way down each level has
    `blocks` residual blocks, on the way up `blocks + 1`, each of which is given one stored activation of the way
    down. Between them: a block, attention, a block.

    | knob | NCSN++ / DDPM++ (Song et al. 2021) | ADM (Dhariwal and Nichol 2021) | DDPM (Ho et al. 2020) |
    |---|---|---|---|
    | `width`, `multipliers` | 128, [1, 2, 2, 2] (EDM: [2, 2, 2]) | 192, [1, 2, 3, 4] | 128, [1, 2, 2, 2] |
    | `blocks` | 4 | 3 | 2 |
    | `attention` | [16] | [32, 16, 8] | [16] |
    | `embedding` | "fourier", `noise_features` = 2 width / "sinusoidal" | "sinusoidal" | "sinusoidal" |
    | `modulation` | "shift" | "scale-shift" | "shift" |
    | `resample` | "block" | "block" | "conv" |
    | `skip_rescale` | True | False | False |
    | `head_width` | the level's channels | 64 | the level's channels |

    (NCSN++'s FIR filters and progressive inputs are not built.)

    Args:
        shape: event shape [C, H, W]. Other sizes are taken at the call too, if they are divisible.
        width: channels of the first level.
        multipliers: channels of level i in units of `width`; its length is the number of levels.
        blocks: residual blocks per level.
        attention: resolutions (height in pixels) whose blocks are followed by self-attention.
        middle_attention: self-attention between the two blocks of the lowest level.
        head_width: channels per attention head.
        num_classes: number of class labels; -1 means no label. None: no labels.
        cond_dim: size of a vector condition; a row of NaN means absent. None: no vector.
        embedding: "sinusoidal" or "fourier" features of the noise label.
        noise_scale: factor on the noise label before its features.
        noise_features: number of those features.
        embedding_width: size of the embedding that modulates the blocks; None: 4 width.
        modulation: "scale-shift" or "shift".
        resample: "block" (within a residual block, as in BigGAN), "conv" (a convolution of its own) or "pool"
            (no parameters: 2 x 2 means down, repeated pixels up).
        skip_rescale: multiply every residual sum by 1/sqrt(2).
        dropout: probability, within the residual blocks.
        out_channels: channels of the result; None: those of x.

    Raises:
        ArgumentError: an unknown name, a number out of range, a resolution that does not occur, a size that is not
            divisible by 2^(levels - 1); at the call, an `x` or a condition that does not fit.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        *,
        middle_attention: bool = True,
        head_width: int = 64,
        num_classes: int | None = None,
        cond_dim: int | None = None,
        embedding: str = "sinusoidal",
        noise_scale: float = 1.0,
        noise_features: int = 64,
        embedding_width: int | None = None,
        modulation: str = "scale-shift",
        resample: str = "block",
        skip_rescale: bool = False,
        dropout: float = 0.0,
        out_channels: int | None = None,
    ):
        super().__init__()
        self.shape = event_shape(shape)
        if len(self.shape) != 3:
            raise ArgumentError(f"event shape {list(self.shape)}: a U-Net takes [channels, height, width]")
        if not multipliers or min(width, blocks, *multipliers) < 1 or not 0 <= dropout < 1:
            raise ArgumentError(
                f"width={width}, multipliers={list(multipliers)}, blocks={blocks}, dropout={dropout}: expected "
                f"positive integers, at least one multiplier, and a dropout in [0, 1)"
            )
        self.levels = len(multipliers)
        self._check_size(self.shape[1], self.shape[2])
        choose(modulation, MODULATIONS, "modulation")
        channels, e = self.shape[0], embedding_width or 4 * width
        self._rescale = math.sqrt(0.5) if skip_rescale else 1.0
        self._block = {"embedding": e, "modulation": modulation, "dropout": dropout, "rescale": self._rescale}
        self._head_width = head_width
        resize = choose(resample, {"block": self._by_block, "conv": self._by_conv, "pool": self._by_pool}, "resample")
        levels = list(zip([width * m for m in multipliers], self._attends(attention)))
        bottom = levels[-1][0]

        self.embedding = Embedding(
            e,
            noise=embedding,
            num_classes=num_classes,
            cond_dim=cond_dim,
            noise_scale=noise_scale,
            features=noise_features,
        )
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, stored = self._way_down(width, levels, blocks, resize)
        self.middle = nn.ModuleList([self._stage(bottom, bottom, attend) for attend in (middle_attention, False)])
        self.up = self._way_up(levels, stored, blocks, resize)
        self.norm = NormAct(levels[0][0])
        self.last = zero(nn.Conv2d(levels[0][0], out_channels or channels, 3, padding=1))

    def _attends(self, attention: Sequence[int]) -> list[bool]:
        """Whether each level has attention."""
        heights = [self.shape[1] >> i for i in range(self.levels)]
        absent = [r for r in attention if r not in heights]
        if absent:
            raise ArgumentError(f"attention at resolution {absent[0]}: this network's resolutions are {heights}")
        return [h in attention for h in heights]

    def _way_down(self, now: int, levels: Sequence[tuple[int, bool]], blocks: int, resize: Resizer):
        """The stages from the first level to the last, and the channels of every activation to be stored."""
        stages, stored = nn.ModuleList(), [now]
        for i, (wide, attend) in enumerate(levels):
            if i:
                stages.append(resize(now, Halve()))
                stored.append(now)
            for _ in range(blocks):
                stages.append(self._stage(now, wide, attend))
                stored.append(now := wide)
        return stages, stored

    def _way_up(
        self, levels: Sequence[tuple[int, bool]], stored: list[int], blocks: int, resize: Resizer
    ) -> nn.ModuleList:
        """Per level, from the last to the first, its stages and the change to the next resolution."""
        up, stored, now = nn.ModuleList(), list(stored), levels[-1][0]
        for i, (wide, attend) in reversed(list(enumerate(levels))):
            steps = nn.ModuleList()
            for _ in range(blocks + 1):
                steps.append(self._stage(now + stored.pop(), wide, attend))
                now = wide
            if i:
                steps.append(resize(now, Double()))
            up.append(steps)
        return up

    def _stage(self, width_in: int, width_out: int, attend: bool) -> Stage:
        block = ResidualBlock(width_in, width_out, resample=Same(), **self._block)
        return Stage(block, Attention(width_out, self._head_width, self._rescale) if attend else None)

    def _by_block(self, channels: int, resample: Halve | Double) -> nn.Module:
        return ResidualBlock(channels, channels, resample=resample, **self._block)

    def _by_conv(self, channels: int, resample: Halve | Double) -> nn.Module:
        return resample.learned(channels)

    def _by_pool(self, channels: int, resample: Halve | Double) -> nn.Module:
        return Resize(resample, None)

    def _check_size(self, height: int, width: int) -> None:
        unit = 2 ** (self.levels - 1)
        if height % unit == 0 and width % unit == 0:
            return
        fits = [-(-n // unit) * unit for n in (height, width)]
        most = next(n for n in range(self.levels, 0, -1) if height % 2 ** (n - 1) == 0 and width % 2 ** (n - 1) == 0)
        raise ArgumentError(
            f"images of {height}x{width} with {self.levels} levels: height and width must be divisible by {unit}; "
            f"resize or pad them to {fits[0]}x{fits[1]}, or use {most} level{'s' if most > 1 else ''}"
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], c_noise: Float[Tensor, " b"], cond: Cond = None
    ) -> Float[Tensor, "b d h w"]:
        if x.shape[1] != self.shape[0]:
            raise ArgumentError(f"x has {x.shape[1]} channels: this U-Net was built for {self.shape[0]}")
        self._check_size(x.shape[2], x.shape[3])
        dtype = self.first.weight.dtype
        e, h = self.embedding(c_noise, cond).to(dtype), x.to(dtype)
        if x.device.type == "cpu":  # torch's convolutions are fastest so, whatever the weights' layout
            h = h.contiguous(memory_format=torch.channels_last)
        h = self.first(h)
        stored = [h]
        for stage in self.down:
            h = stage(h, e)
            stored.append(h)
        for stage in self.middle:
            h = stage(h, e)
        for steps in self.up:
            for stage in steps.children():
                h = stage(torch.cat([h, stored.pop()], dim=1) if stage.takes_stored else h, e)
        return self.last(self.norm(h)).to(x.dtype)
