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

import numpy as np

Coordinate = Callable[[np.ndarray], np.ndarray]

# Gauss and Legendre's rule: exact to rounding on pieces of this length in the half log-SNR; beyond FAR in the angle.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_PIECE, _FAR = 1.5, 6.0
_QUARTER = 0.5 * math.pi

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


def _quadrature(phi: float, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Angles and weights for integrals over `m = tan(theta - phi)` between two angles in [0, pi/2].

    In pieces of the half log-SNR, with which everything here changes, and in the angle itself where that is infinite.
    """
    low = -_FAR if start == _QUARTER else -math.log(math.tan(start))
    high = _FAR if end == 0 else -math.log(math.tan(end))
    edges = np.linspace(low, high, 1 + max(1, math.ceil(abs(high - low) / _PIECE)))
    half, middle = 0.5 * np.diff(edges)[:, None], 0.5 * (edges[1:] + edges[:-1])[:, None]
    theta = np.arctan(np.exp(-(middle + half * _NODES).ravel()))
    points, weights = [theta], [-(half * _WEIGHTS).ravel() * np.sin(theta) * np.cos(theta)]
    first, last = (math.atan(math.exp(-place)) for place in (low, high))
    outer = [(start, first)] * (start == _QUARTER) + [(last, end)] * (end == 0)
    for a, b in outer:
        points.append(0.5 * (a + b) + 0.5 * (b - a) * _NODES)
        weights.append(0.5 * (b - a) * _WEIGHTS)
    theta = np.concatenate(points)
    return theta, np.concatenate(weights) / np.cos(theta - phi) ** 2


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
        theta, weight = _quadrature(phi, start, end)
        return tuple((lagrange(at, coordinate(theta)) @ weight).tolist())
    if rule == "midpoint":
        return tuple((length * lagrange(at, np.array([0.5 * (a + b)]))[:, 0]).tolist())
    return tuple((0.5 * length * lagrange(at, 0.5 * (a + b) + 0.5 * (b - a) * _NODES) @ _WEIGHTS).tolist())


@lru_cache(maxsize=4096)
def time_weights(nodes: tuple[float, ...], span: tuple[float, float]) -> tuple[float, ...]:
    """Integrals over t from `span[0]` to `span[1]` of the polynomials of past times: Adams and Bashforth's weights."""
    half, middle = 0.5 * (span[1] - span[0]), 0.5 * (span[1] + span[0])
    return tuple((half * lagrange(nodes, middle + half * _NODES) @ _WEIGHTS).tolist())


def snr_weights(kappa: float, nodes: tuple[float, ...], span: tuple[float, float]) -> tuple[float, ...]:
    """`integral of kappa e^{kappa (lambda - lambda_s)} l_j d lambda` over a span, of polynomials in the half log-SNR.

    The weights of E[x_0] in the reverse SDE whose noise is eta times the forward one's, kappa = 1 + eta^2.
    """
    start, end = span
    if len(nodes) == 1:
        return (-math.expm1(kappa * (start - end)),)
    pieces = np.linspace(start, end, 1 + max(1, math.ceil(kappa * (end - start) / _PIECE)))
    half, middle = 0.5 * np.diff(pieces)[:, None], 0.5 * (pieces[1:] + pieces[:-1])[:, None]
    place = (middle + half * _NODES).ravel()
    weight = (half * _WEIGHTS).ravel() * kappa * np.exp(kappa * (place - end))
    return tuple((lagrange(nodes, place) @ weight).tolist())
