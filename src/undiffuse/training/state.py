"""Modules and optimisers as flat dicts of tensors, and back into the tensors that are already there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from undiffuse.core.errors import CheckpointError

Tensors = Mapping[str, Tensor]


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; one that has several names (tied weights) under its first."""
    seen: set[int] = set()
    kept = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            kept[name] = value.detach()
    return kept


@torch.no_grad()
def restore_module(module: nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy `tensors` into `module`, whose memory format and devices stay.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or type; names it and `source`.
    """
    _copy_all(module_tensors(module), tensors, source)


def optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    """The optimisers' state under "<name of the parameter>/<quantity>"; empty before the first step."""
    return {
        f"{name}/{quantity}": value
        for optimizer in optimizers
        for parameter, name in names.items()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[nn.Parameter, str], tensors: Tensors, source: Path
) -> None:
    """Inverse of `optimizer_tensors`. Moments take the memory format of their parameter, as a fresh optimiser's do.

    Raises:
        CheckpointError: state of an unknown parameter, or of another shape than the parameter.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, quantity = key.rsplit("/", 1)
        parameter = by_name.get(name)
        if parameter is None or (value.ndim > 0 and value.shape != parameter.shape):
            raise CheckpointError(f"{source} has '{key}' of shape {tuple(value.shape)}, which fits no parameter")
        # A 0-dimensional state is Adam's step count; fused kernels want it on the parameter's device.
        like = parameter if value.ndim > 0 or parameter.ndim == 0 else torch.empty((), device=parameter.device)
        owner[parameter].state[parameter][quantity] = torch.empty_like(like, dtype=value.dtype).copy_(value)


def restore_tensors(target: Tensors, tensors: Tensors, source: Path) -> None:
    """Copy `tensors` into those of the same name in `target`, as `restore_module` does."""
    with torch.no_grad():
        _copy_all(target, tensors, source)


def _copy_all(target: Tensors, tensors: Tensors, source: Path) -> None:
    for missing in sorted(set(target) - set(tensors)):
        raise CheckpointError(f"{source} has no tensor '{missing}': it was written by another model")
    for unknown in sorted(set(tensors) - set(target)):
        raise CheckpointError(f"{source} has a tensor '{unknown}' that the model has not")
    for name, value in target.items():
        given = tensors[name]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise CheckpointError(
                f"{source} has '{name}' of shape {tuple(given.shape)}, {given.dtype}: "
                f"the model's is {tuple(value.shape)}, {value.dtype}"
            )
        value.copy_(given)
