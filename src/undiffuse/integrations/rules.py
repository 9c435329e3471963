"""From the tensors of another project to ours: a list of rules, applied all or not at all.

A rule makes one tensor of ours from one or more of theirs. Names that rules want and the file has not, or that it has
and no rule wants, are listed together: such a file belongs to another architecture than was said.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.core.errors import CheckpointError

_SHOWN = 8  # names in a message


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def matrix(tensor: Tensor) -> Tensor:
    """A 1 x 1 convolution's weight as a matrix."""
    return tensor.flatten(1)


@dataclass(frozen=True)
class Rule:
    """`ours = make(*theirs)`."""

    ours: str
    theirs: tuple[str, ...]
    make: Callable[..., Tensor] = as_it_is


def layer(ours: str, theirs: str, weight: Callable[..., Tensor] = as_it_is) -> list[Rule]:
    """A layer with weight and bias under their usual names."""
    return [Rule(f"{ours}.weight", (f"{theirs}.weight",), weight), Rule(f"{ours}.bias", (f"{theirs}.bias",))]


def stacked(*tensors: Tensor) -> Tensor:
    """Rows of several tensors, one after the other."""
    return torch.cat(tensors)


def sines_first(weight: Tensor) -> Tensor:
    """First layer behind features [sin, cos], for ours: sqrt(2) [cos, sin]."""
    return cosines_first(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))


def cosines_first(weight: Tensor) -> Tensor:
    """First layer behind features [cos, sin], for ours: sqrt(2) [cos, sin]."""
    return weight * 0.5**0.5


def by_head(heads: int, order: str) -> Callable[[Tensor], Tensor]:
    """Rows of a joint projection to queries, keys and values, for ours: (3, heads, d).

    Args:
        heads: number of them.
        order: the given order, of "3" (which of the three), "h" (head) and "d" (channel of the head): "h3d", "hd3".
    """

    def make(tensor: Tensor) -> Tensor:
        sizes = {"3": 3, "h": heads, "d": tensor.shape[0] // (3 * heads)}
        split = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
        split = split.reshape(*[sizes[axis] for axis in order], -1)
        split = split.permute(*[order.index(axis) for axis in "3hd"], 3).flatten(0, 2)
        return split if tensor.ndim > 1 else split[:, 0]

    return make


def apply(
    rules: Sequence[Rule], given: Mapping[str, Tensor], net: nn.Module, what: str, unused: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The network's state made from theirs, in float32.

    Args:
        rules: one for each tensor of the network.
        given: their state dict.
        net: ours, for the names and shapes (on the meta device).
        what: what to call the given weights in messages.
        unused: their names that may be there for nothing.

    Raises:
        CheckpointError: missing and unknown names, nearest first; a tensor of another shape, or a value that is none.
    """
    mapping(given, what)
    wanted = {name for rule in rules for name in rule.theirs}
    missing, unknown = sorted(wanted - set(given)), sorted(set(given) - wanted - set(unused))
    if missing or unknown:
        raise CheckpointError(f"{what}: {_differences(missing, unknown)} Is it of this architecture?")
    for name in sorted(wanted):
        dense(given[name], name, what)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    return {rule.ours: _made(rule, given, expected[rule.ours], what) for rule in rules}


def mapping(given: Any, what: str) -> Mapping[str, Any]:
    """A mapping of names.

    Raises:
        CheckpointError: something else.
    """
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{what}: {type(given).__name__}, where a mapping of names was expected")
    odd = next((name for name in given if not isinstance(name, str)), None)
    if odd is not None:
        raise CheckpointError(f"{what}: the name {odd!r} is no text")
    return given


def dense(value: Any, name: str, what: str) -> Tensor:
    """A tensor of finite numbers, each with a place of its own: as large as its file, whatever its shape says.

    Raises:
        CheckpointError: something else; names it.
    """
    expected = "where a dense tensor of finite numbers was expected"
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what}: '{name}' is a {type(value).__name__}, {expected}")
    if value.layout != torch.strided or value.device.type == "meta" or not value.is_floating_point():
        kind = f"{value.dtype} of layout {value.layout} on {value.device}"
        raise CheckpointError(f"{what}: '{name}' is {kind}, {expected}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{what}: '{name}' repeats few numbers in the shape {tuple(value.shape)}, {expected}")
    if not value.float().isfinite().all():
        raise CheckpointError(f"{what}: '{name}' has infinities or NaN, {expected}")
    return value


def _made(rule: Rule, given: Mapping[str, Tensor], expected: tuple[int, ...], what: str) -> Tensor:
    """One tensor of ours, of the shape that is expected."""
    sources = ", ".join(f"'{name}' of shape {tuple(given[name].shape)}" for name in rule.theirs)
    wrong = f"where this network's {rule.ours} is {expected}: expected the weights of the architecture that was named"
    try:
        made = rule.make(*[given[name].float() for name in rule.theirs]).contiguous()
    except (RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{what}: {sources} does not fit {wrong}") from error
    if made.shape != expected:
        raise CheckpointError(f"{what}: {sources} gives {tuple(made.shape)} {wrong}")
    return made


def _differences(missing: list[str], unknown: list[str]) -> str:
    """Missing and unknown names, those that are likest to one another first."""
    near = {name: difflib.get_close_matches(name, unknown, n=1, cutoff=0.5) for name in missing[: 10 * _SHOWN]}
    order = sorted(missing, key=lambda name: (not near.get(name), name))
    lines = [f"'{name}'" + (f" (it has '{near[name][0]}')" if near.get(name) else "") for name in order[:_SHOWN]]
    text = [f"{len(missing)} missing: {_listed(lines, len(missing))}."] if missing else []
    if unknown:
        lines = [f"'{name}'" for name in unknown[:_SHOWN]]
        text.append(f"{len(unknown)} unknown: {_listed(lines, len(unknown))}.")
    return " ".join(text)


def _listed(lines: list[str], total: int) -> str:
    return ", ".join(lines) + (", ..." if total > len(lines) else "")
