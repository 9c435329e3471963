"""Quality of solvers on a run: its metrics on the samples of each cell of a comparison, all of the same seeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from undiffuse.cli.console import Console
from undiffuse.cli.drawing import How, Model
from undiffuse.cli.measuring import Against, Figure, load_changed, protocol_of
from undiffuse.cli.options import parse_solver
from undiffuse.metrics import BETTER, Result
from undiffuse.recipes.generate import Sampler
from undiffuse.recipes.run import Run
from undiffuse.recipes.tuned import grid_in_folder, is_optimised
from undiffuse.solvers import OWN, Cell, Comparison, Judged

RECIPE = "recipe"
KEYS = ("denoise", "threshold")


@dataclass(frozen=True)
class Asked:
    """Which metrics (by comma; "recipe": those of `evaluation`), of how many samples (None: as there)."""

    metrics: str = RECIPE
    n: int | None = None

    def changed(self, run: str) -> Run:
        """The run with an `evaluation` that says so.

        Raises:
            RecipeError: an unknown metric, with the nearest; fewer than 2 samples.
        """
        changes = [] if self.metrics == RECIPE else [f"evaluation.metrics=[{self.metrics}]"]
        return load_changed(run, changes + ([] if self.n is None else [f"evaluation.n={self.n}"]), ["evaluation."])


@dataclass(frozen=True)
class Quality:
    """Measures cells as `undiffuse evaluate` would: seeds, split, precision and last denoising are of `evaluation`.

    The recipe's corrector, which belongs to its solver, is left out.
    """

    model: Model
    against: Against
    beside: dict[str, dict[str, float]]
    found: dict[tuple[str, str, int], dict[str, Result]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, how: How, screen: Console) -> Quality:
        """Loads all data, and measures what the figures are read against, so that what can refuse does so first.

        Raises:
            ArgumentError: too few samples for a metric, or none that fits these data.
        """
        section = run.recipe.settings.evaluation
        changes = {key: getattr(section, key) for key in KEYS if getattr(section, key) is not None}
        model = Model.load(run, how, changes)
        assert isinstance(model.sampler, Sampler)
        model = replace(model, sampler=replace(model.sampler, corrector=None))
        against = Against.of(run.recipe, None, screen)
        protocol = protocol_of(model, section.n, f"{section.seed}-{section.seed + section.n - 1}", against.reference)
        beside = {}
        for name, (x, labels) in against.sets(section.n).items():
            results = against.measure(x, labels, protocol, None if beside else screen)
            beside[name] = {key: result.value for key, result in results.items()}
        return cls(model, against, beside)

    @property
    def seeds(self) -> np.ndarray:
        """Of the samples in every cell."""
        section = self.model.run.recipe.settings.evaluation
        return np.arange(section.seed, section.seed + section.n, dtype=np.int64)

    @property
    def judged(self) -> Judged:
        """How all cells are measured."""
        n, reference, sampler = len(self.seeds), self.against.reference, self.model.sampler
        assert isinstance(sampler, Sampler)
        last = ", each denoised by one more call" if sampler.denoise else ""
        words = f"{len(reference.x):,} of {reference.name} ({reference.split}), drawn in {sampler.precision}{last}"
        numbers = next(iter(self.beside.values()))
        return Judged(n, words, {name: BETTER[name] for name in numbers}, self.beside)

    def of_cell(self, cell: Cell, solver: dict[str, Any], on_batch: Callable[[int], Any]) -> dict[str, float]:
        """Its numbers; drawn once where more calls allow no more steps."""
        key = (cell.solver, cell.grid, cell.steps)
        if key not in self.found:
            model = self._for(cell, solver)
            seeds = self.seeds.tolist()
            x = model.sampler(seeds, on_batch=on_batch)
            protocol = protocol_of(model, len(x), f"{seeds[0]}-{seeds[-1]}", self.against.reference)
            self.found[key] = self.against.measure(x, model.sampler.labels(seeds), protocol)
        on_batch(len(self.seeds))
        return {name: result.value for name, result in self.found[key].items()}

    def _for(self, cell: Cell, solver: dict[str, Any]) -> Model:
        grid, times = None if cell.grid == OWN else cell.grid, None
        if is_optimised(cell.grid):
            found, seal = grid_in_folder(cell.grid, self.model.run.folder)
            grid, times = f"{cell.grid} ({seal})", found.times
        sampler: Any = self.model.sampler
        changed = replace(sampler, solver=solver, steps=cell.steps, grid=grid, times=times)
        return replace(self.model, sampler=changed)

    def measure(self, found: Comparison, screen: Console) -> Comparison:
        """The comparison with the numbers of every cell that has not failed."""
        run, n = self.model.run, len(self.seeds)
        choices = {
            name: parse_solver(name, run.recipe.settings, run.folder) or {} for name in {c.solver for c in found.cells}
        }
        total, done = n * sum(not cell.failure for cell in found.cells), 0
        with screen.progress("measuring samples", "samples") as bar:

            def judge(cell: Cell) -> dict[str, float]:
                nonlocal done
                before, done = done, done + n
                note = f"{cell.solver}, {cell.calls} calls"
                return self.of_cell(cell, choices[cell.solver], lambda now: bar.to(before + now, total, note=note))

            return found.judge(self.judged, judge)

    def lines(self) -> list[dict[str, Any]]:
        """Every number with its protocol, as `evaluate` records it."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return [
            Figure(result, {name: other[key] for name, other in self.beside.items() if key in other}, "", now).to_dict()
            for results in self.found.values()
            for key, result in results.items()
        ]
