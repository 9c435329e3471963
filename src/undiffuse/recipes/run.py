"""Run folders: making one by training, and reading what one holds."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError, RecipeError, RunError, nearest
from undiffuse.fields import NetworkClassifier, NetworkDenoiser
from undiffuse.fields.energy import NetworkEnergy
from undiffuse.recipes import build
from undiffuse.recipes.devices import pick_device
from undiffuse.recipes.load import load_recipe
from undiffuse.recipes.recipe import Recipe
from undiffuse.recipes.schema import FactsSection
from undiffuse.recipes.tuned import IN_FOLDER, STATISTICS, grid_in_folder, in_folder
from undiffuse.solvers import Solver
from undiffuse.training import Checkpoint, TrainResult, list_checkpoints, load_checkpoint, rebuild
from undiffuse.training.state import restore_module

RUNS = Path("runs")
# What a run trained, in words, and what to do with it.
USES = {
    "denoiser": (
        "a denoiser",
        "use run.denoiser(); its score at one time, as of an energy, is undiffuse.fields.energy.DenoiserAt",
    ),
    "energy": ("an energy", "use run.energy(), or draw from it: undiffuse sample {folder} (or evaluate, report)"),
    "classifier": (
        "a classifier",
        "use run.classifier(), or guide the samples of a denoiser by it: undiffuse sample RUN --classifier {folder} "
        "(undiffuse evaluate {folder} measures it)",
    ),
}
_STAMPED = re.compile(r"(?P<name>.+)-(?P<stamp>\d{8}-\d{6})(?:-(?P<count>\d+))?")


def new_run_folder(name: str, runs: Path = RUNS) -> Path:
    """`runs/NAME-YYYYmmdd-HHMMSS`, with a number behind it where that is taken."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, count = runs / stem, 1
    while folder.exists():
        count += 1
        folder = runs / f"{stem}-{count}"
    return folder


def find_run(run: str | Path, runs: Path = RUNS) -> Path:
    """The folder of a run: itself, or the newest in `runs` of the recipe of that name.

    Raises:
        RunError: neither is there; offers the nearest.
    """
    place = Path(run).expanduser()
    if place.is_dir():
        return place
    by_name: dict[str, list[Path]] = {}
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        stamped = _STAMPED.fullmatch(folder.name)
        if folder.is_dir() and not folder.name.startswith("."):  # an import that was killed
            by_name.setdefault(stamped["name"] if stamped else folder.name, []).append(folder)
    if str(run) in by_name:
        return max(by_name[str(run)], key=_age)
    if place.exists():
        raise RunError(f"'{run}' is a file: expected a run folder, or a recipe's name for its newest run")
    known = f" Runs in {runs}/: {', '.join(by_name)}." if by_name else ""
    raise RunError(
        f"there is no run folder '{run}', and {runs}/ has no run of that name.{nearest(str(run), by_name)}{known} "
        "Make one with: undiffuse train RECIPE"
    )


def _age(folder: Path) -> tuple[str, int]:
    """Order of runs by the time in their names, then by the number behind it."""
    stamped = _STAMPED.fullmatch(folder.name)
    return (stamped["stamp"], int(stamped["count"] or 1)) if stamped else ("", 0)


def load_run(folder: str | Path) -> Run:
    """A run: its folder, or a recipe's name for its newest run under `runs/`.

    Raises:
        RunError: no such folder, or one without a recipe that can be read.
    """
    place = find_run(folder)
    file = place / "recipe.yaml"
    if not file.is_file():
        raise RunError(f"{place} is no run folder: it has no recipe.yaml. Runs are made by: undiffuse train RECIPE")
    try:
        return Run(place, load_recipe(file))
    except RecipeError as error:
        raise RunError(f"the recipe of run folder {place} cannot be used: {error}") from error


