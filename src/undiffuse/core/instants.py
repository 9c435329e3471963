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
    """A time as a number, all times of its run, itself among them, and the version of the tensor that it is of."""

    number: float
    among: tuple[float, ...]
    version: int | None = None


def sent(times: Sequence[float], like: Tensor) -> dict[float, Tensor]:
    """Each time as a scalar on the device of `like`, of `as_time`'s dtype, its number known."""
    among = tuple(times)
    found = dict(zip(among, as_time(torch.tensor(among, dtype=torch.float64, device="cpu"), like).unbind()))
    version = next((None if scalar.is_inference() else scalar._version for scalar in found.values()), None)
    for number, scalar in found.items():  # parts of one tensor, of one version
        setattr(scalar, _NAME, Instant(number, among, version))
    return found


def known(t: Tensor | float) -> Instant | None:
    """The number of a time that is one, or that `sent` sent and nobody changed, or asks a gradient of; else None.

    None too where code is compiled, which is for any time.
    """
    if torch.compiler.is_compiling():
        return None
    if isinstance(t, Tensor):
        found: Instant | None = getattr(t, _NAME, None)
        changed = found is not None and found.version is not None and found.version != t._version
        return None if changed or t.requires_grad else found
    if not isinstance(t, int | float):
        return None
    number = float(t)
    return Instant(number, (number,))
