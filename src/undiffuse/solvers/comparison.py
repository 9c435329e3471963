"""Errors by solver, grid and number of calls, as values: best, recommended, to JSON and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from undiffuse.core.errors import ArgumentError


@dataclass(frozen=True)
class Cell:
    """One solver on one grid, within one number of calls.

    Attributes:
        solver, grid: names; "own" is `Solver.default_grid`.
        calls: network calls allowed.
        steps, nfe: the most steps that keep within them, and the calls these take; 0 where not one step does.
        error: `RMS(x - truth) / RMS(truth)` over all samples; None where it failed.
        median: of the samples' own `RMS(x - truth)`, over the same.
        failure: why there is no error; "" where there is one.
    """

    solver: str
    grid: str
    calls: int
    steps: int
    nfe: int
    error: float | None
    median: float | None
    failure: str = ""


@dataclass(frozen=True)
class Recommendation:
    """The cell to sample with, the level of its median error that was asked for, and whether it is `met`."""

    cell: Cell
    level: float
    met: bool


@dataclass(frozen=True)
class Comparison:
    """Errors by solver, grid and calls, and what they were measured against.

    Attributes:
        cells: row by row, each with all numbers of calls.
        path, shape, n: of the denoiser, of a sample, and how many.
        size: RMS of the truth, the unit of all errors.
        truth: how it was found, in words.
        truth_error: its distance from what another method makes of some of the noises, in the same unit.
    """

    cells: tuple[Cell, ...]
    path: str
    shape: tuple[int, ...]
    n: int
    size: float
    truth: str
    truth_error: float

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

    def best(self, calls: int) -> Cell | None:
        """The cell of the least median error within that many calls; None where all failed."""
        found = [cell for cell in self.cells if cell.calls == calls and cell.median is not None]
        return min(found, key=_median, default=None)

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"shape": list(self.shape), "cells": [asdict(cell) for cell in self.cells]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Comparison:
        """The inverse of `to_dict`; other keys are left out."""
        values = {name: record[name] for name in cls.__dataclass_fields__}
        cells = tuple(Cell(**cell) for cell in record["cells"])
        return cls(**values | {"cells": cells, "shape": tuple(record["shape"])})


def _median(cell: Cell) -> float:
    return math.inf if cell.median is None else cell.median
