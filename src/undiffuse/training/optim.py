"""Optimisers, their rate at each step, and the norm of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.training.config import TrainConfig

Scalar = Float[Tensor, ""]

_ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

# The fused kernels of these devices update all tensors in one pass.
_FUSED_DEVICES = {"cpu", "cuda"}

# x -> a x + b x^3 + c x^5, five times, takes every singular value in [0.005, 1] to about 1 (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Float[Tensor, "k m n"]) -> Float[Tensor, "k m n"]:
    """About `U V^T` for each `U S V^T`: the singular values become 0.68 ... 1.16, those below 0.5 % of the norm less.

    Five Newton-Schulz steps `X <- a X + (b A + c A^2) X` with `A = X X^T`, from `X / |X|_F` (Jordan et al. 2024).
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    # Far above where squares underflow: a gradient that fades out must not be divided by next to nothing.
    x = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-12)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised (Jordan et al. 2024), scaled to steps of Adam's size.

        m <- b m + (1 - b) g,   w <- w - lr (0.2 sqrt(max(rows, columns)) O + weight_decay w),
        O = orthogonalise(b m + (1 - b) g)

    An orthogonal O has root mean square `1 / sqrt(max(rows, columns))`; Adam's steps have about 0.2 (Liu et al. 2025),
    so that one rate serves both. A convolution's kernel is a matrix with a row for each output channel. Matrices of
    one shape are done together.

    Args:
        parameters: of two dimensions or more.
        lr, momentum, weight_decay: lr, b and weight_decay above.
        precision: what the products of `orthogonalise` are computed in.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        precision: torch.dtype = torch.bfloat16,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move all parameters that have a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, parameters in alike.items():
                self._step(parameters, shape, **{key: group[key] for key in ("lr", "momentum", "weight_decay")})

    def _step(self, parameters: list[nn.Parameter], shape: tuple[int, int], *, lr, momentum, weight_decay) -> None:
        directions = torch.stack([self._direction(p, momentum).reshape(shape) for p in parameters])
        moves = orthogonalise(directions.to(self.precision)).to(directions.dtype)
        scale = 0.2 * math.sqrt(max(shape))
        for p, move in zip(parameters, moves):
            p.mul_(1.0 - lr * weight_decay).sub_(move.reshape(p.shape), alpha=lr * scale)

    def _direction(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's: the mean of the past, moved once more towards the gradient."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        past = state["momentum"]
        past.lerp_(p.grad, 1.0 - momentum)
        return p.grad.lerp(past, momentum)


def make_optimizers(module: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """What moves the trained parameters of `module`: Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019), or
    Muon for what is a matrix and AdamW for the rest: vectors, and tables whose rows are looked up.

    Adam:  m <- b_1 m + (1 - b_1) g,  v <- b_2 v + (1 - b_2) g^2,  w <- w - lr m^ / (sqrt(v^) + eps),
    with m^ = m / (1 - b_1^k) and v^ = v / (1 - b_2^k) at step k. Muon's momentum is b_1.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    rate, decay = float(config.lr), float(config.weight_decay)
    matrices: list[nn.Parameter] = []
    if config.optimizer == "muon":
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        matrices = [p for p in trained if p.ndim > 1 and id(p) not in tables]
    taken = {id(p) for p in matrices}
    others = [p for p in trained if id(p) not in taken]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
        made.append(Muon(matrices, rate, float(config.betas[0]), decay, precision))
    if others:
        made.append(
            _ADAMS.get(config.optimizer, torch.optim.AdamW)(
                others,
                lr=rate,
                betas=(float(config.betas[0]), float(config.betas[1])),
                eps=float(config.eps),
                weight_decay=decay,
                fused=all(p.device.type in _FUSED_DEVICES for p in others),
            )
        )
    return made


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


def move(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """One step of each at this rate; the gradients are dropped."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def clip_gradients(parameters: list[nn.Parameter], largest: float | None) -> Scalar:
    """Scale the gradient so that its norm is at most `largest`; returns the norm before, without a sync."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
