"""Random maps of images, which carry Markov chains where they would not get by themselves."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from undiffuse.core import random
from undiffuse.core.random import Generator

# Half-widths: a turn in degrees, the log of the zoom, the shear, and the shift in half images.
TURN, ZOOM, SHEAR, SHIFT = 45.0, 0.3, 0.3, 0.2


def random_affine(x: Float[Tensor, "b c h w"], generator: Generator = None) -> Float[Tensor, "b c h w"]:
    """Every image turned, zoomed, sheared, shifted, and flipped along either axis, by numbers of its own.

    Output pixel u, in [-1, 1]^2, shows the input at `A u + b`: `A = z R(phi) F + s e_1 e_2^T`, F a flip of each axis
    with chance 1/2, phi uniform within 45 degrees, log z within 0.3, s within 0.3, both parts of b within 0.2. What
    comes from outside is -1, the black of images.
    """
    n = len(x)
    u = 2 * random.uniform((n, 7), generator, dtype=x.dtype, device=x.device) - 1
    phi, zoom, shear = u[:, 0] * math.radians(TURN), torch.exp(ZOOM * u[:, 1]), SHEAR * u[:, 2]
    cos, sin = zoom * torch.cos(phi), zoom * torch.sin(phi)
    flip_x, flip_y = torch.sign(u[:, 5]), torch.sign(u[:, 6])
    rows = [
        torch.stack([cos * flip_x, shear - sin * flip_y, SHIFT * u[:, 3]], 1),
        torch.stack([sin * flip_x, cos * flip_y, SHIFT * u[:, 4]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1
