"""What an import gives: a network, what its output means, and the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.nets import UNet

_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


@dataclass(frozen=True)
class Imported:
    """A network of another project as one of ours.

    Args:
        net: arguments of `UNet`.
        path, prediction, sigma_data: how its output is read, as a recipe says it.
        weights: its state.
        notes: what became different, or what there is to know, one sentence each.
    """

    net: dict[str, Any]
    path: dict[str, Any]
    prediction: str
    weights: dict[str, Tensor]
    sigma_data: float = 0.5
    notes: tuple[str, ...] = ()

    def network(self) -> UNet:
        """The network with its weights, in evaluation mode."""
        net = UNet(**self.net)
        net.load_state_dict(self.weights)
        return net.eval()


def empty(arguments: Mapping[str, Any]) -> UNet:
    """The network without memory for its weights: names and shapes."""
    with torch.device("meta"):
        return UNet(**arguments)


def flag(given: Any, name: str = "") -> bool:
    """A switch as command lines and files write it."""
    word = str(given).lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ArgumentError(f"{name} '{given}': expected true or false".lstrip())
