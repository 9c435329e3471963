"""A network read as a classifier of noisy data."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.shapes import as_time, pad_to
from undiffuse.paths import Path


class NetworkClassifier(nn.Module):
    """`classifier(x_t, t) -> logits (B, K)` of `p(y | x_t)`, from `net(c_in x_t, c_noise)`.

    c_in and c_noise (B,) are the path's `input_scale` and `noise_label`. Below `path.t_low`, where it is not trained,
    it is asked at t_low. What `ud.ClassifierGuidance` takes, and `ud.NoisyClassification` trains.

    Args:
        net: such as `ud.nets.ClassifierConv`.
        path: on which it is trained.

    Raises:
        ArgumentError: at a call, a network that does not return (B, K).
    """

    def __init__(self, net: nn.Module, path: Path):
        super().__init__()
        self.net = net
        self.path = path

    def forward(
        self, x_t: Float[Tensor, "b *event"], t: Float[Tensor, ""] | Float[Tensor, " b"] | float
    ) -> Float[Tensor, "b k"]:
        time = as_time(t, x_t).clamp(min=self.path.t_low)
        dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x_t.dtype)
        scaled = (pad_to(self.path.input_scale(time), x_t) * x_t).to(dtype)
        logits = self.net(scaled, self.path.noise_label(time).expand(len(x_t)))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x_t):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ArgumentError(f"the network returned {given} for {len(x_t)} samples: expected logits (B, K)")
        return logits.to(torch.promote_types(x_t.dtype, torch.float32))
