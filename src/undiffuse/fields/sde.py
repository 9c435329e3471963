"""What a path and a field say about drift and noise: forward and reverse-time SDEs, and the Fokker-Planck equation.

With `omega = alpha sigma' - sigma alpha'`, `f = alpha' / alpha` and `g^2 = 2 sigma omega / alpha` (Lemma 4.4.1). Both
ends of a path are singular for one process or another:

- where alpha = 0 (Linear, Trig, Cosine at t = 1) f and g are infinite: the forward process has forgotten x_0, and only
  the PF-ODE (eta = 0) goes on through it;
- where sigma = 0 the score is that of the data themselves, which a network does not know: no reverse process is
  defined there. Call it at `path.t_low` at the least, and go on by `alpha_s E[x_0 | x_t]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.autodiff import divergence
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.core.shapes import as_time, pad_to
from undiffuse.fields.denoiser import Cond, Denoiser, Event, Time
from undiffuse.paths import Path

LogDensity = Callable[[Tensor, Tensor], Tensor]  # (x (B, *event), t (B,)) -> (B,), nats


class SDE(ABC):
    """`dx = drift dt + diffusion dw` in the path's own time, with one noise for all coordinates.

    Attributes:
        direction: 1 where the process runs with t, from data to noise; -1 where it runs against it.
    """

    path: Path
    direction: ClassVar[int]

    @abstractmethod
    def drift(self, x: Event, t: Time, cond: Cond = None) -> Event:
        """Of shape (B, *event); t () or (B,)."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise for a unit of time, of t's shape."""


class ForwardSDE(SDE):
    """`dx = f(t) x dt + g(t) dw` (eq. 4.1.3, Lemma 4.4.1), whose marginals are the path's.

    `path.simulate` draws from it exactly.

    Raises (all methods):
        ArgumentError: a time outside the path, or at which alpha = 0.
    """

    direction = 1

    def __init__(self, path: Path):
        self.path = path

    def drift(self, x: Event, t: Time, cond: Cond = None) -> Event:
        time = as_time(t, x)
        _check_signal(self.path, time)
        return pad_to(self.path.drift(time), x) * x

    def diffusion(self, t: Tensor) -> Tensor:
        _check_signal(self.path, t)
        return self.path.diffusion(t)


class ReverseSDE(SDE):
    """`dx = (f x - (1 + eta^2) / 2 g^2 score) dt + eta g dw_bar`, dt < 0: the family with the path's marginals.

    eta = 1 is the reverse-time SDE (eq. 4.1.6), eta = 0 the PF-ODE (eq. 4.1.7), between and above them other shares of
    noise. Written in the two conditional means, in which nothing cancels and the PF-ODE is regular at alpha = 0:

        drift = alpha' E[x_0 | x] + (sigma' + eta^2 omega / alpha) E[eps | x],    diffusion = eta g.

    Args:
        denoiser: any field.
        eta: not negative.

    Raises:
        ArgumentError: eta < 0; in all methods a time outside the path, at which sigma = 0, or with eta > 0 alpha = 0.
    """

    direction = -1

    def __init__(self, denoiser: Denoiser, eta: float = 1.0):
        if not 0 <= eta < float("inf"):
            raise ArgumentError(f"eta is {eta}: expected 0 (the PF-ODE), 1 (the reverse SDE), or another number >= 0")
        self.denoiser, self.path, self.eta = denoiser, denoiser.path, eta

    def drift(self, x: Event, t: Time, cond: Cond = None) -> Event:
        time = as_time(t, x)
        self._check(time)
        x_0, noise = self.denoiser.estimate(x, time, cond)
        on_noise = self.path.sigma_dot(time)
        if self.eta > 0:
            on_noise = on_noise + self.eta**2 * self.path.omega(time) / self.path.alpha(time)
        return pad_to(self.path.alpha_dot(time), x) * x_0 + pad_to(on_noise, x) * noise

    def diffusion(self, t: Tensor) -> Tensor:
        self._check(t)
        return self.eta * self.path.diffusion(t) if self.eta > 0 else torch.zeros_like(t)

    def _check(self, time: Tensor) -> None:
        if self.eta > 0:
            _check_signal(self.path, time)
        if _is_zero(self.path, self.path.sigma, time):
            raise ArgumentError(
                f"sigma = 0 at t = {time.min().item():g}: the score of the data is not known there. Stop at "
                f"t_low = {self.path.t_low:g}, or end with alpha E[x_0 | x]"
            )


