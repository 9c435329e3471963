"""Changes of resolution by 2: a low-pass filter and every second pixel, or zeros between pixels and the filter.

The filter is separable and even: [1, 1] is the mean of 2 x 2 pixels and their repetition, [1, 3, 3, 1] the
anti-aliased one (Zhang 2019; Karras et al. 2020, StyleGAN2; Song et al. 2021, appendix H). Outside the image is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError

BOX = (1.0, 1.0)


def taps(resample_filter: Sequence[float]) -> tuple[float, ...]:
    """The filter with sum 1.

    Raises:
        ArgumentError: an odd number of taps, one that is not the same from both ends, or a sum that is not positive.
    """
    given = tuple(float(f) for f in resample_filter)
    if len(given) < 2 or len(given) % 2 or given != given[::-1] or not 0 < sum(given) < float("inf"):
        raise ArgumentError(
            f"resample_filter={list(given)}: expected an even number of taps, the same from both ends, with a positive "
            "sum, for example [1, 1] or [1, 3, 3, 1]"
        )
    return tuple(f / sum(given) for f in given)


class Filter(nn.Module):
    """A separable filter as a convolution of every channel with one kernel (h, h), which holds no parameters."""

    kernel: Tensor

    def __init__(self, resample_filter: Sequence[float] = BOX):
        super().__init__()
        self.taps = taps(resample_filter)
        self.box = len(self.taps) == 2
        line = torch.tensor(self.taps, dtype=torch.float64)
        self.register_buffer("kernel", torch.outer(line, line).float()[None, None], persistent=False)
        # With so many zeros around it, n pixels become n / 2.
        self.border = (len(self.taps) - 2) // 2

    def per_channel(self, x: Tensor) -> Tensor:
        """The kernel, once for each channel of x."""
        return self.kernel.to(x.device, x.dtype).expand(x.shape[1], 1, *self.kernel.shape[2:])


class Same(nn.Module):
    """No change of resolution."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Halve(Filter):
    """`y[i] = sum_k h[k] x[2 i + k - border]` in rows and columns, border = taps / 2 - 1; [1, 1]: mean over 2 x 2."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
        if self.box:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self.per_channel(x), stride=2, padding=self.border, groups=x.shape[1])

    def learned(self, channels: int) -> Resize:
        """A convolution at every second pixel, of the filtered image where the filter is not [1, 1]."""
        if self.box:
            return Resize(Same(), nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        return Resize(Same(), FilteredConv(channels, channels, self.taps))

    def learned_after_end(self, channels: int) -> Resize:
        """`learned`, with its zeros at the image's end only, as TensorFlow's padding "SAME" has them, and so DDPM."""
        if not self.box:
            raise ArgumentError('resample="conv-end" has no filter: expected resample_filter=[1, 1], or "conv"')
        return Resize(Same(), ConvAfterEnd(channels))


class Double(Filter):
    """`y[j] = 2 sum_i h[j - 2 i + border] x[i]` in rows and columns; [1, 1]: each pixel becomes 2 x 2.

    Four times the adjoint of `Halve`, so that constants stay constant inside the image.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
        if self.box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.conv_transpose2d(x, 4 * self.per_channel(x), stride=2, padding=self.border, groups=x.shape[1])

    def learned(self, channels: int) -> Resize:
        """The doubled image, then a convolution."""
        return Resize(Double(self.taps), nn.Conv2d(channels, channels, 3, padding=1))

    def learned_after_end(self, channels: int) -> Resize:
        """`learned`: only halving has an end to pad."""
        return self.learned(channels)


class FilteredConv(nn.Conv2d):
    """A 3 x 3 convolution and `Halve` in one: the image is padded once, filtered, convolved at every second pixel.

    (StyleGAN2's fused form. Padding between the two, which `Halve` after a convolution has, is left out.)
    """

    def __init__(self, width_in: int, width_out: int, resample_filter: Sequence[float]):
        super().__init__(width_in, width_out, 3, stride=2)
        self.filter = Filter(resample_filter)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        kernel = self.filter.per_channel(x)
        return super().forward(F.conv2d(x, kernel, padding=self.filter.border + 1, groups=x.shape[1]))


class ConvAfterEnd(nn.Conv2d):
    """A 3 x 3 convolution at every second pixel that looks at rows 2 i, 2 i + 1, 2 i + 2.

    (A stride-2 convolution with a border of 1 looks at 2 i - 1, 2 i, 2 i + 1.)
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Resize(nn.Module):
    """A change of resolution that is not told the noise level: the bare map, or with a convolution."""

    takes_stored = False

    def __init__(self, resample: nn.Module, conv: nn.Module | None):
        super().__init__()
        self.resample, self.conv = resample, conv

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = self.resample(x)
        return x if self.conv is None else self.conv(x)
