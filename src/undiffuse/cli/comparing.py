"""Comparing solvers on a run's model: what to run, the advice, and the files."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undiffuse.cli.console import Console
from undiffuse.cli.drawing import How, Model
from undiffuse.cli.options import parse_solver
from undiffuse.cli.quality import Asked, Quality
from undiffuse.core.errors import choose
from undiffuse.recipes.build import solver as make_solver
from undiffuse.recipes.generate import Sampler
from undiffuse.recipes.run import Run, load_run
from undiffuse.recipes.tuned import STATISTICS, is_optimised, is_tuned
from undiffuse.report.comparison import draw, markdown
from undiffuse.solvers import KERNELS, OWN, SOLVERS, Comparison, Recommendation, Solver, compare
from undiffuse.training.files import disk_errors, replace_file

NOTHING = "Nothing is recommended: no row has an error along the flow, and of no number measured is one end the best."


@dataclass(frozen=True)
class Done:
    """What came of it: the comparison, the advice in a sentence, the record and the files."""

    found: Comparison
    said: str
    record: dict[str, Any]
    files: list[Path]


@dataclass(frozen=True)
class Job:
    """Which solvers and grids (None: the usual ones), in how many calls, on which noises of which run."""

    run: str
    solvers: list[str] | None
    grids: list[str] | None
    calls: list[int]
    n: int = 32
    seed: int = 0
    label: int | None = None
    level: float = 0.01
    asked: Asked | None = None
    ema: str | None = None
    step: int | None = None
    device: str = "auto"

    def run_all(self, out: Path | None, screen: Console) -> Done:
        """Compare, write, advise.

        Raises:
            RunError: the run is an energy or a classifier. ArgumentError: see `ud.compare` and `Quality.of`.
        """
        loaded = load_run(self.run)
        loaded.expect("denoiser")
        settings = loaded.recipe.settings
        solvers = self._solvers(loaded)
        how = How(label=self.label, ema=self.ema, step=self.step, device=self.device)
        model = Model.load(loaded, how)
        quality = None if self.asked is None else Quality.of(self.asked.changed(self.run), how, screen)
        sampler = model.sampler
        assert isinstance(sampler, Sampler)
        seeds = list(range(self.seed, self.seed + self.n))
        screen.say(f"{self.n} noises of {loaded.folder} (step {model.step}, weights {model.ema}), each to its end")
        began = time.monotonic()
        with screen.progress("comparing", "calls") as bar:
            found = compare(
                sampler.bounded,
                sampler.facts.shape,
                solvers,
                self._grids(loaded),
                self.calls,
                n=self.n,
                seed=seeds,
                cond=sampler.cond(seeds),
                noisy=quality is not None,
                progress=lambda done, total, note: bar.to(done, total, note=note),
            )
        if quality is not None:
            found = quality.measure(found, screen)
        advised = advice_of(found, self.level)
        said = "\n".join(in_words(advice, self._line(settings, advice)) for advice in advised) or NOTHING
        made = {"run": str(loaded.folder), "weights": model.ema, "step": model.step, "seeds": f"{seeds[0]}-{seeds[-1]}"}
        made |= {"label": self.label, "threshold": sampler.threshold, "precision": "fp32", "level": self.level}
        made |= {"seconds": round(time.monotonic() - began, 1), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        record = made | found.to_dict() | self._record(settings, advised)
        folder = loaded.folder / "compare" if out is None else out
        lines = [] if quality is None else quality.lines()
        files = write(folder, found, advised, said, record, f"Solvers on {loaded.folder.name}", lines)
        return Done(found, said, record, files)

    def _solvers(self, run: Run) -> dict[str, str | Solver] | None:
        """Solvers by what they were called; None for the usual ones."""
        if self.solvers is None:
            return None
        found: dict[str, str | Solver] = {}
        for text in self.solvers:
            if not is_tuned(text):
                choose(text.partition(":")[0], {**SOLVERS, **KERNELS, STATISTICS: None}, "solver")
            found[text] = text if text in KERNELS else made(text, run)
        return found

    def _grids(self, run: Run) -> dict[str, Any] | None:
        """Grids by what they were called; None for the solvers' own."""
        if self.grids is None:
            return None
        return {name: run.grid(name) if is_optimised(name) else name for name in self.grids}

    def _record(self, settings: Any, advised: list[Recommendation]) -> dict[str, Any]:
        """What is recommended: by the error where there is one, and by the first metric."""
        keys = ("solver", "grid", "steps", "nfe", "median")
        found: dict[str, Any] = {"recommended": None}
        for advice in advised:
            cell = {key: getattr(advice.cell, key) for key in keys}
            if advice.number:
                cell |= {"metric": advice.number, "value": advice.cell.quality[advice.number]}
            told = {"met": advice.met, "command": self._line(settings, advice)} | cell
            found["recommended_by_metric" if advice.number else "recommended"] = told
        return found

    def _line(self, settings: Any, advice: Recommendation) -> str:
        """The command that samples so; `--grid own` where the recipe has another."""
        cell, section = advice.cell, settings.sampling
        words = ["undiffuse", "sample", self.run, "--solver", cell.solver, "--steps", str(cell.steps)]
        if cell.grid != OWN or section.grid is not None:
            words += ["--grid", cell.grid]
        if section.corrector is not None:
            words += ["--corrector", "none"]
        chosen = {"--label": self.label, "--ema": self.ema, "--step": self.step}
        words += [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
        return shlex.join(words)


def made(text: str, run: Run) -> Solver:
    """`edm:S_noise=1`, or what was made for the run, `tuned-8` or `dpm-v3`, as a solver."""
    return make_solver(parse_solver(text, run.recipe.settings, run.folder) or {})


def advice_of(found: Comparison, level: float) -> list[Recommendation]:
    """By the error, unless no row has one; and by the first number of which an end is best. None by neither.

    Raises:
        ArgumentError: every cell failed.
    """
    number = next((name for name in found.numbers if any(found.best(calls, name) for calls in found.calls)), None)
    by_number = [] if number is None else [found.recommend_by(number)]
    exact = any(cell.median is not None for cell in found.cells)
    failed = all(cell.failure for cell in found.cells)
    return ([found.recommend(level)] if exact or failed else []) + by_number


def in_words(advice: Recommendation, line: str) -> str:
    """The advice in a sentence, with the command to follow it."""
    cell = advice.cell
    on = "its own grid" if cell.grid == OWN else f"the grid {cell.grid}"
    what = f"{cell.solver} on {on}, {cell.steps} steps ({cell.nfe} calls)"
    if advice.number:
        value = f"{advice.number} {cell.quality[advice.number]:.4g}"
        within = f"within {100 * advice.level:g} % of the best"
        return f"By {advice.number}, the fewest calls {within}: {what}: {value}.\n  {line}"
    what += f": median error {100 * (cell.median or 0):.2g} %"
    if advice.met:
        return f"Recommended, the fewest calls at or below {100 * advice.level:g} %: {what}.\n  {line}"
    return f"None is at or below {100 * advice.level:g} %; the nearest is {what}. More --calls may.\n  {line}"


def write(
    folder: Path,
    found: Comparison,
    advised: list[Recommendation],
    said: str,
    record: dict[str, Any],
    title: str,
    lines: list[dict[str, Any]],
) -> list[Path]:
    """compare.json, compare.md, compare.png, and compare.jsonl where there are lines, each whole or as it was."""
    contents = {
        "compare.json": json.dumps(record, indent=1, allow_nan=False).encode(),
        "compare.md": markdown(found, title, said).encode(),
        "compare.png": draw(found, advised, title),
    }
    if lines:
        contents["compare.jsonl"] = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    with disk_errors(str(folder), "Older files are intact"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            replace_file(folder / name, content)
    return [folder / name for name in contents]
