"""Random maps of images, against what they do to a smooth picture whose value is known everywhere."""

from __future__ import annotations

import math

import pytest
import torch

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.objectives.moves import random_affine
from undiffuse.objectives.starts import ReplayBuffer


def picture(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Smooth on the plane, without any symmetry, and -1 far from the middle."""
    return 2 * torch.exp(-3 * ((u - 0.2) ** 2 + 0.5 * (v + 0.1) ** 2 + 0.6 * u * v) - 2 * (u - 0.3) ** 2) - 1


def test_an_image_is_turned_zoomed_sheared_shifted_and_flipped():
    n, size = 64, 96
    axis = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    x = picture(u, v).expand(n, 1, size, size)
    moved = random_affine(x, Streams.of(4, n))
    draws = 2 * random.uniform((n, 7), Streams.of(4, n), dtype=torch.float64) - 1
    worst = 0.0
    for row, d in zip(moved[:, 0], draws.tolist()):
        phi, zoom, flip = (
            math.radians(45 * d[0]),
            math.exp(0.3 * d[1]),
            [math.copysign(1, d[5]), math.copysign(1, d[6])],
        )
        a = torch.tensor([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]], dtype=torch.float64)
        a = zoom * a @ torch.diag(torch.tensor(flip, dtype=torch.float64))
        a[0, 1] += 0.3 * d[2]
        at_u = a[0, 0] * u + a[0, 1] * v + 0.2 * d[3]
        at_v = a[1, 0] * u + a[1, 1] * v + 0.2 * d[4]
        inside = (at_u.abs() < 1 - 1 / size) & (at_v.abs() < 1 - 1 / size)
        worst = max(worst, float((row - picture(at_u, at_v))[inside].abs().max()))
        assert torch.all(row[(at_u.abs() > 1 + 1 / size) | (at_v.abs() > 1 + 1 / size)] == -1)
    assert worst < 1.7e-3  # of bilinear interpolation


def test_a_chain_that_is_moved_keeps_its_label_and_counts_as_new():
    """20,000 rows with chance 0.25, 20 % of them begun anew: 3.3 standard errors (false alarm 0.1 %)."""
    n = 20_000
    buffer = ReplayBuffer([1, 6, 6], size=40, reinit=0.2, moved=0.25, labelled=True)
    buffer.write(torch.arange(40), torch.rand(40, 1, 6, 6), torch.full((40,), 5), torch.arange(40) % 10)
    given = torch.full((n,), 11)
    begun = buffer.begin(torch.zeros(n, 1, 6, 6), given, Streams.of(3, n))
    assert isinstance(begun.cond, torch.Tensor)
    anew = begun.cond == 11
    kept = (begun.x == buffer.x[begun.slots]).flatten(1).all(1)
    moved = ~anew & ~kept
    assert abs(float(moved.double().mean()) - 0.2) < 3.3 * math.sqrt(0.2 * 0.8 / n)
    assert torch.equal(begun.cond[~anew], buffer.label[begun.slots][~anew])
    assert torch.equal(begun.age == 0, anew | moved)


def test_what_is_no_image_is_not_moved():
    with pytest.raises(ArgumentError, match=r"moved is 0.1 for events of shape \[2\]: expected images"):
        ReplayBuffer([2], moved=0.1).begin(torch.zeros(3, 2), None, Streams.of(0, 3))
    with pytest.raises(ArgumentError, match=r"moved 1.5: expected"):
        ReplayBuffer([1, 4, 4], moved=1.5)
