"""Group norm, per-sample gain and bias, and SiLU, as one operation with few passes over memory.

On a CPU most of a U-Net's time outside its convolutions goes into reading and writing activations for these. Torch's
own group norm is slow where channels come last in memory, as the convolutions want them; here the statistics are two
sums over pixels, all that happens per channel is folded in one multiply-add, and two tensors that are to be
concatenated are normalised straight into their places in the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

# Partial sums that a narrow type is given before a wider one takes over: each is accumulated in float32 and rounded
# to 8 bits by bfloat16, so that the sum of 16 is good to some 2e-4 of their size.
_PARTIAL = 16


def norm_act(
    parts: Sequence[Float[Tensor, "b _ h w"]],
    gain: Float[Tensor, "#b c"],
    bias: Float[Tensor, "#b c"],
    group: int,
    eps: float,
    silu: bool = True,
) -> Float[Tensor, "b c h w"]:
    """f(gain * norm(cat(parts)) + bias), f = SiLU or the identity (Wu and He 2018 for the norm).

    Mean and variance are those of each sample's groups of `group` neighbouring channels.

    Args:
        parts: tensors to concatenate along the channels, c in all.
        gain, bias: per channel, and per sample if the noise level modulates them; float32 or wider.
        group: channels per group, a divisor of c.
        eps: added to the variance.
        silu: apply SiLU.
    """
    batch, channels = parts[0].shape[0], sum(p.shape[1] for p in parts)
    gain, bias = gain.expand(batch, channels), bias.expand(batch, channels)
    if len(parts) > 1 and any(p.shape[1] % group for p in parts):
        parts = [torch.cat(list(parts), dim=1)]
    if _plain_autograd_only(parts[0]):
        return _Fused.apply(gain, bias, group, eps, silu, *parts)  # pyright: ignore[reportReturnType]
    return compose(parts, gain, bias, group, eps, silu)


def compose(
    parts: Sequence[Tensor], gain: Tensor, bias: Tensor, group: int, eps: float, silu: bool
) -> Float[Tensor, "b c h w"]:
    """The same by torch's operations, one after the other: for GPUs, compilers, and derivatives of derivatives."""
    x = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    hat = F.group_norm(x, x.shape[1] // group, eps=eps)
    y = hat * gain[:, :, None, None].to(x.dtype) + bias[:, :, None, None].to(x.dtype)
    return F.silu(y) if silu else y


def _plain_autograd_only(x: Tensor) -> bool:
    """On a CPU, and neither compiled, nor in forward mode, nor under a transform of torch.func."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _rows(x: Tensor) -> Float[Tensor, "b p c"]:
    """(B, C, H, W) as (B, pixels, C); a view where channels come last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pixel_sum(x: Float[Tensor, "b p c"], wide: torch.dtype) -> Float[Tensor, "b c"]:
    """Sum over pixels, a narrow type in parts, then in `wide`."""
    if x.dtype == wide:
        return x.sum(1)
    if x.shape[1] % _PARTIAL:
        return x.sum(1, dtype=wide)
    return x.unflatten(1, (_PARTIAL, -1)).sum(2).sum(1, dtype=wide)


def _over_group(x: Float[Tensor, "b c"], group: int) -> Float[Tensor, "b c"]:
    """Each channel's value replaced by the mean over its group."""
    return x.unflatten(1, (-1, group)).mean(2).repeat_interleave(group, dim=1)


class _Fused(torch.autograd.Function):
    """`norm_act` for memory with channels last."""

    @staticmethod
    def forward(ctx, gain, bias, group, eps, silu, *parts):
        channels, offset, saved = gain.shape[1], 0, []
        out = parts[0].new_empty(len(gain), *parts[0].shape[2:], channels).permute(0, 3, 1, 2)
        with torch.autocast("cpu", enabled=False):
            for part in parts:
                own = slice(offset, offset + part.shape[1])
                saved += _forward_part(part, gain[:, own], bias[:, own], group, eps, silu, out[:, own])
                offset = own.stop
        ctx.save_for_backward(gain, bias, *parts, *saved)
        ctx.group, ctx.eps, ctx.silu = group, eps, silu
        return out

    @staticmethod
    def backward(ctx, grad):
        gain, bias, *rest = ctx.saved_tensors
        parts = rest[: len(rest) // 4]
        if torch.is_grad_enabled():  # create_graph: this derivative will be differentiated
            return _derivative_with_graph(ctx, gain, bias, parts, grad)
        d_parts, d_gain, d_bias, offset = [], [], [], 0
        with torch.autocast("cpu", enabled=False):
            for i, part in enumerate(parts):
                own = slice(offset, offset + part.shape[1])
                saved = rest[len(parts) + 3 * i : len(parts) + 3 * (i + 1)]
                derivatives = _backward_part(grad[:, own], part, gain[:, own], ctx.group, ctx.silu, saved)
                for found, value in zip((d_parts, d_gain, d_bias), derivatives):
                    found.append(value)
                offset = own.stop
            return torch.cat(d_gain, 1), torch.cat(d_bias, 1), None, None, None, *d_parts


def _derivative_with_graph(ctx, gain, bias, parts, grad):
    needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:]]
    wanted = [v for v, need in zip((gain, bias, *parts), needs) if need]
    y = compose(parts, gain, bias, ctx.group, ctx.eps, ctx.silu)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    d = [next(found) if need else None for need in needs]
    return d[0], d[1], None, None, None, *d[2:]


def _forward_part(x, gain, bias, group, eps, silu, out):
    """Fill `out` (B, C, H, W). Returns mean and 1 / std of each channel's group, (B, C), and what SiLU was given."""
    rows, wide = _rows(x), gain.dtype
    pixels = rows.shape[1]
    mean = _over_group(_pixel_sum(rows, wide), group) / pixels
    square = _over_group(_pixel_sum(rows * rows, wide), group) / pixels
    # The difference of two rounded numbers can fall below 0 where a group is constant.
    inverse = (square - mean * mean).clamp_(min=0).add_(eps).rsqrt_()
    a = gain * inverse
    d = (bias - mean * a)[:, None].to(x.dtype)
    target = out.permute(0, 2, 3, 1).flatten(1, 2)
    if not silu:
        torch.addcmul(d, rows, a[:, None].to(x.dtype), out=target)
        return mean, inverse, x.new_empty(0)
    u = torch.addcmul(d, rows, a[:, None].to(x.dtype))
    torch.ops.aten.silu.out(u, out=target)
    return mean, inverse, u


def _backward_part(grad, x, gain, group, silu, saved):
    """d x (B, C, H, W), d gain and d bias (B, C).

    With u = gain hat(x) + bias, s = dL/du, N the size of a group, sums over the group:
    dL/dx = (gain s - sum(gain s)/N - hat(x) sum(gain s hat(x))/N) / std.
    """
    (mean, inverse, u), rows, s = saved, _rows(x), _rows(grad)
    if silu:
        s = torch.ops.aten.silu_backward(s, u)
    d_bias = _pixel_sum(s, gain.dtype)
    d_gain = (_pixel_sum(s * rows, gain.dtype) - mean * d_bias) * inverse
    level = _over_group(gain * d_bias, group) / rows.shape[1]
    slope = _over_group(gain * d_gain, group) / rows.shape[1] * inverse * inverse
    constant = (mean * slope - inverse * level)[:, None].to(x.dtype)
    d_x = torch.addcmul(constant, rows, -slope[:, None].to(x.dtype))
    torch.addcmul(d_x, s, (gain * inverse)[:, None].to(x.dtype), out=d_x)
    return d_x.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), d_gain, d_bias
