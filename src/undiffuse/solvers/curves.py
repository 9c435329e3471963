"""Trajectories of a model as curves: what tables of solvers are fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.memory import GIB, free_memory
from undiffuse.fields import Denoiser
from undiffuse.solvers.ends import Ends
from undiffuse.solvers.polynomials import lagrange
from undiffuse.solvers.sampling import Sample, sample

# A curve goes by the polynomial through so many of its points around a place.
_POINTS = 4


@dataclass(frozen=True)
class Curves:
    """Trajectories by `y = x / hypot(alpha, sigma)` (m, n, *event) at m angles that fall, and by their ends."""

    ends: Ends
    angles: tuple[float, ...]
    y: Tensor

    @classmethod
    def of(
        cls, denoiser: Denoiser, starts: Ends, steps: int, batch: int, tell: Callable[[int], object] = lambda done: None
    ) -> Curves:
        """From these starts, by so many steps of "abm-4".

        Raises:
            ArgumentError: they take more memory than there is.
            SamplingError: they are not finite.
        """
        path, start = denoiser.path, starts.start
        _check_memory((steps + 1) * start.nbytes, start.device)
        y, x = start.new_empty(steps + 1, *start.shape), torch.empty_like(start)
        angles: tuple[float, ...] = ()
        for first, part in zip(range(0, len(start), batch), starts.batches(batch)):
            tell(first)
            run = sample(denoiser, noise=part.start, steps=steps, cond=part.cond, device=start.device, return_info=True)
            assert isinstance(run, Sample)
            angles, rows = tuple(path.angle(run.grid).tolist()), slice(first, first + batch)
            sizes = torch.hypot(path.alpha(run.grid), path.sigma(run.grid)).tolist()
            for k, (state, size) in enumerate(zip(run.trajectory, sizes)):
                y[k, rows] = state / size
            x[rows] = run.x
        tell(len(start))
        return cls(Ends(start, x, starts.cond), angles, y)

    def at(self, angle: float) -> Float[Tensor, "n *event"]:
        """y at an angle that lies within theirs."""
        before = sum(a >= angle for a in self.angles)
        first = max(0, min(before - _POINTS // 2, len(self.angles) - _POINTS))
        near = slice(first, first + _POINTS)
        weights = torch.from_numpy(lagrange(self.angles[near], np.array([angle]))[:, 0])
        return torch.einsum("k,k...->...", weights.to(self.y), self.y[near])


def _check_memory(needed: int, device: torch.device) -> None:
    if device.type == "cpu" and needed > (free := free_memory()):
        raise ArgumentError(
            f"the true trajectories take {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free: give fewer noises "
            "(n), or fewer steps of the reference"
        )
