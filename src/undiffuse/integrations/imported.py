"""What an import gives: a network, what its output means, and the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError, UndiffuseError
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
    with torch.device("meta"), settings("the network"):
        return UNet(**arguments)


@contextmanager
def settings(what: str) -> Iterator[None]:
    """Settings of a file that are missing, or of another type than theirs, become an `ArgumentError`."""
    try:
        yield
    except UndiffuseError:
        raise
    except KeyError as error:
        raise ArgumentError(f"{what}: there is no {error.args[0]}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise ArgumentError(f"{what}: a setting of the wrong kind or size ({error})") from error


def whole_numbers(given: Any, name: str) -> list[int]:
    """A list of whole numbers, of at least 1."""
    if isinstance(given, (list, tuple)) and given and all(type(n) is int and n > 0 for n in given):
        return list(given)
    raise ArgumentError(f"{name}={given!r}: expected a list of whole numbers, of at least 1")


def flag(given: Any, name: str = "") -> bool:
    """A switch as command lines and files write it."""
    word = str(given).lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ArgumentError(f"{name} '{given}': expected true or false".lstrip())
