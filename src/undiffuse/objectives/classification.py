"""Classification of noisy data: what classifier guidance needs to be trained."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.random import Generator
from undiffuse.objectives.times import TIMES, TimeDistribution, drawn
from undiffuse.paths import Path


class _Classifier(Protocol):
    path: Path

    def __call__(self, x_t: Tensor, t: Tensor, /) -> Tensor: ...


class NoisyClassification:
    """`E_t E_{(x_0, y), eps} -log p(y | x_t, t)`, the cross entropy in nats (Song et al. 2021, appendix I.1).

    Its minimiser is the posterior of the classes at every time. Rows without a class (-1) count 0.

    Args:
        time: a time distribution, as of `ud.Denoising`.

    Raises:
        ArgumentError: an unknown name; when called, labels that are no classes of the model.
    """

    def __init__(self, time: str | TimeDistribution = "uniform"):
        self.time = choose(time, TIMES, "time distribution")() if isinstance(time, str) else time

    def __repr__(self) -> str:
        return f"NoisyClassification(time={self.time})"

    def __call__(
        self,
        model: _Classifier,
        x_0: Float[Tensor, "b *event"],
        cond: Int[Tensor, " b"] | None = None,
        generator: Generator = None,
    ) -> Float[Tensor, " b"]:
        """Per-sample losses; `cond` are the classes, times and noises are drawn from `generator`."""
        t, noise = drawn(self.time, model.path, x_0, generator)
        return self.at(model, x_0, t, noise, cond)

    def at(
        self,
        model: _Classifier,
        x_0: Float[Tensor, "b *event"],
        t: Float[Tensor, " b"],
        noise: Float[Tensor, "b *event"],
        cond: Int[Tensor, " b"] | None,
    ) -> Float[Tensor, " b"]:
        """Per-sample losses at the times and noises given."""
        logits = model(model.path.perturb(x_0, t, noise), t)
        if cond is None or cond.shape != logits.shape[:1] or cond.is_floating_point():
            given = "None" if cond is None else f"{cond.dtype} of shape {tuple(cond.shape)}"
            raise ArgumentError(f"cond is {given}: expected the class of each of {len(logits)} samples, integers")
        if cond.device.type == "cpu" and not bool(((cond >= -1) & (cond < logits.shape[1])).all()):
            raise ArgumentError(f"cond holds {cond.min()} to {cond.max()}: the model has {logits.shape[1]} classes")
        return F.cross_entropy(logits, cond.to(torch.int64), ignore_index=-1, reduction="none")
