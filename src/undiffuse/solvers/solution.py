"""What an adaptive integration found: the ends, what they took, and the states between, each sample at its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.solvers.pairs import Pair

Rows = Float[Tensor, "n d"]


@dataclass(frozen=True)
class Tried:
    """A step that some samples tried: which, from where, how far, the state there, its S slopes, and who took it."""

    rows: Int[Tensor, " n"]
    start: Float[Tensor, " n"]
    length: Float[Tensor, " n"]
    y: Rows
    slopes: Float[Tensor, "s n d"]
    accepted: Bool[Tensor, " n"]


@dataclass(frozen=True)
class Track:
    """All accepted steps, sample after sample, each sample's in order.

    Attributes:
        rows, start, length, y, slopes: of each step, as in `Tried`.
        pair: whose polynomial goes between.
    """

    rows: Int[Tensor, " n"]
    start: Float[Tensor, " n"]
    length: Float[Tensor, " n"]
    y: Rows
    slopes: Float[Tensor, "s n d"]
    pair: Pair

    @staticmethod
    def of(tried: list[Tried], pair: Pair) -> Track:
        def all_of(name: str, dim: int = 0) -> Tensor:
            return torch.cat([getattr(step, name) for step in tried], dim)

        rows, accepted = all_of("rows"), all_of("accepted").nonzero()[:, 0]
        kept = accepted[torch.argsort(rows[accepted], stable=True)]
        return Track(
            rows[kept],
            all_of("start")[kept],
            all_of("length")[kept],
            all_of("y")[kept],
            all_of("slopes", 1)[:, kept],
            pair,
        )

    def ends(self) -> tuple[float, float]:
        """The positions between which the steps are."""
        return float(self.start[0]), float(self.start[-1] + self.length[-1])

    def at(self, position: Float[Tensor, " m"], rows: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """States of samples `rows` at positions between the ends: no further evaluation."""
        first, last = self.ends()
        # One sorted key for all samples: where the sample's own way starts, and how far it is on it.
        width = 2 * abs(last - first)
        keys = self.rows.double() * width + (self.start - first).abs()
        asked = rows.double() * width + (position - first).abs()
        step = (torch.searchsorted(keys, asked, right=True) - 1).clamp(min=0)
        share = (position - self.start[step]) / self.length[step]
        weights = (self.pair.between(share) * self.length[step, None]).to(self.y)
        return self.y[step] + torch.einsum("ns,snd->nd", weights, self.slopes[:, step])


@dataclass(frozen=True)
class Solution:
    """What `solve` returns.

    Attributes:
        y: states at the end, (B, D).
        slope: dy / dposition there.
        step: lengths of the steps that would come next, (B,).
        evals: evaluations of the slope for each sample, (B,).
        steps, rejected: accepted and rejected steps of each sample.
        track: all accepted steps, where they were to be kept.
    """

    y: Rows
    slope: Rows
    step: Float[Tensor, " b"]
    evals: Int[Tensor, " b"]
    steps: Int[Tensor, " b"]
    rejected: Int[Tensor, " b"]
    track: Track | None = field(default=None, repr=False)

    def at(self, position: float) -> Rows:
        """States at a position between the ends, by the pair's polynomial: no further evaluation.

        Raises:
            ArgumentError: nothing was kept, or a position outside.
        """
        if self.track is not None:
            low, high = sorted(self.track.ends())
            if low - 1e-12 <= position <= high + 1e-12:
                rows = torch.arange(len(self.y), device=self.y.device)
                return self.track.at(torch.full_like(self.step, position), rows)
        raise ArgumentError(f"position {position:g} is outside what was kept of this solution")
