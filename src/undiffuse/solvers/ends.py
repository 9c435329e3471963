"""Trajectories of a model by their two ends: what solvers and grids are fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.solvers.base import Cond, rows_of
from undiffuse.solvers.sampling import placed, sample


@dataclass(frozen=True)
class Ends:
    """Starts x at t_max, where the flow carries them, both (n, *event), and their conditions."""

    start: Tensor
    x: Tensor
    cond: Cond

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        event: tuple[int, ...],
        cond: Cond,
        n: int,
        seed: int,
        reference: int,
        batch: int,
        tell: Callable[[int], object] = lambda done: None,
    ) -> Ends:
        """Of n noises, by so many steps of "abm-4".

        Raises:
            SamplingError: they are not finite.
        """
        whole, found = noises(denoiser, event, cond, n, seed), []
        for part in whole.batches(batch):
            tell(sum(map(len, found)))
            found.append(sample(denoiser, noise=part.start, steps=reference, cond=part.cond, device=part.start.device))
        tell(n)
        return cls(whole.start, torch.cat(found), whole.cond)

    def rows(self, low: int, high: int) -> Ends:
        which = torch.arange(low, min(high, len(self.x)))
        return Ends(self.start[low:high], self.x[low:high], rows_of(self.cond, which))

    def batches(self, size: int) -> Iterator[Ends]:
        return (self.rows(low, low + size) for low in range(0, len(self.x), size))

    def shared_out(self) -> tuple[Ends, Ends, Ends]:
        """Half to be fitted, a quarter to choose by, a quarter to be measured."""
        n = len(self.x)
        return self.rows(0, n // 2), self.rows(n // 2, 3 * n // 4), self.rows(3 * n // 4, n)


def noises(denoiser: Denoiser, event: tuple[int, ...], cond: Cond, n: int, seed: int) -> Ends:
    """The starts of n trajectories, which have not ended yet."""
    like = next((p for p in (*denoiser.parameters(), *denoiser.buffers()) if p.is_floating_point()), torch.empty(0))
    dtype = torch.promote_types(like.dtype, torch.float32)
    z = Streams.of(seed, n).normal((n, *event), dtype=dtype).to(like.device)
    start = z * float(denoiser.path.sigma(torch.tensor(denoiser.path.t_max, dtype=torch.float64)))
    return Ends(start, start, placed(cond, n, like.device))


def squares(x: Tensor) -> Float[Tensor, " b"]:
    """Squared lengths."""
    return x.reshape(len(x), -1).double().square().sum(1)


def relative(distances: Tensor, ends: Ends) -> dict[str, float]:
    """RMS and median relative to the RMS length of the true ends."""
    length = squares(ends.x).mean().sqrt().cpu()
    return {
        "rms": float(distances.square().mean().sqrt() / length),
        "median": float(distances.quantile(0.5) / length),
    }


def check_counts(**counts: tuple[int, int, float]) -> None:
    """Refuse what is no whole number from the second to the third.

    Raises:
        ArgumentError: names the first.
    """
    for name, (value, low, high) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            span = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ArgumentError(f"{name} is {value!r}: expected a whole number, {span}")
