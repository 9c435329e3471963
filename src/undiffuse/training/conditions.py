"""Conditions of a batch: None, a tensor, or a dict of tensors, one row per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from undiffuse.core.random import Streams

Cond = Tensor | dict[str, Tensor] | None


def map_cond(cond: Cond, function: Callable[[Tensor], Tensor]) -> Cond:
    """`function` of each tensor of a condition."""
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {name: function(value) for name, value in cond.items()}
    return function(cond)


def without(value: Tensor, dropped: Tensor) -> Tensor:
    """`value` with the rows where `dropped` (B,) is true marked absent: labels -1, vectors NaN."""
    absent = torch.nan if value.is_floating_point() else -1
    return value.masked_fill(dropped.reshape(-1, *[1] * (value.ndim - 1)), absent)


def drop_condition(cond: Cond, rate: float, streams: Streams) -> Cond:
    """Each sample loses its whole condition with chance `rate` (Ho and Salimans 2022), decided by its own stream."""
    if cond is None or rate == 0:
        return cond
    coin = streams.fold("cond-dropout").uniform((len(streams),), dtype=torch.float64)
    return map_cond(cond, lambda value: without(value, (coin < rate).to(value.device)))
