"""Choosing a device."""

from __future__ import annotations

import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.training import find_device


def devices() -> list[str]:
    """The devices of this machine."""
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; None or "auto": this process's CUDA device where there is one, else the CPU.

    Raises:
        ArgumentError: it is not there; lists those that are.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = find_device(device)
        torch.empty(0, device=found)
    except (ArgumentError, RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(
            f"device '{device}' cannot be used: {reason}. Devices here: {', '.join(devices())}."
        ) from None
    return found
