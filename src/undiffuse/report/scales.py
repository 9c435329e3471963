"""Axes: from a value to a place, and the ticks between."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Beyond this ratio of largest to smallest a linear axis presses the small values flat.
LOG_FROM_RATIO = 10.0
# From this many decades on, ticks at whole decades only.
WHOLE_DECADES_FROM = 2.5
# A linear axis starts at zero when that costs no more than this part of its length.
ZERO_WITHIN = 0.5


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] onto [start, stop] pixels, linearly: start + (v - low) / (high - low) (stop - start)."""

    low: float
    high: float
    start: float
    stop: float

    is_log = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (self.warp(value) - self.warp(self.low)) / self._span() * (self.stop - self.start)

    def warp(self, value: float) -> float:
        """The coordinate in which the axis is even."""
        return value

    def ticks(self, about: int = 5) -> list[float]:
        """Round values within [low, high], about so many."""
        step = round_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]

    def _span(self) -> float:
        return self.warp(self.high) - self.warp(self.low)


@dataclass(frozen=True)
class LogScale(Scale):
    """The same in log10; values must be positive."""

    is_log = True

    def warp(self, value: float) -> float:
        return math.log10(value)

    def ticks(self, about: int = 5) -> list[float]:
        """1, 2, 5 of every decade on a short axis, whole decades on a long one."""
        decades = self._span()
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        stride = max(1, math.ceil(decades / about))
        digits = (1, 2, 5) if decades < WHOLE_DECADES_FROM else (1,)
        values = [d * 10.0**e for e in range(first, last + 1, stride) for d in digits]
        slack = 1e-9
        return [v for v in values if self.low * (1 - slack) <= v <= self.high * (1 + slack)]


def round_step(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    slack = 1 + 1e-9
    return next(d * power for d in (1, 2, 5, 10) if d * power * slack >= step)


def fit_scale(values: Iterable[float], start: float, stop: float, *, exact: bool = False, log: bool = True) -> Scale:
    """An axis that holds all finite values: logarithmic where they are positive and span a ratio of 10 or more.

    Args:
        exact: end at the extreme values and stay linear (a time axis), rather than at round ones.
        log: False keeps the axis linear whatever the values.
    """
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if exact and high > low:
        return Scale(low, high, start, stop)
    if log and not exact and low > 0 and high / low >= LOG_FROM_RATIO:
        return LogScale(_round_log(low, up=False), _round_log(high, up=True), start, stop)
    if high == low:
        half = abs(high) / 2 or 0.5
        return Scale(low - half, high + half, start, stop)
    low = 0.0 if 0 < low <= ZERO_WITHIN * high else low
    step = round_step((high - low) / 5)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, stop)


def _round_log(value: float, *, up: bool) -> float:
    """The nearest 1, 2, 5 times a power of ten that is not inside the data."""
    power = 10.0 ** math.floor(math.log10(value))
    slack = 1 + 1e-9
    if up:
        return next(d * power for d in (1, 2, 5, 10) if d * power * slack >= value)
    return next(d * power for d in (10, 5, 2, 1) if d * power <= value * slack)