class Run:
    """A run folder and the recipe in it.

    Args:
        folder: where it is.
        recipe: with every value resolved.
        result: how the training that made this object ended; None for a run that was loaded.
    """

    def __init__(self, folder: Path, recipe: Recipe, result: TrainResult | None = None):
        self.folder = folder
        self.recipe = recipe
        self.result = result

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def facts(self) -> FactsSection:
        """What its data are.

        Raises:
            RunError: its recipe was not written by training.
        """
        facts = self.recipe.settings.facts
        if facts is None:
            raise RunError(f"{self.folder / 'recipe.yaml'} has no facts: it was not written by training")
        return facts

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return list_checkpoints(self.folder)

    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, in order; a last line that was cut short is left out."""
        return read_lines(self.folder / "metrics.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of `evaluation.jsonl`, in order."""
        return read_lines(self.folder / "evaluation.jsonl")

    def average(self, ema: str | float | None = None, step: int | None = None) -> str:
        """The full name of an average of the weights: "half-life-500", "power-0.05", or "none" for the last weights.

        Args:
            ema: such a name; a half-life in steps; None: the recipe's `sampling.ema`, else the first that was kept.
            step: of the checkpoint; None: the newest.

        Raises:
            CheckpointError: see `denoiser`.
        """
        wanted = self.recipe.settings.sampling.ema if ema is None else ema
        if wanted is None:
            kept = load_checkpoint(self.folder, step).averages
            return kept[0] if kept else "none"
        text = f"{wanted:g}" if isinstance(wanted, int | float) else wanted
        return f"half-life-{float(text):g}" if re.fullmatch(r"[0-9.]+", text) else text

    def denoiser(
        self, ema: str | float | None = None, step: int | None = None, device: str | torch.device | None = "cpu"
    ) -> NetworkDenoiser:
        """The trained denoiser, in evaluation mode, its parameters frozen.

        Args:
            ema: see `average`. A power average that was not kept is rebuilt from the run's snapshots.
            step: of the checkpoint; None: the newest.
            device: where to put it; None: a GPU where there is one.

        Raises:
            CheckpointError: no such checkpoint or average, or one that is damaged (a whole one is offered).
            ArgumentError: a device that is not there. RunError: the run trained something else.
        """
        self.expect("denoiser")
        return cast(NetworkDenoiser, self.model(ema, step, device))

    def energy(
        self, ema: str | float | None = None, step: int | None = None, device: str | torch.device | None = "cpu"
    ) -> NetworkEnergy:
        """The trained energy; arguments and errors as of `denoiser`.

        Raises:
            RunError: the run trained something else.
        """
        self.expect("energy")
        return cast(NetworkEnergy, self.model(ema, step, device))

    def classifier(
        self, ema: str | float | None = None, step: int | None = None, device: str | torch.device | None = "cpu"
    ) -> NetworkClassifier:
        """The trained classifier of noisy data; arguments and errors as of `denoiser`.

        Raises:
            RunError: the run trained something else.
        """
        self.expect("classifier")
        return cast(NetworkClassifier, self.model(ema, step, device))

    def solver(self, name: str, settings: Mapping[str, Any] | None = None) -> Solver:
        """A solver made for this run: `ud.sample(..., solver=run.solver("tuned-8"))`.

        Args:
            name: "tuned-8", of `undiffuse tune`; "dpm-v3", of `undiffuse statistics`.
            settings: of `DPMv3`, such as {"points": 3}.

        Raises:
            ArgumentError: no such solver; says which there are. RecipeError: no such setting. CheckpointError: its file
                is damaged.
        """
        found = in_folder({"name": name, **(settings or {})}, self.folder)
        if found["name"] not in IN_FOLDER:
            raise ArgumentError(
                f"'{name}' is no solver tuned to this run: those are called tuned-CALLS, and {STATISTICS}"
            )
        return build.solver(found)

    def grid(self, name: str) -> Tensor:
        """A grid fitted to this run, by a name such as "optimised-8": `ud.sample(..., grid=run.grid("optimised-8"))`.

        Raises:
            ArgumentError: no such grid; says which there are. CheckpointError: its file is damaged.
        """
        return grid_in_folder(name, self.folder)[0].grid(self.recipe.path())

    def expect(self, kind: str) -> None:
        """Refuse a run of another kind than "denoiser", "energy" or "classifier".

        Raises:
            RunError: says what it trained, and what that is for.
        """
        trained = self.recipe.kind
        if trained != kind:
            what, use = USES[trained]
            raise RunError(f"{self.folder} trained {what}, no {kind}: {use.format(folder=self.folder)}")

    def model(
        self, ema: str | float | None = None, step: int | None = None, device: str | torch.device | None = "cpu"
    ) -> NetworkDenoiser | NetworkEnergy | NetworkClassifier:
        """Whatever was trained; arguments and errors as of `denoiser`."""
        place = pick_device(device)
        saved = load_checkpoint(self.folder, step)
        name = self.average(ema, saved.step)
        _ = self.facts
        model = self.recipe.model()
        restore_module(model, self._weights(saved, name), saved.folder)
        if self.recipe.train_config().channels_last:  # as it was trained: convolutions are faster so
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return model.to(place).eval().requires_grad_(False)

    def _weights(self, saved: Checkpoint, name: str) -> dict[str, torch.Tensor]:
        if name == "none":
            return saved.weights(None)
        width = name.removeprefix("power-")
        if name in saved.averages or width == name:
            return saved.weights(name)
        try:
            return saved.weights(None) | rebuild(self.folder, float(width), saved.step)
        except ValueError:
            raise ArgumentError(f"ema '{name}': expected power-WIDTH, for example power-0.05") from None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none where it is missing, and no last line that was cut short.

    Raises:
        RunError: a line before the last is not JSON.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise RunError(f"{file}, line {number} is not JSON: the file has been altered") from None
    return records
