"""Adaptive integration in which every sample has a step, an error and an end of its own.

A sample's result and cost do not depend on who shares its batch. The control is that of Hairer, Norsett and Wanner
(1993, section II.4): a step is accepted where the root mean square of `error / (atol + rtol max(|y|, |y_new|))` is
below 1, and the next is `0.9 error^(-1/q)` times as long, q the order, at most 10 times and at least 0.2 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.solvers.pairs import Pair
from undiffuse.solvers.solution import Solution, Track, Tried

Rows = Float[Tensor, "n d"]
# (positions (n,), states (n, D), which samples they are (n,)) -> dy / dposition (n, D)
Slope = Callable[[Tensor, Tensor, Tensor], Tensor]
# (positions (n,), states (n, D), slopes there (n, D), errors of the steps to there (n, D)) -> sizes of these (n,)
Measure = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
# Exponents, times the order, of a step's error and of the one before: of 0.6 to 1 and 0 to 0.4 those that reached 1e-4
# nats in the fewest evaluations, on a mixture of 8 in the plane.
_STEADY, _LEAST = (0.7, 0.3), 1e-4


@dataclass(frozen=True)
class Tolerance:
    """What error a step may make.

    Args:
        rtol, atol: relative to the state, and in its units.
        parts: sizes of the parts of a state that keep the tolerance each by itself; None: it is one.
        max_steps: tried steps per sample, after which the integration is given up.
        length: measure a part by its length, not by its root mean square, which is sqrt(D) times less.
        also: another measure of a step's error, which too must be below 1: of what it does to something else.
        steady: the next step is `0.9 e^(-0.7/q) e_before^(0.3/q)` times as long, e_before the error of the accepted one
            before (a PI controller, Gustafsson 1991): fewer are rejected, and errors are more alike.

    Raises:
        ArgumentError: a tolerance below 0, both 0, or max_steps < 1.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    parts: Sequence[int] | None = None
    max_steps: int = 10_000
    length: bool = False
    also: Measure | None = None
    steady: bool = False

    def __post_init__(self):
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0 and self.max_steps >= 1):
            raise ArgumentError(
                f"rtol is {self.rtol}, atol {self.atol}, max_steps {self.max_steps}: expected tolerances >= 0, one of "
                "them above, and at least one step"
            )

    def norm(self, value: Rows, size: Rows) -> Float[Tensor, " n"]:
        """Root mean square, or length, of `value / (atol + rtol size)`, of the worst part."""
        scaled = (value / (self.atol + self.rtol * size)).square()
        parts = scaled.split(list(self.parts), 1) if self.parts is not None else [scaled]
        squares = [part.sum(1) if self.length else part.mean(1) for part in parts]
        return (torch.stack(squares).amax(0) if len(squares) > 1 else squares[0]).sqrt().double()


@dataclass
class _Active:
    """The samples still on their way."""

    rows: Tensor
    position: Tensor
    y: Tensor
    slope: Tensor
    step: Tensor
    rejected_last: Tensor
    error: Tensor  # of the last accepted step, 1 before the first

    def only(self, keep: Tensor) -> _Active:
        return _Active(*(value[keep] for value in vars(self).values()))


def solve(
    slope: Slope,
    y: Rows,
    start: float,
    end: float,
    pair: Pair,
    tolerance: Tolerance,
    *,
    first: tuple[Tensor | None, Tensor] | None = None,
    keep: bool = False,
    describe: Callable[[float], str] = "position {:.6g}".format,
) -> Solution:
    """`dy / dposition = slope` from start to end, every sample with steps of its own.

    Where gradients are enabled they flow through the accepted steps; the lengths of these are constants.

    Args:
        slope: see `Slope`; called for the samples that are still on their way.
        y: states at the start, (B, D).
        start, end: positions; end may be the smaller.
        pair: how a step is made.
        tolerance: see there.
        first: (slope at the start (B, D) or None, step to try first (B,)) where they are known from before.
        keep: keep all accepted steps, for `Solution.at`.
        describe: a position in words, for errors.

    Raises:
        SamplingError: the tolerance cannot be met; says how many samples, how far they came, and what to do.
    """
    b = len(y)
    steps, rejected = torch.zeros(2, b, dtype=torch.int64, device=y.device)
    done: list[_Active] = []
    tried: list[Tried] = []
    ahead = 1.0 if end >= start else -1.0
    active = _begin(slope, y, start, end, pair, tolerance, first)
    asked = 2 if first is None else int(first[0] is None)
    if start == end:
        done, active = [active], active.only(torch.zeros(b, dtype=torch.bool, device=y.device))
    for tries in range(tolerance.max_steps + 1):
        if len(active.rows) == 0:
            break
        if tries == tolerance.max_steps:
            _give_up(active, b, tolerance, f"{tolerance.max_steps:,} steps were tried", describe)
        rows = active.rows
        active, accepted, step = _try_step(slope, active, end, ahead, pair, tolerance, keep)
        steps[rows] += accepted
        rejected[rows] += ~accepted
        tried += [] if step is None else [step]
        finished = active.position == end
        if bool(finished.any()):
            done.append(active.only(finished))
            active = active.only(~finished)
        elif bool((~(active.step > 16 * torch.finfo(torch.float64).eps * active.position.abs())).any()):
            _give_up(active, b, tolerance, "the steps fell below rounding", describe)
    order = torch.argsort(torch.cat([part.rows for part in done]))
    y, k, step = (torch.cat([getattr(part, name) for part in done])[order] for name in ("y", "slope", "step"))
    evals = asked + (steps + rejected) * (pair.stages - 1)
    return Solution(y, k, step, evals, steps, rejected, Track.of(tried, pair) if tried else None)


