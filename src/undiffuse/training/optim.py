"""The optimiser, its rate at each step, and the norm of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.training.config import TrainConfig

Scalar = Float[Tensor, ""]

_KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

# The fused kernels of these devices update all tensors in one pass.
_FUSED_DEVICES = {"cpu", "cuda"}


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019) over `parameters`.

    Adam:  m <- b_1 m + (1 - b_1) g,  v <- b_2 v + (1 - b_2) g^2,  w <- w - lr m^ / (sqrt(v^) + eps),
    with m^ = m / (1 - b_1^k) and v^ = v / (1 - b_2^k) at step k.
    """
    trained = [p for p in parameters if p.requires_grad]
    return _KINDS[config.optimizer](
        trained,
        lr=float(config.lr),
        betas=(float(config.betas[0]), float(config.betas[1])),
        eps=float(config.eps),
        weight_decay=float(config.weight_decay),
        fused=all(p.device.type in _FUSED_DEVICES for p in trained),
    )


def learning_rate(config: TrainConfig, k: int) -> float:
    """The rate of step k = 0 ... steps - 1: a pure function of the step, so that resuming needs no state.

    Warm-up: lr (k + 1) / warmup for k < warmup. Then lr, or
    lr / 2 (1 + cos(pi (k - warmup) / (steps - warmup))), which reaches 0 at k = steps.
    """
    if k < config.warmup:
        return config.lr * (k + 1) / config.warmup
    if config.schedule == "constant":
        return float(config.lr)
    done = (k - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all groups of parameters this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: list[nn.Parameter], largest: float | None) -> Scalar:
    """Scale the gradient so that its norm is at most `largest`; returns the norm before, without a sync."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
