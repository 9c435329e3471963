"""What is known of a sample, `P x_0` for an orthogonal projector P, and the corrector that imposes it on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.sums import combine
from undiffuse.solvers.base import Bound, Noise, Solver, scales

Event = Float[Tensor, "b *event"]


class Projector:
    """P, an orthogonal projection: linear, `P P = P = P^T`."""

    def __call__(self, x: Event) -> Event:
        """`P x`."""
        raise NotImplementedError

    def put(self, x: Event, part: Event) -> Event:
        """`(I - P) x + part`, for a part that P keeps."""
        return x - self(x) + part


@dataclass(frozen=True)
class Entries(Projector):
    """P keeps the entries where the mask (which broadcasts to x) is true."""

    mask: Bool[Tensor, "..."]

    def __call__(self, x: Event) -> Event:
        return torch.where(self.mask.to(x.device), x, torch.zeros_like(x))

    def put(self, x: Event, part: Event) -> Event:
        return torch.where(self.mask.to(x.device), part, x)  # bit for bit: -0.0 too is kept


@dataclass(frozen=True)
class ChannelMix(Projector):
    """P keeps one mixture of the channels, `w . x` at each place: `P x = w (w . x) / |w|^2`."""

    weights: tuple[float, ...]

    def mixed(self, x: Event) -> Float[Tensor, "b one *space"]:
        """`w . x`, one channel."""
        return (self._column(x) * x).sum(1, keepdim=True)

    def lifted(self, mix: Float[Tensor, "b one *space"]) -> Event:
        """The shortest x with `w . x = mix`."""
        return self._column(mix) * (mix / sum(w * w for w in self.weights))

    def __call__(self, x: Event) -> Event:
        return self.lifted(self.mixed(x))

    def _column(self, x: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 2))


@dataclass(frozen=True)
class BlockMeans(Projector):
    """P replaces each block of factor x factor pixels by its mean; x is (B, C, H, W)."""

    factor: int

    def means(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c small_h small_w"]:
        """One value for each block.

        Raises:
            ArgumentError: a factor that does not divide height and width.
        """
        height, width = x.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ArgumentError(f"factor {self.factor} does not divide images of {height} x {width} pixels")
        blocks = x.unflatten(-1, (-1, self.factor)).unflatten(-3, (-1, self.factor))
        return blocks.mean((-1, -3))

    def lifted(self, small: Float[Tensor, "b c small_h small_w"]) -> Float[Tensor, "b c h w"]:
        """Each value on all of its block."""
        return small.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def __call__(self, x: Event) -> Event:
        return self.lifted(self.means(x))


@dataclass(frozen=True)
class Known:
    """The known part of x_0.

    Attributes:
        project: P.
        value: `P x_0`, (B, *event).
    """

    project: Projector
    value: Event

    def put(self, x: Event, part: Event) -> Event:
        """`(I - P) x + part`, for a part that P keeps."""
        return self.project.put(x, part)


@dataclass(frozen=True)
class Imputation:
    """After each step the known part of x_s is replaced by a draw of its law given the data (Song et al. 2021, I.2).

    `x_s <- (I - P) x_s + alpha_s P x_0 + sigma_s P eps`: with white noise, the parts that P keeps and drops stay
    independent given x_0. A `corrector=` of the loop.

    Attributes:
        known: what is imposed.
        solver: makes the step again where `resample` > 1; what it keeps from step to step is then started anew.
        resample: times that each step that ends in noise is made (Lugmayr et al. 2022, RePaint, jumps of one step): x_s
            goes back to x_t by `p(x_t | x_s)`, and down again.
    """

    known: Known
    solver: Solver
    resample: int = 1

    def correct(self, field: Bound, x: Event, t: Tensor, noise: Noise) -> Event:
        """x at time t, its known part drawn from `p(P x_t | P x_0)`."""
        x = self._imposed(field, x, t, noise)
        if self.resample == 1:
            return x
        grid: Tensor = field.grid  # type: ignore[assignment]
        before = grid[int((grid == t).nonzero()[0, 0]) - 1]
        scale, std = (float(v) for v in field.path.transition(t, before))
        solver = self.solver.for_steps(len(grid) - 1)
        for _ in range(self.resample - 1):
            back = combine(x, scale, noise(), std)
            x, _ = solver.step(field, back, before, t, solver.init(field, back, before), noise)
            x = self._imposed(field, x, t, noise)
        return x

    def _imposed(self, field: Bound, x: Event, t: Tensor, noise: Noise) -> Event:
        alpha, sigma = scales(field, t)
        return self.known.put(x, torch.add(alpha * self.known.value, self.known.project(noise()), alpha=sigma))
