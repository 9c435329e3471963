"""Places on a path, as the multistep method sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from undiffuse.paths import Path
from undiffuse.solvers.base import Field, scales


@dataclass(frozen=True)
class TimeOf:
    """t as a function of the angle; equal for one and the same path, so that weights are found again."""

    path: Path
    scale: float

    def __call__(self, theta: np.ndarray) -> np.ndarray:
        angle = np.arctan2(self.scale * np.sin(theta), np.cos(theta))
        return self.path.time_of_angle(torch.from_numpy(angle)).numpy()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TimeOf) and other.path is self.path and other.scale == self.scale

    def __hash__(self) -> int:
        return id(self.path)


class Level(NamedTuple):
    """A time, its angle and its scales, alpha in units of the data's scale."""

    t: float
    theta: float
    alpha: float
    sigma: float

    @staticmethod
    def of(field: Field, t: Tensor, scale: float) -> Level:
        alpha, sigma = scales(field, t)
        return Level(float(t), math.atan2(sigma, scale * alpha), scale * alpha, sigma)

    @property
    def half_log_snr(self) -> float:
        return math.log(self.alpha / self.sigma)


def own_angle(theta: float, scale: float) -> float:
    """The path's own angle of one that was taken with alpha in units of the data's scale."""
    return math.atan2(scale * math.sin(theta), math.cos(theta))


def smooth_end(field: Field, end: Level) -> bool:
    """Whether the path's velocity is finite at its end in the data; not where sigma grows like sqrt(t)."""
    return math.isfinite(float(field.path.sigma_dot(torch.tensor(end.t, dtype=torch.float64))))
