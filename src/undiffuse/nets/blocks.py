"""Parts of the U-Net: residual block and self-attention."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.core.errors import ArgumentError
from undiffuse.nets.norm import norm_act, transformed


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all parameters 0, so that what it ends starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer.starts_at_zero = True  # pyright: ignore[reportArgumentType]  (a mark, no parameter)
    return layer


def glorot(net: nn.Module) -> None:
    """The start of Ho et al. 2020 and Song et al. 2021: uniform weights of variance 2 / (fan in + fan out), no offsets.

    Queries, keys and values have a tenth of that variance, each as a layer of its own. What starts at 0 stays.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not getattr(module, "starts_at_zero", False):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, Attention):
            bound = math.sqrt(3 * 0.1 / module.qkv.in_features)
            nn.init.uniform_(module.qkv.weight, -bound, bound)


def groups_of(channels: int, most: int = 32, least_size: int = 4) -> int:
    """Number of norm groups: the largest divisor of `channels` with groups <= `most` and size >= `least_size`."""
    limit = max(1, min(most, channels // least_size))
    return next(n for n in range(limit, 0, -1) if channels % n == 0)


class NormAct(nn.Module):
    """f((1 + s) (w norm(x) + b) + d): group norm with learned w, b and, where given, per-sample s, d (B, C).

    f = SiLU or the identity; `groups` None: `groups_of(channels)`.
    """

    def __init__(self, channels: int, *, silu: bool = True, eps: float = 1e-5, groups: int | None = None):
        super().__init__()
        groups = groups or groups_of(channels)
        if channels % groups:
            raise ArgumentError(f"norm_groups={groups} over {channels} channels: expected a number that divides them")
        self.group, self.eps, self.silu = channels // groups, eps, silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Float[Tensor, "b c h w"], scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Float[Tensor, "b c h w"]:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        gain, bias = self.weight[None].to(wide), self.bias[None].to(wide)
        if scale is not None:
            gain, bias = gain * (1 + scale), bias * (1 + scale)
        if shift is not None:
            bias = bias + shift
        return norm_act(x, gain, bias, self.group, self.eps, self.silu)


@dataclass(frozen=True)
class Norms:
    """How the norms of a network are made: number of groups (None: `groups_of`) and what is added to the variance."""

    groups: int | None = None
    eps: float = 1e-5

    def __call__(self, channels: int, *, silu: bool = True) -> NormAct:
        return NormAct(channels, silu=silu, eps=self.eps, groups=self.groups)


PLAIN = Norms()


class ResidualBlock(nn.Module):
    """x <- r (R x + conv(dropout(silu(modulate(norm(conv(R silu(norm(x)))), e)))))

    R changes the resolution or is the identity, r = 1/sqrt(2) or 1; a 1x1 convolution takes the skip branch R x to
    another number of channels. The second convolution is 0 at the start.

    Args:
        width_in, width_out: channels.
        embedding: size of e.
        resample: `Same()`, `Halve()` or `Double()`, of `undiffuse.nets.resampling`.
        modulation: "scale-shift" (s, d = linear(e) after the second norm; Dhariwal and Nichol 2021) or "shift"
            (d = linear(e) before it; Ho et al. 2020).
        dropout: probability.
        rescale: r.
        norms: how norms are made.
        skip_conv: the 1x1 convolution also where the number of channels stays (Song et al. 2021, as in BigGAN).
    """

    takes_stored = False  # on its own, between two levels; within a Stage, the Stage says so

    def __init__(
        self,
        width_in: int,
        width_out: int,
        embedding: int,
        *,
        resample: nn.Module,
        modulation: str,
        dropout: float,
        rescale: float,
        norms: Norms = PLAIN,
        skip_conv: bool = False,
    ):
        super().__init__()
        self.resample, self.rescale, self.dropout = resample, rescale, dropout
        self.scaled = modulation == "scale-shift"
        self.norm_1 = norms(width_in)
        self.conv_1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, width_out * (2 if self.scaled else 1))
        self.norm_2 = norms(width_out)
        self.conv_2 = zero(nn.Conv2d(width_out, width_out, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width_out, 1) if skip_conv or width_in != width_out else None

    def forward(self, x: Float[Tensor, "b c h w"], e: Float[Tensor, "b e"]) -> Float[Tensor, "b d i j"]:
        h = self.conv_1(self.resample(self.norm_1(x)))
        m = self.modulation(e)
        if self.scaled:
            scale, shift = m.chunk(2, dim=1)
            h = self.norm_2(h, scale, shift)
        else:
            h = self.norm_2(h + m[:, :, None, None].to(h.dtype))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        x = self.resample(x)
        h = self.conv_2(h) + (x if self.skip is None else self.skip(x))
        return h if self.rescale == 1 else h * self.rescale


def _slow_when_fused(q: Float[Tensor, "b heads tokens d"]) -> bool:
    """On a CPU in 16 bits, where up to some hundred tokens the fused kernel takes 2 to 6 times as long."""
    return q.device.type == "cpu" and q.dtype.itemsize < 4 and q.shape[2] <= 64


def attend(
    q: Float[Tensor, "b heads n d"], k: Float[Tensor, "b heads n d"], v: Float[Tensor, "b heads n d"]
) -> Float[Tensor, "b heads n d"]:
    """softmax(q k^T / sqrt(d)) v, by torch's own kernels.

    In torch 2.13 the fused ones have no forward-mode derivative (there, the plain one is used) and no second one:
    for the gradient of a gradient enter `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the call.
    """
    plain = not torch.compiler.is_compiling() and (transformed() or _slow_when_fused(q))
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """x <- r (x + out(softmax(q k^T / sqrt(d)) v)), heads of width d over all pixels; see `attend`.

    Args:
        channels: channels of x.
        head_width: d; `channels` is split in `channels // d` heads, one if it is less than d.
        rescale: r.
        norms: how its norm is made.
    """

    def __init__(self, channels: int, head_width: int, rescale: float, norms: Norms = PLAIN):
        super().__init__()
        self.heads = max(1, channels // head_width)
        if channels % self.heads:
            raise ArgumentError(
                f"attention over {channels} channels with head_width={head_width}: expected a width that divides them"
            )
        self.rescale = rescale
        self.norm = norms(channels, silu=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        b, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = self.qkv(tokens).reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        y = x + self.out(mixed).reshape(b, h, w, c).permute(0, 3, 1, 2)
        return y if self.rescale == 1 else y * self.rescale


class Stage(nn.Module):
    """A residual block, then attention where asked for."""

    takes_stored = True

    def __init__(self, block: ResidualBlock, attention: Attention | None):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = self.block(x, e)
        return x if self.attention is None else self.attention(x)
