"""From whole numbers to a density: noise within the bin, uniform or learned.

Value k of `levels` values is the bin `[2 k / levels - 1, 2 (k + 1) / levels - 1)` of [-1, 1], and a point of it
`v = 2 (k + u) / levels - 1`, u in [0, 1]. With any density q(u | k)

    log P(k) >= E_q[log p(v) + D log(2 / levels) - log q(u | k)]

with equality where q(u | k) is the posterior under p: uniform dequantisation is q = 1 (Theis et al. 2016), variational
dequantisation learns q (Ho et al. 2019, eq. 11).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator, Streams
from undiffuse.fields import Denoiser

Event = Float[Tensor, "b *event"]
PerSample = Float[Tensor, " b"]


def levels_of(x: Event, levels: int = 256) -> Event:
    """k of data scaled as `x = 2 k / (levels - 1) - 1`, in the type of x.

    Raises:
        ArgumentError: levels < 2, or data that are not of that form (to a tenth of a level): outside [-1, 1], or
            dequantised, resized or normalised already.
    """
    if levels < 2:
        raise ArgumentError(f"levels is {levels}: expected at least 2")
    scaled = (x + 1) * (0.5 * (levels - 1))
    k = scaled.round()
    worst = _off(x, levels) if x.numel() else 0.0
    if worst > 0.1 or (x.numel() and not (float(k.min()) >= 0 and float(k.max()) < levels)):
        raise ArgumentError(
            f"data run from {float(x.min()):.4g} to {float(x.max()):.4g}, up to {worst:.2f} of a level off: expected "
            f"{levels} levels in [-1, 1], 2 k / {levels - 1} - 1. Data without levels need no dequantisation"
        )
    return k


def count_levels(x: Event) -> int:
    """256 where x fits bytes, else the number of levels that its closest values are apart.

    Raises:
        ArgumentError: no number of levels up to 65,536 fits, see `levels_of`.
    """
    try:
        levels_of(x)
        return 256
    except ArgumentError:
        values = x.double().unique()
        gaps = values.diff()
        gaps = gaps[gaps > 1e-5]
        near = round(2 / float(gaps.min())) + 1 if len(gaps) else 2
        # The closest pair is a little closer than it should be where values are rounded.
        fits = [n for n in range(max(2, near - 2), min(near + 2, 65_536) + 1) if _off(values, n) <= 0.1]
        if not fits:
            levels_of(x, max(2, min(near, 65_536)))  # says what is wrong
        return min(fits, key=lambda n: _off(values, n))


def _off(x: Tensor, levels: int) -> float:
    scaled = (x + 1) * (0.5 * (levels - 1))
    return float((scaled - scaled.round()).abs().max())


def dequantise(x: Event, generator: Generator = None, *, levels: int = 256) -> Event:
    """`v = 2 (k + u) / levels - 1` with u uniform, of data with `levels` values as `levels_of` takes them."""
    u = random.uniform(x.shape, generator, dtype=torch.float64, device=x.device)
    return ((levels_of(x.double(), levels) + u) * (2 / levels) - 1).to(x.dtype)


class VariationalDequantiser(nn.Module):
    """q(u | x), piecewise constant: `q(u) = K p_j` where u lies in the j-th of K equal parts of [0, 1], p a softmax.

    Uniform before it is trained. Trained by the score of the model at its first time alone: with E log q in closed
    form, the gradient of `E[log q(u | x) - log p(v)]` is that of `E log q - E score(v)^T v`, so that no flow is solved.

    Args:
        shape: of an event.
        parts: K.
        net: from x to (B, K C, ...), what to add to the logits of each coordinate; None: they do not depend on x.
        levels: values per coordinate.
    """

    def __init__(self, shape: tuple[int, ...], parts: int = 8, net: nn.Module | None = None, levels: int = 256):
        super().__init__()
        if parts < 1:
            raise ArgumentError(f"parts is {parts}: expected at least 1")
        self.parts, self.levels, self.net = parts, levels, net
        self.logits = nn.Parameter(torch.zeros(parts, *shape))

    def log_share(self, x: Event) -> Float[Tensor, "b k *event"]:
        """log p of each part."""
        logits = self.logits.to(x).expand(len(x), *self.logits.shape)
        if self.net is not None:
            logits = logits + self.net(x).reshape(logits.shape)
        return logits.log_softmax(1)

    def forward(self, x: Event, generator: Generator = None) -> tuple[Event, PerSample]:
        """(v, log q(u | x) in nats)."""
        v, log_q, _ = self._draw(x, generator)
        return v, log_q

    def _draw(self, x: Event, generator: Generator) -> tuple[Event, PerSample, Tensor]:
        log_share = self.log_share(x)
        share = log_share.exp()
        upper = share.cumsum(1)
        z = random.uniform(x.shape, generator, dtype=x.dtype, device=x.device)[:, None]
        part = (z >= upper[:, :-1]).sum(1, keepdim=True)  # which part the z-quantile of q lies in
        own = share.gather(1, part)
        inside = (z - (upper.gather(1, part) - own)) / own
        u = (part + inside.clamp(0, 1)) / self.parts
        v = (levels_of(x, self.levels) + u[:, 0]) * (2 / self.levels) - 1
        log_q = log_share.gather(1, part) + math.log(self.parts)
        return v, log_q.flatten(1).sum(1), log_share

    def loss(self, denoiser: Denoiser, x: Event, generator: Generator = None) -> PerSample:
        """Per sample, a number whose gradient is that of `E[log q(u | x) - log p(v)]`; its value says nothing."""
        v, _, log_share = self._draw(x, generator)
        with torch.no_grad():
            low = torch.full((len(x),), max(denoiser.t_low, denoiser.path.t_min), dtype=torch.float64)
            alpha = float(denoiser.path.alpha(low[0]))
            score = alpha * denoiser.score(alpha * v, low.to(v))
        mean_log_q = (log_share.exp() * log_share).flatten(1).sum(1)
        return mean_log_q - (score * v).flatten(1).sum(1)

    def fit(self, denoiser: Denoiser, x: Event, *, steps: int = 500, batch: int = 64, lr: float = 0.02, seed: int = 0):
        """Adam on `loss` over random rows of x; returns itself.

        Raises:
            ArgumentError: steps or batch < 1.
        """
        if steps < 1 or batch < 1:
            raise ArgumentError(f"steps is {steps}, batch {batch}: expected at least 1")
        optimiser = torch.optim.Adam(self.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for step in range(steps):
            streams = Streams.of(seed, batch).fold(step)
            rows = streams.integers(len(x), (batch,), device=x.device)
            optimiser.zero_grad()
            self.loss(denoiser, x[rows], streams).mean().backward()
            optimiser.step()
            schedule.step()
        return self
