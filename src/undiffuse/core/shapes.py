"""Shapes: the one place where a time is padded to the shape of `x`."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError


def pad_to(t: Tensor, x: Tensor) -> Tensor:
    """View `t` of shape () or (B,) so that it broadcasts against `x` of shape (B, *event).

    Raises:
        ArgumentError: `t` has another shape.
    """
    if t.ndim == 0:
        return t
    if t.ndim != 1 or x.ndim == 0 or t.shape[0] not in (1, x.shape[0]):
        raise ArgumentError(
            f"time has shape {tuple(t.shape)} and x {tuple(x.shape)}: expected () or ({x.shape[0] if x.ndim else 'B'},)"
        )
    return t.reshape(-1, *[1] * (x.ndim - 1))


def as_time(t: Tensor | float, like: Tensor) -> Tensor:
    """`t` as a tensor on the device of `like`, at least float32, shape () or (B,)."""
    dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
    return torch.as_tensor(t, dtype=dtype, device=like.device)
