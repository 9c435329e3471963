"""What statistics of a model say of a step: integrals along it, in float64, coordinate by coordinate.

Between two half log-SNRs a < b let `L(m) = integral of l from a to m`, `S` likewise of s, and `p` the solution of
`dp/dm = s p + b` that begins with p(a) = 0. A remainder that is f at a is then expected to be `e^S(b) f + p(b)` at b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.solvers.polynomials import lagrange
from undiffuse.solvers.statistics import ModelStatistics

# Gauss and Legendre's rule on [0, 1], and the integrals of its polynomials from 0 to each node.
_N = 10
_NODES, _WEIGHTS = (0.5 * (1 + r) if i == 0 else 0.5 * r for i, r in enumerate(np.polynomial.legendre.leggauss(_N)))
_UP_TO = np.stack([node * lagrange(_NODES.tolist(), node * _NODES) @ _WEIGHTS for node in _NODES])
# No piece is longer than this.
_PIECE = 0.5

# Values (j, n) at half log-SNRs (n,) of the polynomials that a remainder is a sum of.
Basis = Callable[[np.ndarray], np.ndarray]


class Carriage(NamedTuple):
    """From a to b: `f_b = grow f_a + gain`, and `u_b = keep u_a - sum_j weights_j f_j - offset`.

    Attributes:
        keep: `e^-L(b)`.
        grow: `e^S(b)`.
        gain: `p(b)`.
        weights: integrals over m of `e^{L(m) - L(b)} e^S(m) basis_j(m)`, (j, *event).
        offset: the integral over m of `e^{L(m) - L(b)} p(m)`.
    """

    keep: Tensor
    grow: Tensor
    gain: Tensor
    weights: Tensor
    offset: Tensor


def carriage(statistics: ModelStatistics, span: tuple[float, float], basis: Basis) -> Carriage:
    """The integrals over a step, to rounding for such statistics, which are smooth between their places.

    Args:
        statistics: of the model.
        span: a < b, half log-SNRs.
        basis: polynomials through remainders that have all been carried to a.
    """
    edges = _edges(statistics.half_log_snr, span)
    width = edges.diff()
    inside = edges[:-1, None] + width[:, None] * torch.from_numpy(_NODES)
    values = statistics.at(inside)
    ones = [1] * len(statistics.event)
    h = width.reshape(-1, 1, *ones)
    linear, scaling, bias = (v * h for v in values)
    grown = _up_to(scaling)
    gained = torch.exp(grown) * _up_to(torch.exp(-grown) * bias)
    end_linear, end_scaling = _whole(linear), _whole(scaling)
    end_gained = torch.exp(end_scaling) * _whole(torch.exp(-grown) * bias)
    pulled = torch.exp(_up_to(linear) - end_linear[:, None]) * (h * torch.from_numpy(_WEIGHTS).reshape(-1, *ones))
    at = torch.from_numpy(basis(inside.flatten().numpy())).reshape(-1, *inside.shape)
    keep, grow = torch.ones_like(end_linear[0]), torch.ones_like(end_scaling[0])
    gain, offset = torch.zeros_like(end_gained[0]), torch.zeros_like(end_gained[0] * keep)
    weights = offset.new_zeros(len(at), *offset.shape)
    for m in range(len(width)):
        fall, rise = torch.exp(-end_linear[m]), torch.exp(grown[m])
        weights = fall * weights + torch.einsum("jn,n...->j...", at[:, m], pulled[m] * rise * grow)
        offset = fall * offset + (pulled[m] * (rise * gain + gained[m])).sum(0)
        gain = torch.exp(end_scaling[m]) * gain + end_gained[m]
        keep, grow = keep * fall, grow * torch.exp(end_scaling[m])
    return Carriage(keep, grow, gain, weights, offset)


def _edges(places: Float[Tensor, " k"], span: tuple[float, float]) -> Tensor:
    """The ends of pieces on which statistics are smooth, none longer than _PIECE."""
    a, b = span
    inner = places[(places > a) & (places < b)].tolist()
    edges = [a, *inner, b]
    fine = [np.linspace(c, d, 1 + math.ceil((d - c) / _PIECE))[:-1] for c, d in pairwise(edges)]
    return torch.from_numpy(np.append(np.concatenate(fine), b))


def _up_to(values: Float[Tensor, "m n *event"]) -> Tensor:
    """Integrals from a piece's start to each node, of values times the piece's length."""
    return torch.einsum("in,mn...->mi...", torch.from_numpy(_UP_TO), values)


def _whole(values: Float[Tensor, "m n *event"]) -> Tensor:
    return torch.einsum("n,mn...->m...", torch.from_numpy(_WEIGHTS), values)
