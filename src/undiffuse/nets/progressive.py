"""The image itself at every resolution: progressive inputs and outputs (Karras et al. 2020; Song et al. 2021, app. H).

Beside the features h goes a pyramid: the noisy image, made smaller on the way down, or the answer, made larger on the
way up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.nets.blocks import Norms, zero
from undiffuse.nets.resampling import Double, FilteredConv, Halve

Image = Float[Tensor, "b c h w"]


class ResidualInput(nn.Module):
    """p <- h <- r (h + conv(halve(p))): the image is a second network, of one convolution per level.

    Args:
        image_width: channels of p before.
        width: channels of h, and of p behind it.
        resample_filter: filter of the halving.
        rescale: r.
    """

    def __init__(self, image_width: int, width: int, resample_filter: Sequence[float], rescale: float):
        super().__init__()
        self.conv = FilteredConv(image_width, width, resample_filter)
        self.rescale = rescale
        self.image_width, self.width = width, width  # of what it gives

    def forward(self, image: Tensor, h: Image) -> tuple[Tensor, Image]:
        both = (self.conv(image) + h) * self.rescale
        return both, both


class SkipInput(nn.Module):
    """p <- halve(p), and h <- h + conv(p) or [conv(p), h], conv of 1 x 1.

    Args:
        image_width: channels of p.
        width: channels of h before.
        resample_filter: filter of the halving.
        concatenate: [conv(p), h], which has twice the channels, instead of the sum.
    """

    def __init__(self, image_width: int, width: int, resample_filter: Sequence[float], concatenate: bool):
        super().__init__()
        self.halve = Halve(resample_filter)
        self.conv = nn.Conv2d(image_width, width, 1)
        self.concatenate = concatenate
        self.image_width, self.width = image_width, 2 * width if concatenate else width  # of what it gives

    def forward(self, image: Tensor, h: Image) -> tuple[Tensor, Image]:
        image = self.halve(image)
        told = self.conv(image)
        return image, torch.cat([told, h], dim=1) if self.concatenate else told + h


class SkipOutput(nn.Module):
    """y <- conv(silu(norm(h))) + double(y): every level says its part of the answer, the lowest first.

    The convolution is 0 at the start. At the lowest level there is no y yet.
    """

    def __init__(self, width: int, image_width: int, resample_filter: Sequence[float], norms: Norms):
        super().__init__()
        self.norm = norms(width)
        self.conv = zero(nn.Conv2d(width, image_width, 3, padding=1))
        self.enlarge = Double(resample_filter)

    def forward(self, image: Tensor | None, h: Image) -> Image:
        own = self.conv(self.norm(h))
        return own if image is None else own + self.enlarge(image)
