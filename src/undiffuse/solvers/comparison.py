"""Errors and quality by solver, grid and number of calls, as values: best, recommended, to JSON and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from undiffuse.core.errors import ArgumentError, UndiffuseError


@dataclass(frozen=True)
class Cell:
    """One solver on one grid, within one number of calls.

    Attributes:
        solver, grid: names; "own" is `Solver.default_grid`.
        calls: network calls allowed.
        steps, nfe: the most steps that keep within them, and the calls these take; 0 where not one step does.
        error: `RMS(x - truth) / RMS(truth)` over all samples; None where it failed.
        median: of the samples' own `RMS(x - truth)`, over the same.
        failure: why there is no sample; "" where there is one. Of a solver that draws noise there is no error either.
        quality: numbers of its samples by name, of the metrics that were asked for.
    """

    solver: str
    grid: str
    calls: int
    steps: int
    nfe: int
    error: float | None
    median: float | None
    failure: str = ""
    quality: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recommendation:
    """The cell to sample with, the level that was asked for, and whether it is `met`.

    `number` is the metric that it goes by; "" is the median error.
    """

    cell: Cell
    level: float
    met: bool
    number: str = ""


@dataclass(frozen=True)
class Judged:
    """How the samples of all cells were measured.

    Attributes:
        n: samples in each cell, of the same seeds in all.
        against: what they were compared with, in words.
        better: of each number, whether the "least" or the "most" is best; None where neither is.
        beside: the same numbers of other sets, such as held-out data, by the set's name.
    """

    n: int
    against: str
    better: dict[str, str | None]
    beside: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Errors by solver, grid and calls, and what they were measured against.

    Attributes:
        cells: row by row, each with all numbers of calls.
        path, shape, n: of the denoiser, of a sample, and how many.
        size: RMS of the truth, the unit of all errors; None where all solvers draw noise, and there is no truth.
        truth: how it was found, in words.
        truth_error: its distance from what another method makes of some of the noises, in the same unit.
        judged: of `Cell.quality`, where that was measured.
    """

    cells: tuple[Cell, ...]
    path: str
    shape: tuple[int, ...]
    n: int
    size: float | None
    truth: str
    truth_error: float | None
    judged: Judged | None = None

    @property
    def calls(self) -> list[int]:
        """The columns, ascending."""
        return sorted({cell.calls for cell in self.cells})

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Solver and grid of each row, in order."""
        return list(dict.fromkeys((cell.solver, cell.grid) for cell in self.cells))

    def cell(self, solver: str, grid: str, calls: int) -> Cell:
        """One cell.

        Raises:
            ArgumentError: it was not measured.
        """
        for cell in self.cells:
            if (cell.solver, cell.grid, cell.calls) == (solver, grid, calls):
                return cell
        raise ArgumentError(f"'{solver}' on '{grid}' within {calls} calls was not compared: see `rows` and `calls`")

    @property
    def numbers(self) -> list[str]:
        """Names of what was measured of the samples, in order."""
        return [] if self.judged is None else list(self.judged.better)

    def best(self, calls: int, number: str = "") -> Cell | None:
        """The cell of the least median error within that many calls, or of the best number; None where there is none.

        Where neither the least nor the most is best there is none either.
        """
        found = [cell for cell in self.cells if cell.calls == calls]
        if not number:
            return min((cell for cell in found if cell.median is not None), key=_median, default=None)
        sign = self._sign(number)
        found = [cell for cell in found if number in cell.quality]
        return min(found, key=lambda cell: sign * cell.quality[number], default=None) if sign else None

    def judge(self, judged: Judged, measure: Callable[[Cell], Mapping[str, float]]) -> Comparison:
        """With what `measure` says of every cell that has not failed; where it fails, that cell has."""

        def with_quality(cell: Cell) -> Cell:
            if cell.failure:
                return cell
            try:
                return replace(cell, quality=dict(measure(cell)))
            except UndiffuseError as failed:
                return replace(cell, failure=str(failed))

        return replace(self, cells=tuple(with_quality(cell) for cell in self.cells), judged=judged)

    def recommend(self, level: float = 0.01) -> Recommendation:
        """The fewest calls whose median error is at most `level`, of these the least error; else the least of all.

        Raises:
            ArgumentError: level not above 0, or nothing to recommend: every cell failed.
        """
        if not 0 < level < math.inf:
            raise ArgumentError(f"error level {level}: expected a number above 0, for example 0.01 of the data's RMS")
        whole = [cell for cell in self.cells if cell.median is not None]
        if not whole:
            raise ArgumentError(f"every solver failed, nothing can be recommended; the first: {self.cells[0].failure}")
        good = [cell for cell in whole if _median(cell) <= level]
        if good:
            return Recommendation(min(good, key=lambda cell: (cell.nfe, _median(cell))), level, True)
        return Recommendation(min(whole, key=_median), level, False)

    def recommend_by(self, number: str, within: float = 0.05) -> Recommendation:
        """The fewest calls whose number is within that share of the best of all, of these the best.

        Raises:
            ArgumentError: within below 0, a number that was not measured, or one of which none is best.
        """
        if not 0 <= within < math.inf:
            raise ArgumentError(f"within is {within}: expected a share of at least 0, for example 0.05")
        sign = self._sign(number)
        found = [cell for cell in self.cells if number in cell.quality]
        if not sign or not found:
            raise ArgumentError(f"'{number}' recommends nothing: it was measured of no cell, or neither end is best")
        best = min(sign * cell.quality[number] for cell in found)
        good = [cell for cell in found if sign * cell.quality[number] <= best + within * abs(best)]
        return Recommendation(min(good, key=lambda c: (c.nfe, sign * c.quality[number])), within, True, number)

    def _sign(self, number: str) -> int:
        """What makes the least of a number the best; 0 where neither end is."""
        better = {} if self.judged is None else self.judged.better
        if number not in better:
            raise ArgumentError(f"'{number}' was not measured: {', '.join(better) or 'nothing was'}")
        return {"least": 1, "most": -1, None: 0}[better[number]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"shape": list(self.shape), "cells": [asdict(cell) for cell in self.cells]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Comparison:
        """The inverse of `to_dict`; other keys are left out."""
        values = {name: record[name] for name in cls.__dataclass_fields__ if name != "judged"}
        cells = tuple(Cell(**cell) for cell in record["cells"])
        judged = None if record.get("judged") is None else Judged(**record["judged"])
        return cls(**values | {"cells": cells, "shape": tuple(record["shape"]), "judged": judged})


def _median(cell: Cell) -> float:
    return math.inf if cell.median is None else cell.median
