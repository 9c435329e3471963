"""Group norm, per-sample gain and bias, and SiLU, as one operation with few passes over memory.

On a CPU most of a U-Net's time outside its convolutions is spent reading and writing activations for these. Here a
few samples at a time, so that they stay in the cache, go through all the steps at once; the backward pass computes
the normalised values again instead of storing them; and two tensors that are to be concatenated are normalised
straight into their places in the result.

Channels come last in memory, as the convolutions want them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

# Elements handled at once: half a megabyte in bfloat16, so that inputs, result and scratch fit a core's L2 cache.
_BLOCK = 1 << 18
# Pixels summed within bfloat16's reach before float32 takes over: each partial sum is rounded to 8 bits, and the
# mean over many of them has an error of some 1e-4 of their size.
_RUN = 16


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
    """Sum over pixels, in runs that a narrow type can hold, then in `wide`."""
    if x.dtype == wide:
        return x.sum(1)
    b, p, c = x.shape
    run = _RUN if p % _RUN == 0 else 1
    if run == 1:
        return x.to(wide).sum(1)
    return x.unflatten(1, (p // run, run)).sum(2).to(wide).sum(1)


def _over_group(x: Float[Tensor, "b c"], group: int) -> Float[Tensor, "b c"]:
    """Each channel's value replaced by the mean over its group."""
    b, c = x.shape
    mean = x.reshape(b, c // group, group).mean(2, keepdim=True)
    return mean.expand(b, c // group, group).reshape(b, c)


class _Fused(torch.autograd.Function):
    """`norm_act` with blocks of samples, for memory with channels last."""

    @staticmethod
    def forward(ctx, gain, bias, group, eps, silu, *parts):
        with torch.autocast("cpu", enabled=False):
            rows = [_rows(p) for p in parts]
            b, pixels, _ = rows[0].shape
            channels = gain.shape[1]
            out = parts[0].new_empty(b, *parts[0].shape[2:], channels)
            out_rows = out.view(b, pixels, channels)
            stats = []
            wide = torch.promote_types(parts[0].dtype, torch.float32)
            gain_w, bias_w = gain.to(wide), bias.to(wide)
            offset = 0
            for x in rows:
                own = slice(offset, offset + x.shape[2])
                stats.append(
                    _forward_part(x, gain_w[:, own], bias_w[:, own], group, eps, silu, out_rows[:, :, own])
                )
                offset = own.stop
        ctx.save_for_backward(gain, bias, *parts)
        ctx.stats, ctx.group, ctx.eps, ctx.silu = stats, group, eps, silu
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        gain, bias, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: this derivative will be differentiated
            wanted = [v for v, need in zip((gain, bias, *parts), _needs(ctx)) if need]
            with torch.enable_grad():
                y = compose(parts, gain, bias, ctx.group, ctx.eps, ctx.silu)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            g = [next(found) if need else None for need in _needs(ctx)]
            return g[0], g[1], None, None, None, *g[2:]
        with torch.autocast("cpu", enabled=False):
            wide = torch.promote_types(parts[0].dtype, torch.float32)
            gain_w, bias_w = gain.to(wide), bias.to(wide)
            d_gain, d_bias = torch.empty_like(gain_w), torch.empty_like(gain_w)
            grad_rows, d_parts, offset = _rows(grad), [], 0
            for x, stat in zip(parts, ctx.stats):
                own = slice(offset, offset + x.shape[1])
                d_x = torch.empty_like(x, memory_format=torch.channels_last)
                _backward_part(
                    grad_rows[:, :, own], _rows(x), (gain_w[:, own], bias_w[:, own], *stat), ctx.group, ctx.silu,
                    (_rows(d_x), d_gain[:, own], d_bias[:, own]),
                )  # fmt: skip
                d_parts.append(d_x)
                offset = own.stop
        return d_gain.to(gain.dtype), d_bias.to(bias.dtype), None, None, None, *d_parts


def _needs(ctx) -> list[bool]:
    return [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:]]


def _blocks(x: Tensor):
    """Slices of samples that together have about `_BLOCK` elements."""
    size = max(1, _BLOCK // max(1, x[0].numel()))
    return [slice(i, i + size) for i in range(0, x.shape[0], size)]


def _forward_part(x, gain, bias, group, eps, silu, out):
    """Fill `out` (B, P, C); returns mean and 1 / std of each channel's group, (B, C)."""
    wide, pixels = gain.dtype, x.shape[1]
    mean, inverse = torch.empty_like(gain), torch.empty_like(gain)
    for part in _blocks(x):
        xs = x[part]
        first = _over_group(_pixel_sum(xs, wide), group) / pixels
        second = _over_group(_pixel_sum(xs * xs, wide), group) / pixels
        # The difference of two rounded numbers can fall below 0 where the group is constant.
        mean[part], inverse[part] = first, (second - first * first).clamp_(min=0).add_(eps).rsqrt_()
        a = gain[part] * inverse[part]
        d = bias[part] - first * a
        ys = out[part]
        torch.addcmul(d[:, None].to(x.dtype), xs, a[:, None].to(x.dtype), out=ys)
        if silu:
            F.silu(ys, inplace=True)
    return mean, inverse


def _backward_part(grad, x, saved, group, silu, into):
    """Fill d x (B, P, C), d gain and d bias (B, C).

    With u = gain hat(x) + bias, s = dL/du, N the size of a group, sums over the group:
    dL/dx = (gain s - sum(gain s)/N - hat(x) sum(gain s hat(x))/N) / std.
    """
    (gain, bias, mean, inverse), (d_x, d_gain, d_bias) = saved, into
    pixels = x.shape[1]
    for part in _blocks(x):
        xs, s = x[part], grad[part]
        m, r, w = mean[part], inverse[part], gain[part]
        a = (w * r)[:, None].to(x.dtype)
        if silu:
            d = (bias[part] - m * (w * r))[:, None].to(x.dtype)
            s = torch.ops.aten.silu_backward(s, torch.addcmul(d, xs, a))
        total = _pixel_sum(s, gain.dtype)
        hat = (_pixel_sum(s * xs, gain.dtype) - m * total) * r
        d_gain[part], d_bias[part] = hat, total
        level = _over_group(w * total, group) / pixels
        slope = _over_group(w * hat, group) / pixels * r * r
        shift = torch.addcmul((m * slope - r * level)[:, None].to(x.dtype), xs, -slope[:, None].to(x.dtype))
        torch.addcmul(shift, s, a, out=d_x[part])
