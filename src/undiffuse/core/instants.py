"""Times whose numbers are known here, so that nobody has to ask the device for them.

A run visits its times in an order that is known before it begins. They are sent to the device at once, and each tensor
carries its number: what is a function of the time alone can then be computed as numbers, once for the run, and neither
costs operations on the device nor waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.core.shapes import as_time

_NAME = "_undiffuse_instant"


class Instant(NamedTuple):
    """A time as a number, and all times of its run, itself among them."""

    number: float
    among: tuple[float, ...]


def sent(times: Sequence[float], like: Tensor) -> dict[float, Tensor]:
    """Each time as a scalar on the device of `like`, of `as_time`'s dtype, its number known."""
    among = tuple(times)
    found = dict(zip(among, as_time(torch.tensor(among, dtype=torch.float64), like).unbind()))
    for number, scalar in found.items():
        setattr(scalar, _NAME, Instant(number, among))
    return found


def known(t: Tensor | float) -> Instant | None:
    """The number of a time that is one, or that `sent` sent; else None, as where code is compiled for any time."""
    if torch.compiler.is_compiling():
        return None
    if isinstance(t, Tensor):
        return getattr(t, _NAME, None)
    return Instant(float(t), (float(t),))
