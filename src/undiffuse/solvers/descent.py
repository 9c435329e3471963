"""Quasi-Newton descent for a few hundred numbers whose function is dear, and not finite everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

Point = Float[Tensor, " n"]
# (z) -> (value, gradient); the gradient is not looked at where the value is not finite.
Slope = Callable[[Point], tuple[float, Point]]

# Armijo's condition, and how much shorter the next step tried is.
_ENOUGH, _SHORTER = 1e-4, 0.4
_TRIES = 20
# Directions that hardly vary, relative to the mean square: not to be leaned on.
_FAINT = 1e-6


def descend(slope: Slope, z: Point, first: float = 0.05, longest: float = 0.5, memory: int = 60) -> Iterator:
    """Yields `(z, value)` after each step, the start among them, until no step lowers the value.

    L-BFGS (Nocedal and Wright 2006, algorithm 7.4) with steps made shorter until the value falls enough (algorithm
    3.1); a value that is not finite is no fall.

    Args:
        slope: the function.
        z: where to start, float64.
        first: length of the first step, and of each after the memory was emptied.
        longest: at most so much is added to an entry of z in a step.
        memory: pairs of steps and changes of the gradient that make the curvature.
    """
    pairs: list[tuple[Point, Point]] = []
    value, gradient = slope(z)
    yield z, value
    while math.isfinite(value):
        step = _direction(gradient, pairs, first)
        if float(step @ gradient) >= 0:
            pairs = []
            step = _direction(gradient, pairs, first)
        step = step * min(1.0, longest / max(float(step.abs().max()), 1e-300))
        found = _shortened(slope, z, value, step, float(step @ gradient))
        if found is None:
            if not pairs:
                return
            pairs = []
            continue
        moved, value, new = found
        s, y = moved - z, new - gradient
        if float(s @ y) > 1e-10 * float(s.norm() * y.norm()):
            pairs = [*pairs, (s, y)][-memory:]
        z, gradient = moved, new
        yield z, value


def _direction(gradient: Point, pairs: list[tuple[Point, Point]], first: float) -> Point:
    """Minus the inverse Hessian that the pairs imply, times the gradient."""
    if not pairs:
        return -gradient * min(1.0, first / max(float(gradient.norm()), 1e-300))
    step, shares = -gradient, []
    for s, y in reversed(pairs):
        shares.append(float(s @ step) / float(s @ y))
        step = step - shares[-1] * y
    s, y = pairs[-1]
    step = step * (float(s @ y) / float(y @ y))
    for (s, y), share in zip(pairs, reversed(shares)):
        step = step + (share - float(y @ step) / float(s @ y)) * s
    return step


def _shortened(slope: Slope, z: Point, value: float, step: Point, fall: float) -> tuple[Point, float, Point] | None:
    """`(z, value, gradient)` of the longest step that falls enough."""
    length = 1.0
    for _ in range(_TRIES):
        there = z + length * step
        now, gradient = slope(there)
        if now < value and now <= value + _ENOUGH * length * fall:
            return there, now, gradient
        length *= _SHORTER
    return None


def whitening(gram: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """T with `T^T gram T` = 1, but for directions that are faint."""
    faint = _FAINT * gram.trace() / len(gram)
    lower = torch.linalg.cholesky(gram + faint * torch.eye(len(gram), dtype=gram.dtype))
    return torch.linalg.inv(lower).T
