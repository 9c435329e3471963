"""Per-sample losses, and the module that computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from undiffuse.core.random import Streams
from undiffuse.training.conditions import Cond


class Losses(NamedTuple):
    """Per-sample losses (B,), and the times and half log-SNRs they were taken at where the objective tells."""

    loss: Tensor
    t: Tensor | None
    half_log_snr: Tensor | None

    def detach(self) -> Losses:
        """The same numbers without their graph."""
        return Losses(self.loss.detach(), _maybe(Tensor.detach, self.t), _maybe(Tensor.detach, self.half_log_snr))


def joined(parts: Sequence[Losses]) -> Losses:
    """The losses of a batch from those of its micro-batches."""
    loss, t, half_log_snr = zip(*parts)
    return Losses(torch.cat(loss), *(None if rows[0] is None else torch.cat(rows) for rows in (t, half_log_snr)))


def _maybe(function, value: Tensor | None) -> Tensor | None:
    return None if value is None else function(value)


class LossModule(nn.Module):
    """Model and objective as one module: gradients are averaged over processes whatever method of the model is used."""

    def __init__(self, model: nn.Module, objective: Any):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, x: Tensor, cond: Cond, streams: Streams) -> Losses:
        if not hasattr(self.objective, "losses"):
            return Losses(self.objective(self.model, x, cond, streams), None, None)
        record = self.objective.losses(self.model, x, cond, streams)
        return Losses(record.loss, record.t, record.half_log_snr)
