"""One configurable U-Net."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.nets.blocks import Norms, glorot, zero
from undiffuse.nets.embedding import Cond, Embedding, ImageFourier
from undiffuse.nets.mlp import event_shape
from undiffuse.nets.resampling import BOX, Double
from undiffuse.nets.stages import PROGRESSIVE_OUTPUTS, UP_ATTENTION, Stages

INITIAL: dict[str, Callable[[nn.Module], None] | None] = {"torch": None, "glorot": glorot}


class UNet(nn.Module):
    """Convolutional U-Net: `net(x, c_noise, cond) -> (B, C, H, W)` in the type of x, exactly 0 before training.

    Level i works at resolution (H, W) / 2^i with `width * multipliers[i]` channels. On the way down each level has
    `blocks` residual blocks, on the way up `blocks + 1`, each of which is given one stored activation of the way
    down. Between them: a block, attention, a block.

    | knob | NCSN++ (Song et al. 2021) | DDPM++ (the same) | DDPM (Ho et al. 2020) | ADM (Dhariwal and Nichol 2021) |
    |---|---|---|---|---|
    | `width`, `multipliers` | 128, [1, 2, 2, 2] | as NCSN++ | as NCSN++ | 192, [1, 2, 3, 4] |
    | `blocks` | 4, deep: 8 | 4, deep: 8 | 2 | 3 |
    | `attention`, `up_attention` | [16], "last" | [16], "last" | [16], "last" | [32, 16, 8], "every" |
    | `heads`, `head_width` | 1 | 1 | 1 | None, 64 |
    | `embedding`, `noise_scale` | "fourier", 16 | "sinusoidal", 999 | "sinusoidal", 999 | "sinusoidal", 1000 |
    | `noise_frequencies` | | [1, 1e-4] | [1, 1e-4] | [1, 1.1e-4] |
    | `noise_features` | 2 width | width | width | width |
    | `late_condition` | | | | True |
    | `modulation` | "shift" | "shift" | "shift" | "scale-shift" |
    | `resample` | "block-conv" | "block-conv" | "conv-end" | "block" |
    | `resample_filter` | [1, 3, 3, 1] | [1, 1] | [1, 1] | [1, 1] |
    | `skip_rescale` | True | True | False | False |
    | `progressive_input` | "residual", large images: "input-skip" | "none" | "none" | "none" |
    | `progressive_output` | "none", large images: "output-skip" | "none" | "none" | "none" |
    | `norm_eps` | 1e-6 | 1e-6 | 1e-6 | 1e-5 |
    | `initial` | "glorot" | "glorot" | "glorot" | "torch" |

    `undiffuse.nets.presets` has them by name, in all their sizes. NCSN++'s division of the output by sigma is none
    of the network's business: score = -noise / sigma, so its output before the division is a predicted noise (with the
    opposite sign), which `NetworkDenoiser(..., prediction="noise-unscaled")` divides where a score is asked for.

    Args:
        shape: event shape [C, H, W]. Other sizes are taken at the call too, if they are divisible.
        width: channels of the first level.
        multipliers: channels of level i in units of `width`; its length is the number of levels.
        blocks: residual blocks per level.
        attention: resolutions (height in pixels) whose blocks are followed by self-attention.
        middle_attention: self-attention between the two blocks of the lowest level.
        up_attention: on the way up, attention behind "every" block of such a resolution, or the "last" one only.
        head_width: channels per attention head.
        heads: number of heads; None: as many as `head_width` gives.
        num_classes: number of class labels; -1 means no label. None: no labels.
        cond_dim: size of a vector condition; a row of NaN means absent. None: no vector.
        late_condition: label and vector join the noise embedding behind its second layer, not behind its first.
        embedding: "sinusoidal" or "fourier" features of the noise label.
        noise_scale, noise_offset: the features are of `noise_scale (label + noise_offset)`.
        noise_features: number of those features.
        noise_frequencies: [highest, lowest] of sinusoidal ones; None: [64, 0.25], for labels of order one.
        embedding_width: size of the embedding that modulates the blocks; None: 4 width.
        modulation: "scale-shift" or "shift".
        resample: "block" (within a residual block, as in BigGAN), "block-conv" (its skip branch with a 1 x 1
            convolution), "conv" (a convolution of its own), "conv-end" (going down, it pads the image's end only) or
            "pool" (no parameters: 2 x 2 means down, repeated pixels up).
        resample_filter: low-pass filter of every change of resolution; [1, 1] is "pool"'s.
        skip_rescale: multiply every residual sum by 1/sqrt(2).
        progressive_input: the noisy image at every level: "none", "residual" or "input-skip".
        combine: how "input-skip" joins: "sum" or "cat".
        progressive_output: the answer is summed over levels ("output-skip"), or comes from the first ("none").
        input_fourier: the network also sees sin and cos of `2^n pi x` for these n, the place within one of 256 values
            (periods of 2 and 1 of them: 7 and 8), which a likelihood needs and bf16 rounds away; see `ImageFourier`.
            The noise label must be log(sigma / alpha): prediction "noise-unscaled".
        norm_groups: groups of every norm; None: 32, fewer where they would have less than 4 channels.
        norm_eps: added to the variance in every norm.
        dropout: probability, within the residual blocks.
        out_channels: channels of the result; None: those of x.
        initial: how weights start: "torch" (as torch's layers do) or "glorot" (as in the first three columns above).

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
        up_attention: str = "every",
        head_width: int = 64,
        heads: int | None = None,
        num_classes: int | None = None,
        cond_dim: int | None = None,
        late_condition: bool = False,
        embedding: str = "sinusoidal",
        noise_scale: float = 1.0,
        noise_offset: float = 0.0,
        noise_features: int = 64,
        noise_frequencies: Sequence[float] | None = None,
        embedding_width: int | None = None,
        modulation: str = "scale-shift",
        resample: str = "block",
        resample_filter: Sequence[float] = BOX,
        skip_rescale: bool = False,
        progressive_input: str = "none",
        combine: str = "sum",
        progressive_output: str = "none",
        input_fourier: Sequence[int] = (),
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        out_channels: int | None = None,
        initial: str = "torch",
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
        channels, e = self.shape[0], embedding_width or 4 * width
        make = Stages(
            embedding=e,
            modulation=modulation,
            dropout=dropout,
            rescale=math.sqrt(0.5) if skip_rescale else 1.0,
            norms=Norms(norm_groups, norm_eps),
            head_width=head_width,
            heads=heads,
            resample=resample,
            resample_filter=tuple(resample_filter),
            progressive_input=progressive_input,
            combine=combine,
        )
        levels = list(zip([width * m for m in multipliers], self._attends(attention)))
        bottom = levels[-1][0]

        self.embedding = Embedding(
            e,
            noise=embedding,
            num_classes=num_classes,
            cond_dim=cond_dim,
            noise_scale=noise_scale,
            noise_offset=noise_offset,
            features=noise_features,
            frequencies=noise_frequencies,
            late_condition=late_condition,
        )
        self.fine = ImageFourier(input_fourier)
        self.first = nn.Conv2d(channels * self.fine.copies, width, 3, padding=1)
        self.inputs = nn.ModuleList()
        self.down, stored = self._way_down(make, width, levels, blocks)
        self.middle = nn.ModuleList([make.stage(bottom, bottom, attend) for attend in (middle_attention, False)])
        last_only = choose(up_attention, UP_ATTENTION, "up_attention")
        self.up = self._way_up(make, levels, stored, blocks, last_only)
        self.norm = make.norms(levels[0][0])
        self.last = zero(nn.Conv2d(levels[0][0], out_channels or channels, 3, padding=1))
        # The answer's parts of the lower levels, the lowest first, where there are any.
        self.outputs = nn.ModuleList()
        if choose(progressive_output, PROGRESSIVE_OUTPUTS, "progressive_output"):
            self.outputs.extend(make.image_output(wide, out_channels or channels) for wide, _ in levels[:0:-1])
        self.enlarge = Double(make.resample_filter)
        start = choose(initial, INITIAL, "initial")
        if start is not None:
            start(self)

    def _attends(self, attention: Sequence[int]) -> list[bool]:
        """Whether each level has attention."""
        heights = [self.shape[1] >> i for i in range(self.levels)]
        absent = [r for r in attention if r not in heights]
        if absent:
            raise ArgumentError(f"attention at resolution {absent[0]}: this network's resolutions are {heights}")
        return [h in attention for h in heights]

    def _way_down(self, make: Stages, now: int, levels: Sequence[tuple[int, bool]], blocks: int):
        """The stages from the first level to the last, and the channels of every activation to be stored."""
        stages, stored, image = nn.ModuleList(), [now], self.shape[0]
        for i, (wide, attend) in enumerate(levels):
            if i:
                stages.append(make.halve(now))
                join = make.image_input(image, now)
                if join is not None:
                    self.inputs.append(join)
                    image, now = join.image_width, join.width
                stored.append(now)
            for _ in range(blocks):
                stages.append(make.stage(now, wide, attend))
                stored.append(now := wide)
        return stages, stored

    def _way_up(
        self, make: Stages, levels: Sequence[tuple[int, bool]], stored: Sequence[int], blocks: int, last_only: bool
    ) -> nn.ModuleList:
        """Per level, from the last to the first, its stages and the change to the next resolution."""
        up, stored, now = nn.ModuleList(), list(stored), levels[-1][0]
        for i, (wide, attend) in reversed(list(enumerate(levels))):
            steps = nn.ModuleList()
            for block in range(blocks + 1):
                steps.append(make.stage(now + stored.pop(), wide, attend and (block == blocks or not last_only)))
                now = wide
            if i:
                steps.append(make.double(now))
            up.append(steps)
        return up

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
        e, image, h = self.embedding(c_noise, cond).to(dtype), x.to(dtype), self.fine(x, c_noise).to(dtype)
        if x.device.type == "cpu":  # torch's convolutions are fastest so, whatever the weights' layout
            image, h = (z.contiguous(memory_format=torch.channels_last) for z in (image, h))
        changes, h = 0, self.first(h)
        stored = [h]
        for stage in self.down:
            h = stage(h, e)
            if len(self.inputs) and not stage.takes_stored:
                image, h = self.inputs[changes](image, h)
                changes += 1
            stored.append(h)
        for stage in self.middle:
            h = stage(h, e)
        answer = None
        for level, steps in enumerate(self.up):
            for stage in steps.children():
                if len(self.outputs) and not stage.takes_stored:
                    answer = self.outputs[level](answer, h)
                h = stage(torch.cat([h, stored.pop()], dim=1) if stage.takes_stored else h, e)
        h = self.last(self.norm(h))
        return (h if answer is None else h + self.enlarge(answer)).to(x.dtype)
