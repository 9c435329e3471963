"""Noise-contrastive estimation: learn the energy and its log Z by telling data from noise of a known law."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.fields.denoiser import Cond, Event
from undiffuse.fields.energy import Energy
from undiffuse.objectives.contrastive import WINDOW, at_least_float

PerSample = Float[Tensor, " b"]


class Noise(Protocol):
    """A law that can be drawn from and whose density is known."""

    def sample(self, n: int, generator: Any = None) -> Tensor: ...
    def log_prob(self, x: Any) -> Tensor: ...


class NoiseContrastive(nn.Module):
    """`softplus(-G(x)) + sum_j softplus(G(y_j))`, `G(u) = -E(u) - log Z - log q(u) - log ratio`, y_1 ... y_ratio ~ q.

    The logistic loss of telling one sample of data from `ratio` samples of noise (Gutmann and Hyvarinen 2012, eq. 8,
    times -(1 + ratio)). Its minimum over E and log Z together is at `-E - log Z = log p_data`: the only objective here
    that learns the normalising constant. Per sample of data, summed over its samples of noise.

    Args:
        noise: q, for instance a law of `undiffuse.oracles`; where it is a module, it moves with the objective.
        ratio: samples of noise for each of the data.
        log_z: initial value of the parameter `log_z`, in nats. With a condition it is one for all, and the energy takes
            up the rest.

    Raises:
        ArgumentError: ratio < 1.
    """

    accuracy: Tensor
    calls: Tensor

    def __init__(self, noise: Noise, ratio: int = 1, log_z: float = 0.0):
        super().__init__()
        if ratio < 1:
            raise ArgumentError(f"ratio is {ratio}: expected at least 1 sample of noise for each of the data")
        self.noise, self.ratio = noise, ratio
        self.log_z = nn.Parameter(torch.tensor(float(log_z)))
        self.register_buffer("accuracy", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def log_odds(self, model: Energy, u: Event, cond: Cond = None) -> PerSample:
        """`G(u)`, the log-odds that u is data."""
        return -at_least_float(model(u, cond)) - self.log_z - self.noise.log_prob(u) - math.log(self.ratio)

    def forward(self, model: Energy, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample:
        real = self.log_odds(model, x, cond)
        loss, right = F.softplus(-real), (real > 0).double()
        for _ in range(self.ratio):
            y = self.noise.sample(len(x), generator).to(x)
            fake = self.log_odds(model, y, cond)
            loss, right = loss + F.softplus(fake), right + (fake <= 0)
        self.calls += 1
        self.accuracy.lerp_(right.mean().to(self.accuracy) / (1 + self.ratio), 1 / min(int(self.calls), WINDOW))
        return loss

    def diagnostics(self) -> dict[str, float]:
        """`log_z`, and the share of data and noise told apart in the last calls: near 1, the noise is too easy."""
        return {"log_z": float(self.log_z.detach()), "noise_accuracy": float(self.accuracy)}
