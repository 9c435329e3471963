"""The training loop of the examples: fresh draws of a law each step, Adam, a learning rate falling along a cosine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from undiffuse.oracles.law import Law


def fit(model: nn.Module, objective: Callable, law: Law, steps: int, *, batch: int = 512, lr: float = 4e-3) -> None:
    """Minimise the mean of `objective(model, x, generator=...)` over draws x of the law; nothing else of it is seen."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = objective(model, law.sample(batch, generator), generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
