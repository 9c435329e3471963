"""Group norm, per-sample gain and bias, and SiLU, as one operation with few passes over memory.

On a CPU most of a U-Net's time outside its convolutions goes into reading and writing activations for these. Torch's
own group norm is slow where channels come last in memory, as the convolutions want them; here the statistics are two
sums over pixels, and all that happens per channel is folded in one multiply-add.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def norm_act(
    x: Float[Tensor, "b c h w"],
    gain: Float[Tensor, "#b c"],
    bias: Float[Tensor, "#b c"],
    group: int,
    eps: float,
    silu: bool = True,
) -> Float[Tensor, "b c h w"]:
    """f(gain * norm(x) + bias), f = SiLU or the identity (Wu and He 2018 for the norm).

    Mean and variance are those of each sample's groups of `group` neighbouring channels.

    Args:
        gain, bias: per channel, and per sample if the noise level modulates them; float32 or wider.
        group: channels per group, a divisor of c.
        eps: added to the variance.
        silu: apply SiLU.
    """
    gain, bias = gain.expand(x.shape[:2]), bias.expand(x.shape[:2])
    if _plain_autograd_only(x):
        return _Fused.apply(x, gain, bias, group, eps, silu)  # pyright: ignore[reportReturnType]
    if transformed():  # torch's decompositions of group norm want channels first
        x = x.contiguous()
    return compose(x, gain, bias, group, eps, silu)


def compose(x: Tensor, gain: Tensor, bias: Tensor, group: int, eps: float, silu: bool) -> Float[Tensor, "b c h w"]:
    """The same by torch's operations, one after the other: for GPUs, compilers, and derivatives of derivatives."""
    hat = F.group_norm(x, x.shape[1] // group, eps=eps)
    y = hat * gain[:, :, None, None].to(x.dtype) + bias[:, :, None, None].to(x.dtype)
    return F.silu(y) if silu else y


def transformed() -> bool:
    """In forward mode, or under a transform of torch.func: there, only torch's own operations will do."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _plain_autograd_only(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _rows(x: Tensor) -> Float[Tensor, "b p c"]:
    """(B, C, H, W) as (B, pixels, C); a view where channels come last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(rows: Float[Tensor, "b p c"], like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _pixel_sum(x: Float[Tensor, "b p c"], wide: torch.dtype) -> Float[Tensor, "b c"]:
    """Sum over pixels: accumulated in float32 at least; bfloat16 is rounded to 8 bits once, at the end.

    (A sum that returns float32 costs a converted copy of x. float16 needs it: its sums overflow.)
    """
    return x.sum(1, dtype=wide) if x.dtype == torch.float16 else x.sum(1).to(wide)


def _over_group(x: Float[Tensor, "b c"], group: int) -> Float[Tensor, "b c"]:
    """Each channel's value replaced by the mean over its group."""
    groups = x.unflatten(1, (-1, group))
    return groups.mean(2, keepdim=True).expand_as(groups).reshape(x.shape)


class _Fused(torch.autograd.Function):
    """`norm_act` for memory with channels last."""

    @staticmethod
    def forward(ctx, x, gain, bias, group, eps, silu):
        with torch.autocast("cpu", enabled=False):
            rows, wide, pixels = _rows(x), gain.dtype, x.shape[2] * x.shape[3]
            mean = _over_group(_pixel_sum(rows, wide), group) / pixels
            # About the mean, so that a narrow type's rounding is relative to the deviations, not to the mean.
            near = mean.to(x.dtype)
            centred = rows - near[:, None]
            rest = _over_group(_pixel_sum(centred, wide), group) / pixels if x.dtype != wide else 0.0
            mean = near.to(wide) + rest
            variance = _over_group(_pixel_sum(centred * centred, wide), group) / pixels - rest * rest
            inverse = variance.clamp_(min=0).add_(eps).rsqrt_()
            a = gain * inverse
            d = (bias - rest * a)[:, None].to(x.dtype)
            u = torch.addcmul(d, centred, a[:, None].to(x.dtype), out=centred)
            y = F.silu(u) if silu else u
        ctx.save_for_backward(x, gain, bias, mean, inverse, u if silu else None)
        ctx.options = group, eps, silu
        return _image(y, x)

    @staticmethod
    def backward(ctx, grad):
        """With u = gain hat(x) + bias, s = dL/du, N the size of a group, sums over the group:

        dL/dx = (gain s - sum(gain s)/N - hat(x) sum(gain s hat(x))/N) / std.
        """
        x, gain, bias, mean, inverse, u = ctx.saved_tensors
        group, _, silu = ctx.options
        if torch.is_grad_enabled():  # create_graph: this derivative will be differentiated
            wanted = [v for v, need in zip((x, gain, bias), ctx.needs_input_grad) if need]
            y = compose(x, gain, bias, *ctx.options)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *[next(found) if need else None for need in ctx.needs_input_grad[:3]], None, None, None
        with torch.autocast("cpu", enabled=False):
            rows, s = _rows(x), _rows(grad)
            if silu:
                s = torch.ops.aten.silu_backward(s, u)
            d_bias = _pixel_sum(s, gain.dtype)
            d_gain = (_pixel_sum(s * rows, gain.dtype) - mean * d_bias) * inverse
            level = _over_group(gain * d_bias, group) / rows.shape[1]
            slope = _over_group(gain * d_gain, group) / rows.shape[1] * inverse * inverse
            constant = (mean * slope - inverse * level)[:, None].to(x.dtype)
            d_x = torch.addcmul(constant, rows, -slope[:, None].to(x.dtype))
            torch.addcmul(d_x, s, (gain * inverse)[:, None].to(x.dtype), out=d_x)
        return _image(d_x, x), d_gain, d_bias, None, None, None