def _begin(
    slope: Slope, y: Rows, start: float, end: float, pair: Pair, tolerance: Tolerance, first: tuple | None
) -> _Active:
    rows = torch.arange(len(y), device=y.device)
    position = torch.full(y.shape[:1], start, dtype=torch.float64, device=y.device)
    known, step = first or (None, None)
    k = slope(position, y, rows) if known is None else known
    bad = (~torch.isfinite(k)).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise SamplingError(
            f"the slope is infinite or NaN at the start in {len(bad)} of {len(y)} samples (first: {bad[0]}): check the "
            "weights, the condition and the start"
        )
    if step is None:
        step = _first_step(slope, y, k, position, end, rows, pair, tolerance)
    return _Active(rows, position, y, k, step, torch.zeros_like(rows, dtype=torch.bool), torch.ones_like(step))


@torch.no_grad()
def _first_step(
    slope: Slope, y: Rows, k: Rows, position: Tensor, end: float, rows: Tensor, pair: Pair, tolerance: Tolerance
) -> Float[Tensor, " n"]:
    """Hairer, Norsett and Wanner 1993, section II.4: from the sizes of y, y' and, by a small step of Euler's, y''."""
    span = (end - position).abs()
    size = y.abs()
    d0, d1 = tolerance.norm(y, size), tolerance.norm(k, size)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1).minimum(span)
    way = torch.copysign(h0, end - position)
    k1 = slope(position + way, y + way[:, None].to(y) * k, rows)
    d2 = tolerance.norm(k1 - k, size) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** (1 / pair.order))
    return torch.minimum(torch.minimum(100 * h0, h1), span)


def _try_step(
    slope: Slope, now: _Active, end: float, ahead: float, pair: Pair, tolerance: Tolerance, keep: bool
) -> tuple[_Active, Tensor, Tried | None]:
    """One step of every sample on its way, taken where its error allows; which were; and what is kept of it."""
    left = (end - now.position).abs()
    last = now.step >= left * (1 - 1e-12)
    h = torch.where(last, left, now.step)
    way = ahead * h
    signed = way[:, None].to(now.y)
    slopes = [now.slope]
    y = now.y
    for row, c in zip(pair.a, pair.c[1:]):
        y = torch.addcmul(now.y, signed, _combined(row, slopes))
        slopes.append(slope(torch.add(now.position, way, alpha=c), y, now.rows))
    with torch.no_grad():
        miss = signed * _combined(pair.e, slopes)
        error = tolerance.norm(miss, torch.maximum(now.y.abs(), y.abs()))
        if tolerance.also is not None:
            error = torch.maximum(error, tolerance.also(now.position + way, y, slopes[-1], miss).double())
    accepted = error < 1  # not where it is NaN
    share, before = _STEADY if tolerance.steady else (1.0, 0.0)
    factor = _SAFETY * error ** (-share / pair.order) * now.error ** (before / pair.order)
    factor = factor.nan_to_num(nan=_SHRINK).clamp(_SHRINK, _GROW)
    factor = torch.where(accepted, torch.where(now.rejected_last, factor.clamp(max=1), factor), factor)
    step = h * factor
    # A step that was cut at the end says nothing against the longer one that was planned.
    step = torch.where(accepted & last, torch.maximum(step, now.step), step)
    position = torch.where(accepted, torch.where(last, end, now.position + way), now.position)
    tried = None
    if keep:
        tried = Tried(now.rows, now.position, way, now.y, torch.stack(slopes), accepted)
    taken = accepted[:, None]
    moved = _Active(
        now.rows,
        position,
        torch.where(taken, y, now.y),
        torch.where(taken, slopes[-1], now.slope),
        step,
        ~accepted,
        torch.where(accepted, error.clamp(min=_LEAST), now.error),
    )
    return moved, accepted, tried


def _combined(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """`sum_j w_j k_j`, weights of zero left out."""
    used = [(w, k) for w, k in zip(weights, slopes) if w != 0]
    total = used[0][1] * used[0][0]
    for w, k in used[1:]:
        total = torch.add(total, k, alpha=w)
    return total


def _give_up(active: _Active, b: int, tolerance: Tolerance, why: str, describe: Callable[[float], str]) -> None:
    worst = int(active.step.argmin())
    raise SamplingError(
        f"rtol = {tolerance.rtol:g}, atol = {tolerance.atol:g} cannot be met: {why} for {len(active.rows)} of {b} "
        f"samples; sample {int(active.rows[worst])} came to {describe(float(active.position[worst]))} with steps of "
        f"{float(active.step[worst]):.3g}. Try larger tolerances, the state in float64, or a fixed grid; a field that "
        "is not smooth (dropout, rounding in 16 bits) allows no small ones"
    )
