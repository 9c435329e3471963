"""Laws on the plane: `gaussians`, `moons`, `checkerboard`, `spiral`.

Each is scaled by a constant of the law (not of the sample) so that it has mean zero and
E|x|^2 / 2 = 1. Point i of a seed is a pure function of (source, split, seed, i).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.random import Streams, hash_key
from undiffuse.data.dataset import ArrayDataset, Labels, digest

DEFAULT_POINTS = 20_000
MODES = 8
MODE_STD = 0.1
# E|x|^2 = radius^2 + 2 std^2 = 2.
RING_RADIUS = math.sqrt(2.0 - 2.0 * MODE_STD**2)

MOON_NOISE = 0.06  # in units of the moons' radius, before scaling
SQUARES = 4  # along each side of the checkerboard
CHECKERBOARD_HALF_WIDTH = math.sqrt(3.0)  # each coordinate is uniform on [-sqrt 3, sqrt 3]: variance 1

SPIRAL_TURNS = 1.5
SPIRAL_NOISE = 0.03
# E|x|^2 = R^2 / 2 + 2 noise^2 = 2 for a radius R sqrt(u), u uniform.
SPIRAL_RADIUS = math.sqrt(4.0 - 4.0 * SPIRAL_NOISE**2)


def ring_means(modes: int = MODES, radius: float = RING_RADIUS) -> Float[Tensor, "k 2"]:
    """Centres of `gaussians`: `modes` points at equal angles on a circle, the first on the x axis."""
    angle = torch.arange(modes, dtype=torch.float64) * (2.0 * math.pi / modes)
    return (radius * torch.stack([angle.cos(), angle.sin()], dim=1)).float()


def gaussians(streams: Streams) -> tuple[Tensor, Tensor | None]:
    """Eight equally likely Gaussians of standard deviation `MODE_STD` on a ring; the label is the mode."""
    n = len(streams)
    mode = streams.integers(MODES, (n,))
    return ring_means()[mode] + MODE_STD * streams.normal((n, 2)), mode


def moon_moments() -> tuple[tuple[float, float], float]:
    """Mean and mean coordinate variance of the two half circles before scaling, noise included."""
    between_x, between_y = 0.5, 2.0 / math.pi - 0.25
    variance_x = 0.5 + between_x**2
    variance_y = 0.5 - (2.0 / math.pi) ** 2 + between_y**2
    return (0.5, 0.25), (variance_x + variance_y) / 2.0 + MOON_NOISE**2


def moons(streams: Streams) -> tuple[Tensor, Tensor | None]:
    """Two interleaved half circles, (cos a, sin a) and (1 - cos a, 1/2 - sin a); the label is the moon."""
    n = len(streams)
    moon = streams.integers(2, (n,))
    angle = math.pi * streams.uniform((n,))
    sign = 1.0 - 2.0 * moon
    points = torch.stack([moon + sign * angle.cos(), 0.5 * moon + sign * angle.sin()], dim=1)
    mean, variance = moon_moments()
    points = points + MOON_NOISE * streams.normal((n, 2)) - torch.tensor(mean)
    return points / math.sqrt(variance), moon


def checkerboard(streams: Streams) -> tuple[Tensor, Tensor | None]:
    """Uniform on the eight squares (i, j), i + j even, of a 4 x 4 board; no labels."""
    n = len(streams)
    column = streams.integers(SQUARES, (n,))
    row = 2 * streams.integers(SQUARES // 2, (n,)) + column % 2
    corner = torch.stack([column, row], dim=1)
    unit = (corner + streams.uniform((n, 2))) / SQUARES
    return CHECKERBOARD_HALF_WIDTH * (2.0 * unit - 1.0), None


def spiral(streams: Streams) -> tuple[Tensor, Tensor | None]:
    """Two arms of an Archimedean spiral, opposite each other, uniform in area; the label is the arm."""
    n = len(streams)
    arm = streams.integers(2, (n,))
    root = streams.uniform((n,)).sqrt()
    angle = 2.0 * math.pi * SPIRAL_TURNS * root + math.pi * arm
    points = SPIRAL_RADIUS * root[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + SPIRAL_NOISE * streams.normal((n, 2)), arm


# Law and number of its classes.
PLANE: dict[str, tuple[Callable[[Streams], tuple[Tensor, Tensor | None]], int | None]] = {
    "gaussians": (gaussians, MODES),
    "moons": (moons, 2),
    "checkerboard": (checkerboard, None),
    "spiral": (spiral, 2),
}


def plane_dataset(name: str, split: str, n: int, seed: int) -> ArrayDataset:
    """`n` points of the law `name`; splits are independent draws."""
    law, classes = PLANE[name]
    points, label = law(Streams.of(hash_key("plane", name, split, seed), n))
    # Identified by how they are made: the last bit of a cosine may differ between machines.
    identity = digest(name, split, n, seed)
    return ArrayDataset(points.float(), Labels(label, None, classes), name, split, identity=identity)
