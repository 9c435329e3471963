"""Averages of the weights along training: several half-lives and power-function widths at once.

Every average is  a_k = b_k a_{k-1} + (1 - b_k) w_k  over the weights w_k after step k = 1, 2, ...; the kinds differ
in b_k only. It starts from the initial weights w_0.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError
from undiffuse.training.config import TrainConfig


class Average(Protocol):
    """What a kind of average says about itself."""

    @property
    def name(self) -> str: ...

    def new_weight(self, step: int) -> float:
        """1 - b_k: the weight that step k >= 1 enters with, computed without cancellation."""
        ...


@dataclass(frozen=True)
class HalfLife:
    """b_k = 2^(-1 / h_k), h_k = min(half_life, ramp k): after h steps, half of the average is new.

    The ramp forgets the start of training (Karras et al. 2022, their `ema_rampup_ratio`).
    """

    half_life: float
    ramp: float = 0.05

    @property
    def name(self) -> str:
        return f"half-life-{self.half_life:g}"

    def new_weight(self, step: int) -> float:
        return -math.expm1(-math.log(2.0) / min(self.half_life, self.ramp * step))


@dataclass(frozen=True)
class Power:
    """b_k = (1 - 1/k)^(gamma + 1): the weight of step i in the average grows as i^gamma (Karras et al. 2024, eq. 2).

    `width` is the standard deviation of that profile relative to the length of training; see `gamma_of`.
    """

    width: float

    @property
    def name(self) -> str:
        return f"power-{self.width:g}"

    def new_weight(self, step: int) -> float:
        if step == 1:
            return 1.0
        return -math.expm1((gamma_of(self.width) + 1.0) * math.log1p(-1.0 / step))


@functools.cache
def gamma_of(width: float) -> float:
    """Exponent of the profile t^gamma on [0, 1] whose standard deviation is `width`.

    Its variance is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), so gamma is the largest root of
    gamma^3 + 7 gamma^2 + (16 - width^-2) gamma + 12 - width^-2.
    """
    if not 0 < width <= 12**-0.5:
        raise ArgumentError(f"relative width of a power average is {width}: expected 0 < width <= 0.288")
    precision = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision]).real.max())


def averages(config: TrainConfig) -> list[Average]:
    """The averages a configuration asks for; the first is the one that samples are drawn with."""
    return [
        *(HalfLife(float(h), float(config.ema_ramp)) for h in config.ema),
        *(Power(float(width)) for width in config.ema_power),
    ]


class WeightAverages:
    """All averages of a model's parameters, in fp32 or wider. Buffers are not averaged: the model's own serve.

    Args:
        model: whose parameters are followed.
        kinds: the averages; their names must differ.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[Average]):
        self.kinds = list(kinds)
        self._followed = dict(model.named_parameters())
        self.values = {kind.name: {n: _wide(p) for n, p in self._followed.items()} for kind in self.kinds}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` >= 1: one fused pass per average."""
        weights = list(self._followed.values())
        for kind in self.kinds:
            average = list(self.values[kind.name].values())
            same_type = [w.to(a.dtype) for w, a in zip(weights, average)]
            torch._foreach_lerp_(average, same_type, kind.new_weight(step))  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> dict[str, Tensor]:
        """All averages, under "<name of the average>/<name of the parameter>"."""
        return {f"{kind}/{name}": value for kind, values in self.values.items() for name, value in values.items()}

    def averaged(self, model: nn.Module) -> nn.Module:
        """A frozen copy of `model` in evaluation mode with the first average as its weights (none: its own)."""
        twin = copy.deepcopy(model).eval().requires_grad_(False)
        if self.kinds:
            set_parameters(twin, self.values[self.kinds[0].name])
        return twin


def _wide(parameter: Tensor) -> Tensor:
    """A copy in fp32, or in the parameter's own type where that is wider; same memory format."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


@torch.no_grad()
def set_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy `values`, by name, into the parameters of `model`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
