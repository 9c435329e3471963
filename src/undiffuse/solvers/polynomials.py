"""Weights of a multistep method: integrals of polynomials along the flow, in float64, once for each step of a grid.

For a turn phi let `N = alpha cos(phi) + sigma sin(phi)`, `P = cos(phi) E[eps | x] - sin(phi) E[x_0 | x]`. On every
path the probability flow is then

    d (x / N) / dm = P,    m = tan(theta - phi),  theta = atan2(sigma, alpha),

since `dx = alpha' E[x_0] + sigma' E[eps]` and `alpha sigma' - sigma alpha' = (alpha^2 + sigma^2) theta'`. phi = 0 is
the flow written with the noise (m = sigma / alpha; eq. 9.1.6), pi / 2 with the data (m = -alpha / sigma; section 9.5),
pi / 4 with `E[eps] - E[x_0]`, the velocity of the straight path. Where E[x_0] and E[eps] do not change along a step
all of them are DDIM; where they do, what a polynomial is put through differs. Between 0 and pi / 2 nothing is singular
at either end: not where alpha = 0, nor where sigma = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

Coordinate = Callable[[np.ndarray], np.ndarray]

# Gauss and Legendre's rule: exact to rounding on pieces of this length in log m, or of [-1, 1] in m.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_PIECE = 1.5

# What a polynomial may be a function of; "time" and "step" belong to a path and a grid.
COORDINATES: dict[str, Coordinate] = {
    "angle": lambda theta: theta,
    "half-log-snr": lambda theta: -np.log(np.tan(theta)),
    "sigma": np.tan,
    "canonical": lambda theta: np.sin(theta) / (np.sin(theta) + np.cos(theta)),
}


def lagrange(nodes: Sequence[float], points: np.ndarray) -> np.ndarray:
    """Values (nodes, points) of the polynomials that are 1 at one node and 0 at the others."""
    values = np.ones((len(nodes), len(points)))
    for j, node in enumerate(nodes):
        for k, other in enumerate(nodes):
            if k != j:
                values[j] *= (points - other) / (node - other)
    return values


def _quadrature(start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Points psi and weights for integrals over m = tan(psi) from `start` to `end`, both inside (-pi/2, pi/2).

    In m where |m| < 1, in its logarithm beyond, where integrands change with the logarithm.
    """
    low, high = math.tan(end), math.tan(start)
    cuts = [high, *[cut for cut in (1.0, -1.0) if low < cut < high], low]
    points, weights = [], []
    for a, b in pairwise(cuts):
        far = min(a, b) >= 1 or max(a, b) <= -1
        sign = math.copysign(1.0, a + b)
        u, v = (math.log(abs(a)), math.log(abs(b))) if far else (a, b)
        edges = np.linspace(u, v, 1 + (max(1, math.ceil(abs(v - u) / _PIECE)) if far else 1))
        half, middle = 0.5 * np.diff(edges)[:, None], 0.5 * (edges[1:] + edges[:-1])[:, None]
        place = (middle + half * _NODES).ravel()
        m = sign * np.exp(place) if far else place
        points.append(np.arctan(m))
        weights.append((half * _WEIGHTS).ravel() * (m if far else 1.0))
    return np.concatenate(points), np.concatenate(weights)


@lru_cache(maxsize=16384)
def flow_weights(
    phi: float,
    rule: str,
    nodes: tuple[float, ...],
    span: tuple[float, float],
    coordinate: Coordinate,
    places: tuple[float, ...] | None = None,
) -> tuple[float, ...]:
    """Integrals over m from `span[0]` to `span[1]` of the polynomials of `nodes`, the newest first.

    Args:
        phi: the turn.
        rule: "exact"; "midpoint": the polynomial's value in the middle of the step, times its length in m;
            "mean": its mean over the step in its own variable, likewise.
        nodes: angles of past evaluations.
        span: angles of the step's start and end; |angle - phi| < pi / 2.
        coordinate: of an angle, what the polynomials are functions of.
        places: coordinates of the nodes and of the two ends, where they are not functions of the angle.
    """
    start, end = span
    length = math.tan(end - phi) - math.tan(start - phi)
    if len(nodes) == 1:
        return (length,)
    if places is None:
        places = tuple(coordinate(np.array([*nodes, *span])).tolist())
    at, a, b = places[:-2], places[-2], places[-1]
    if rule == "exact":
        psi, weight = _quadrature(start - phi, end - phi)
        return tuple((lagrange(at, coordinate(psi + phi)) @ weight).tolist())
    if rule == "midpoint":
        return tuple((length * lagrange(at, np.array([0.5 * (a + b)]))[:, 0]).tolist())
    return tuple((0.5 * length * lagrange(at, 0.5 * (a + b) + 0.5 * (b - a) * _NODES) @ _WEIGHTS).tolist())


@lru_cache(maxsize=4096)
def time_weights(nodes: tuple[float, ...], span: tuple[float, float]) -> tuple[float, ...]:
    """Integrals over t from `span[0]` to `span[1]` of the polynomials of past times: Adams and Bashforth's weights."""
    half, middle = 0.5 * (span[1] - span[0]), 0.5 * (span[1] + span[0])
    return tuple((half * lagrange(nodes, middle + half * _NODES) @ _WEIGHTS).tolist())


@lru_cache(maxsize=16384)
def snr_weights(kappa: float, rule: str, nodes: tuple[float, ...], span: tuple[float, float]) -> tuple[float, ...]:
    """`integral of kappa e^{kappa (lambda - lambda_s)} l_j d lambda` over a step, of polynomials in the half log-SNR.

    The weights of E[x_0] in the reverse SDE whose noise is eta times the forward one's, kappa = 1 + eta^2.
    """
    start, end = span
    length = -math.expm1(kappa * (start - end))
    if len(nodes) == 1:
        return (length,)
    if rule == "midpoint":
        return tuple((length * lagrange(nodes, np.array([0.5 * (start + end)]))[:, 0]).tolist())
    pieces = np.linspace(start, end, 1 + max(1, math.ceil(kappa * (end - start) / _PIECE)))
    half, middle = 0.5 * np.diff(pieces)[:, None], 0.5 * (pieces[1:] + pieces[:-1])[:, None]
    place = (middle + half * _NODES).ravel()
    weight = (half * _WEIGHTS).ravel() * kappa * np.exp(kappa * (place - end))
    return tuple((lagrange(nodes, place) @ weight).tolist())