def _check_signal(path: Path, time: Tensor) -> None:
    if _is_zero(path, path.alpha, time):
        raise ArgumentError(
            f"alpha = 0 at t = {time.max().item():g}: drift and diffusion are infinite there. Stay at or below "
            f"t_high = {path.t_high:g}; the PF-ODE, ReverseSDE(denoiser, eta=0), and `path.simulate` go through"
        )


def _is_zero(path: Path, scale: Callable[[Tensor], Tensor], time: Tensor) -> bool:
    """Whether a scale vanishes at some time; on an accelerator nothing is read back, so nothing is checked."""
    path.check_time(time)
    return time.device.type == "cpu" and bool((scale(time.detach()) == 0).any())


def euler_maruyama(
    sde: SDE, x: Event, times: Float[Tensor, " n"], generator: Generator = None, cond: Cond = None
) -> Float[Tensor, "n b *event"]:
    """States at the times by `x + drift dt + diffusion sqrt(|dt|) z`, the first of them x: for checks and pictures.

    Weak and strong order 1, the noise being additive. Samples of a model: `ud.sample(solver="euler-maruyama")`.

    Args:
        sde: a `ForwardSDE` or `ReverseSDE`.
        x: state at `times[0]`.
        times: strictly monotone, in the direction of the SDE.
        generator: as of `random.normal`; one draw a step where there is noise.

    Raises:
        ArgumentError: times that run the other way, or at which the SDE is singular (the last one may be).
    """
    times = times.detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool((sde.direction * times.diff() > 0).all()):
        way = "increasing" if sde.direction > 0 else "decreasing"
        raise ArgumentError(f"times of a {type(sde).__name__} must be strictly {way}, two or more")
    states = [x]
    for t, s in pairwise(times.unbind()):
        h, g = float(s - t), float(sde.diffusion(t))
        x = x + h * sde.drift(x, t, cond)
        if g > 0:
            x = x + g * abs(h) ** 0.5 * random.normal(x.shape, generator, dtype=x.dtype, device=x.device)
        states.append(x)
    return torch.stack(states)


def fokker_planck_residual(
    sde: SDE, log_density: LogDensity, x: Event, t: Float[Tensor, " b"], cond: Cond = None
) -> Float[Tensor, " b"]:
    """How far a density is from solving the SDE's Fokker-Planck equation at (x, t), relative to its terms.

    In `l = log p_t(x)`, with b the drift and g the diffusion,

        dl/dt + div b + b . grad l - d g^2 / 2 (lap l + |grad l|^2) = 0,

    d = 1 for a process that runs with t (Theorem 4.1.1) and d = -1 for one that runs against it; g = 0 is the
    continuity equation. Divided by the sum of the terms' absolute values: at most 1; in float64 about 1e-12 where the
    density is right. Each term is a derivative by autograd, 2 D backward passes in all.

    Args:
        sde: forward, or of the reverse family.
        log_density: `(x, t) -> (B,)`, differentiable twice in x and once in t, such as
            `lambda x, t: law.log_prob_at(x, path, t)`.
        x, t: where; float64 for small residuals. Off the knots of a `Tabulated` path, whose f jumps there.
        cond: passed to the field.

    Raises:
        ArgumentError: log_density returned another shape, or does not depend on t.
    """
    t = t.detach().requires_grad_(True)
    with torch.enable_grad():
        value = log_density(x, t)
        if value.shape != t.shape or not value.requires_grad:
            raise ArgumentError(
                f"log_density returned shape {tuple(value.shape)}, "
                f"{'' if value.requires_grad else 'not '}differentiable in t: expected one number for each of "
                f"{len(t)} rows, made from the tensor t"
            )
        (rate,) = torch.autograd.grad(value.sum(), t)

    def slope(points: Tensor) -> Tensor:
        with torch.enable_grad():
            if not points.requires_grad:
                points = points.detach().requires_grad_(True)
            return torch.autograd.grad(log_density(points, time).sum(), points, create_graph=True)[0]

    time = t.detach()
    score, laplacian = divergence(slope, x)
    drift, spread = divergence(lambda points: sde.drift(points, time, cond), x)
    score, drift = score.detach(), drift.detach()
    half = -0.5 * sde.direction * sde.diffusion(time).square()
    terms = [rate, spread, _dot(drift, score), half * laplacian, half * _dot(score, score)]
    return sum(terms).detach() / sum(term.abs() for term in terms).detach()  # type: ignore[union-attr]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
