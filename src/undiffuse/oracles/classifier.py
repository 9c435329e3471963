"""The exact classifier of noisy data: responsibilities of the classes of a labelled mixture at time t."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError
from undiffuse.oracles.law import Event, Time, scales_of
from undiffuse.paths import Path

if TYPE_CHECKING:
    from undiffuse.oracles.mixture import GaussianMixture


class MixtureClassifier(nn.Module):
    """`logits_y = log p(y, x_t)` of a labelled mixture; their softmax is `p(y | x_t)`.

    Called as `classifier(x_t, t) -> (B, K)` for classes 0 ... K - 1, t of shape () or (B,).

    Raises:
        ArgumentError: a mixture without labels, or whose labels leave out a class below the largest.
    """

    def __init__(self, law: GaussianMixture, path: Path):
        super().__init__()
        found = [] if law.labels is None else sorted(set(law.labels.tolist()))
        if not found or found != list(range(len(found))):
            raise ArgumentError(f"a classifier needs labels 0 ... K - 1, each at least once; the mixture has {found}")
        self.law = law
        self.path = path
        self.classes = len(found)

    def forward(self, x_t: Event, t: Time) -> Float[Tensor, "b k"]:
        flat = self.law.flat(x_t)
        alpha, sigma = scales_of(self.path, t, flat)
        joint = self.law.log_joint(flat, alpha, sigma)
        labels: Tensor = self.law.labels  # type: ignore[assignment]
        return torch.stack([joint[:, labels == y].logsumexp(1) for y in range(self.classes)], 1).to(x_t.dtype)
