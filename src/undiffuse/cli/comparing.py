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
from undiffuse.core.errors import choose
from undiffuse.recipes.build import solver as make_solver
from undiffuse.recipes.generate import Sampler
from undiffuse.recipes.run import load_run
from undiffuse.recipes.tuned import STATISTICS
from undiffuse.report.comparison import draw, markdown
from undiffuse.solvers import KERNELS, OWN, SOLVERS, Comparison, Recommendation, Solver, compare
from undiffuse.training.files import disk_errors, replace_file


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
    ema: str | None = None
    step: int | None = None
    device: str = "auto"

    def run_all(self, out: Path | None, screen: Console) -> Done:
        """Compare, write, advise.

        Raises:
            RunError: the run is an energy or a classifier. ArgumentError: see `ud.compare`.
        """
        loaded = load_run(self.run)
        loaded.expect("denoiser")
        solvers = self._solvers(loaded.recipe.settings, loaded.folder)
        model = Model.load(loaded, How(label=self.label, ema=self.ema, step=self.step, device=self.device))
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
                self.grids,
                self.calls,
                n=self.n,
                seed=seeds,
                cond=sampler.cond(seeds),
                progress=lambda done, total, note: bar.to(done, total, note=note),
            )
        advice = found.recommend(self.level)
        said = in_words(advice, self._line(loaded.recipe.settings, advice))
        made = {"run": str(loaded.folder), "weights": model.ema, "step": model.step, "seeds": f"{seeds[0]}-{seeds[-1]}"}
        made |= {"label": self.label, "threshold": sampler.threshold, "precision": "fp32", "level": self.level}
        made |= {"seconds": round(time.monotonic() - began, 1), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        chosen = {"recommended": {"met": advice.met, "command": self._line(loaded.recipe.settings, advice)}}
        chosen["recommended"] |= {
            key: getattr(advice.cell, key) for key in ("solver", "grid", "steps", "nfe", "median")
        }
        record = made | found.to_dict() | chosen
        folder = loaded.folder / "compare" if out is None else out
        return Done(found, said, record, write(folder, found, advice, said, record, f"Solvers on {loaded.folder.name}"))

    def _solvers(self, settings: Any, folder: Path) -> dict[str, str | Solver] | None:
        """Solvers by what they were called; None for the usual ones."""
        if self.solvers is None:
            return None
        for text in self.solvers:
            choose(text.partition(":")[0], {**SOLVERS, **KERNELS, STATISTICS: None}, "solver")
        return {text: text if text in KERNELS else made(text, settings, folder) for text in self.solvers}

    def _line(self, settings: Any, advice: Recommendation) -> str:
        """The command that samples so; `--grid own` where the recipe has another."""
        cell, section = advice.cell, settings.sampling
        words = ["undiffuse", "sample", self.run, "--solver", cell.solver, "--steps", str(cell.steps)]
        if cell.grid != OWN or section.grid is not None:
            words += ["--grid", cell.grid]
        if section.corrector is not None:
            words += ["--corrector", "none"]
        return shlex.join(words)


def made(text: str, settings: Any, folder: Path) -> Solver:
    """`edm:S_noise=1` as a solver; "dpm-v3" by the statistics in a run's folder."""
    return make_solver(parse_solver(text, settings, folder) or {})


def in_words(advice: Recommendation, line: str) -> str:
    """The advice in a sentence, with the command to follow it."""
    cell = advice.cell
    on = "its own grid" if cell.grid == OWN else f"the grid {cell.grid}"
    what = (
        f"{cell.solver} on {on}, {cell.steps} steps ({cell.nfe} calls): median error {100 * (cell.median or 0):.2g} %"
    )
    if advice.met:
        return f"Recommended, the fewest calls at or below {100 * advice.level:g} %: {what}.\n  {line}"
    return f"None is at or below {100 * advice.level:g} %; the nearest is {what}. More --calls may.\n  {line}"


def write(
    folder: Path, found: Comparison, advice: Recommendation, said: str, record: dict[str, Any], title: str
) -> list[Path]:
    """compare.json, compare.md and compare.png, each whole or as it was."""
    contents = {
        "compare.json": json.dumps(record, indent=1, allow_nan=False).encode(),
        "compare.md": markdown(found, title, said).encode(),
        "compare.png": draw(found, advice, title),
    }
    with disk_errors(str(folder), "Older files are intact"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            replace_file(folder / name, content)
    return [folder / name for name in contents]
