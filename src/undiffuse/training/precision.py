"""How the network is run: number format, memory format, compilation. The one place to change any of them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from undiffuse.core.errors import choose
from undiffuse.training.config import TrainConfig

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Where the network runs: weights, gradients and optimiser stay fp32, "bf16" lowers the large products."""
    dtype = choose(precision, _AUTOCAST, "precision")
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def prepare_model(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Move `model`, choose its memory format and compile its network, in place: no name in its state changes."""
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compile:
        network(model).compile()


def network(model: nn.Module) -> nn.Module:
    """The part of a model worth compiling: its `net` where it has one, else the whole."""
    inner = getattr(model, "net", None)
    return inner if isinstance(inner, nn.Module) else model


def to_device(x: Tensor, config: TrainConfig, device: torch.device) -> Tensor:
    """A batch on the device, images in the memory format of the network."""
    x = x.to(device, non_blocking=True)
    if config.channels_last and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x
