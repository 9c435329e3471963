"""What holds while samples are drawn, and is put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(target: object) -> Iterator[None]:
    """No gradients, every module of the target in evaluation mode; each is put back as it was."""
    before = [module for module in target.modules() if module.training] if isinstance(target, nn.Module) else []
    for module in before:
        vars(module)["training"] = False  # not by __setattr__, which is slow and looks for a parameter
    try:
        with torch.no_grad():
            yield
    finally:
        for module in before:
            vars(module)["training"] = True


@contextmanager
def denormals_as_zero(x: Tensor) -> Iterator[None]:
    """On a CPU, numbers too small for full precision (below 1e-38 in float32) are zero; put back as it was.

    A state near one mode gives the others such weights, and arithmetic on them is slow: on an energy of 8 modes in the
    plane, 10,000 chains, a step takes 0.9 of the time.
    """
    before = _denormals_are_zero()
    change = x.device.type == "cpu" and not before and torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if change:
            torch.set_flush_denormal(False)


def _denormals_are_zero() -> bool:
    return float(torch.tensor(1e-30) * torch.tensor(1e-10)) == 0.0
