"""Angles between a path's ends as gaps that can be moved: where fits of times search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.fields import Denoiser

# Gaps are of the angle's square root, where grids of few steps are nearly equal; each is so much of the whole at least,
# at the beginning.
_POWER, _APART = 0.5, 1e-3


class Places:
    """n angles, and how the n + 1 gaps around them are moved by their logarithms; 0 is the beginning.

    The first gap begins at t_max, the last ends where the denoiser's knowledge does.
    """

    def __init__(self, denoiser: Denoiser, angles: Float[Tensor, " n"] | Sequence[float]):
        path = denoiser.path
        low = max(path.t_min, min(denoiser.t_low, path.t_max))
        first, last = path.angle(torch.tensor([path.t_max, low], dtype=torch.float64)) ** _POWER
        self.first, self.span = first, first - last
        inner = torch.as_tensor(angles, dtype=torch.float64) ** _POWER
        places = torch.cat([first[None], inner, last[None]])
        self.gaps = (places[:-1] - places[1:]).clamp(min=_APART * float(self.span))

    def __call__(self, moves: Float[Tensor, " n+1"]) -> Float[Tensor, " n"]:
        gaps = self.gaps * torch.exp(moves)
        return (self.first - self.span * gaps.cumsum(0)[:-1] / gaps.sum()) ** (1 / _POWER)
