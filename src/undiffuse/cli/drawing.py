"""Drawing many samples of a run: by shard, over processes, resumable. What `sample`, `evaluate` and `report` share."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.cli.console import Console
from undiffuse.cli.guiding import Guide, check_label
from undiffuse.cli.options import parse_corrector, parse_solver, parse_threshold, write_seeds
from undiffuse.cli.shards import NpzShards, PngFolder, Store, mine, open_folder, shards
from undiffuse.core.errors import ArgumentError
from undiffuse.guidance import ClassifierGuidance
from undiffuse.nets import keep_freed_memory
from undiffuse.recipes import build
from undiffuse.recipes.chains import SAMPLERS, EnergySampler, sampler_of
from undiffuse.recipes.correctors import overlaid, said
from undiffuse.recipes.generate import Sampler
from undiffuse.recipes.guided import guided_settings, other_data
from undiffuse.recipes.run import Run, load_run
from undiffuse.recipes.schema import SamplingSection
from undiffuse.recipes.tuned import IN_FOLDER, grid_in_folder, is_optimised
from undiffuse.solvers import OWN, DPMv3, Tuned
from undiffuse.training import Checkpoint, join, load_checkpoint

# Seconds that processes wait for the slowest one's last shard.
PATIENCE = 3600.0


@dataclass(frozen=True)
class How:
    """How samples are drawn: what the options of the command say, None where they say nothing."""

    solver: str | None = None
    steps: int | None = None
    grid: str | None = None
    batch: int | None = None
    label: int | None = None
    ema: str | None = None
    step: int | None = None
    device: str = "auto"
    corrector: str | None = None
    guide: Guide | None = None
    threshold: str | None = None


def seal_of(saved: Checkpoint) -> str:
    """What tells a checkpoint's weights from all others."""
    return hashlib.sha256(json.dumps(saved.state["files"], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Model:
    """A trained model ready to sample, and what identifies it; `guide` identifies the classifier that guides it.

    `left_out` is the recipe's corrector and grid in words, where another solver was chosen and neither was given.
    """

    run: Run
    sampler: Sampler | EnergySampler
    ema: str
    step: int
    seal: str = field(repr=False)
    guide: dict[str, Any] | None = None
    note: str | None = None
    left_out: str | None = None

    @classmethod
    def load(cls, run: Run, how: How, changes: dict[str, Any] | None = None) -> Model:
        """The model of a run; `changes` come between the recipe's `sampling` and the command's options.

        Raises:
            RunError: the run trained what draws no samples. ArgumentError: an option that does not fit the run.
        """
        keep_freed_memory()
        settings, other, note = run.recipe.settings, None, None
        if settings.kind not in SAMPLERS:
            run.expect("denoiser")
        if how.guide is not None:
            other = load_run(how.guide.run)
            settings, note = guided_settings(run, other), other_data(run, other)
            check_label(how.label, other.facts.num_classes or 0)
        if how.grid is not None and run.recipe.kind == "energy":
            raise ArgumentError(f"--grid {how.grid}: {run.folder} is an energy; its chains have no grid of times")
        if how.corrector is not None and run.recipe.kind == "energy":
            raise ArgumentError(f"--corrector {how.corrector}: {run.folder} is an energy; its chains have no corrector")
        if how.threshold is not None and run.recipe.kind == "energy":
            raise ArgumentError(f"--threshold {how.threshold}: {run.folder} is an energy; its chains estimate no x_0")
        saved = load_checkpoint(run.folder, how.step)
        ema = run.average(how.ema, saved.step)
        model = run.model(ema, saved.step, how.device)
        guide = None
        if how.guide is not None and other is not None:
            model, guide = _guided(model, other, how.guide.scale, how.device)
        chosen = parse_solver(how.solver, settings, run.folder)
        own = build.solver(chosen) if chosen is not None and chosen["name"] in IN_FOLDER else None
        if isinstance(own, Tuned):
            note = _fits(own, how, seal_of(saved), ema) or note
        elif isinstance(own, DPMv3):
            note = _other_weights(str(how.solver), own.statistics.about, seal_of(saved), ema) or note
            if own.statistics.about.get("classifier") != guide:
                note = f"{how.solver} goes by statistics of the run with another guide, or none: make them for this one"
        given = {
            "solver": chosen,
            "steps": own.made_for if own is not None and how.steps is None else how.steps,
            "batch": how.batch,
            "corrector": parse_corrector(how.corrector),
            "threshold": parse_threshold(how.threshold),
        }
        if how.grid is not None and is_optimised(how.grid):
            note = _place(given, how, run, saved, ema) or note
        else:
            given["grid"] = how.grid
        wanted, left_out = _wanted(settings.sampling, changes or {}, given)
        sampler = sampler_of(model, settings, label=how.label, **wanted)
        return cls(run, sampler, ema, saved.step, seal_of(saved), guide, note, left_out)

    @property
    def said(self) -> str:
        """How samples are drawn, in words."""
        chosen = f"{self.sampler.said}, {self.sampler.steps} steps, {self.nfe} network calls each"
        if self.left_out is None:
            return chosen
        return f"{chosen} (without the recipe's {self.left_out}: that is for its own solver)"

    def settings(self) -> dict[str, Any]:
        """What determines a sample beside its seed."""
        sampler = self.sampler
        if isinstance(sampler, EnergySampler):
            more: dict[str, Any] = {"initial": sampler.initial}
        else:  # said where there is any, so that folders of samples made before there were correctors are still theirs
            more = {"corrector": sampler.corrector, "denoise": sampler.denoise, "threshold": sampler.threshold}
            more = {key: value for key, value in more.items() if value}
        made = more | {
            "weights": self.seal,
            "ema": self.ema,
            "step": self.step,
            "solver": sampler.solver,
            "steps": sampler.steps,
            "grid": self.grid,
            "label": sampler.label,
            "precision": sampler.precision,
        }
        return made | ({} if self.guide is None else {"classifier": self.guide})

    @property
    def grid(self) -> str:
        """The name of the grid in use."""
        return self.sampler.grid_name

    @property
    def nfe(self) -> int:
        """Network calls per sample."""
        return self.sampler.nfe

    def folder_for(self, seeds: np.ndarray, kind: str) -> Path:
        """A folder in the run that these settings, and no others, lead to."""
        text = write_seeds(seeds)
        key = hashlib.sha256(json.dumps([self.settings(), text, kind]).encode()).hexdigest()[:8]
        short = text if len(text) <= 24 else f"{len(seeds)}-seeds"
        return self.run.folder / "samples" / f"{kind}-{short}-{key}"


def _place(given: dict[str, Any], how: How, run: Run, saved: Checkpoint, ema: str) -> str | None:
    """Puts the times of a fitted grid among what is given; what is to be said of its use with other weights or solvers.

    Raises:
        ArgumentError: another number of steps, or the run has no such grid.
    """
    assert how.grid is not None
    found, seal = grid_in_folder(how.grid, run.folder)
    if how.steps not in (None, found.steps):
        raise ArgumentError(f"--steps {how.steps}: the grid {how.grid} has {found.steps} steps; leave them out")
    times = tuple(found.grid(run.recipe.path()).tolist())
    given |= {"grid": f"{how.grid} ({seal})", "times": times, "steps": found.steps}
    weights = _other_weights(how.grid, found.about, seal_of(saved), ema)
    return weights or _other_solver(how.grid, found.about, given, run)


def _other_solver(name: str, about: Mapping[str, Any], given: Mapping[str, Any], run: Run) -> str | None:
    """What is to be said of a fitted grid's use with another solver than its own."""
    chosen = given["solver"] or run.recipe.settings.sampling.solver
    own = str(about.get("solver", chosen["name"])).partition(":")[0]
    if own == chosen["name"]:
        return None
    return f"{name} was fitted to {own}, and {chosen['name']} may do better on another: undiffuse compare tells"


def _fits(table: Tuned, how: How, seal: str, ema: str) -> str | None:
    """What is to be said of a tuned solver's use with other weights.

    Raises:
        ArgumentError: a grid with a solver that has its own.
    """
    if how.grid not in (None, OWN):
        raise ArgumentError(f"--grid {how.grid}: {how.solver} has times of its own; leave the grid out")
    return _other_weights(str(how.solver), table.about, seal, ema)


def _other_weights(name: str, about: Mapping[str, Any], seal: str, ema: str) -> str | None:
    if about.get("weights") in (None, seal) and about.get("ema") in (None, ema):
        return None
    made = f"step {about.get('step')}, weights {about.get('ema')}"
    return f"{name} was fitted to other weights ({made}): make it again for what it can do with these"


def _wanted(
    section: SamplingSection, changes: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """What differs from a recipe's `sampling`; and its corrector and grid in words, where another solver has none."""
    before, after = overlaid(section, changes), overlaid(section, changes, given)
    left = []
    for key, in_words in (("corrector", said), ("grid", str)):
        had, has = (layer.get(key, getattr(section, key)) for layer in (before, after))
        if had is not None and had != has and given.get(key) is None:
            left.append(f"{key} {in_words(had)}")
    return after, " and ".join(left) or None


def _guided(denoiser: Any, other: Run, scale: float, device: str) -> tuple[ClassifierGuidance, dict[str, Any]]:
    """The denoiser guided by the newest classifier of a run, and what identifies that."""
    saved = load_checkpoint(other.folder)
    ema = other.average(None, saved.step)
    model = ClassifierGuidance(denoiser, other.classifier(ema, saved.step, device), scale)
    told = {"recipe": other.recipe.name, "weights": seal_of(saved), "ema": ema, "step": saved.step}
    return model, told | {"scale": scale}


@dataclass(frozen=True)
class Drawn:
    """What a job has done: how many samples it drew in this process, of how many, in which time."""

    new: int
    total: int
    seconds: float


def draw(model: Model, seeds: np.ndarray, folder: Path, kind: str, out: Console) -> Drawn:
    """Have all seeds in `folder`, as PNG files or as `samples.npz`; each process draws its share of the shards.

    Raises:
        RunError: the folder holds other samples, the disk is full, or another process is gone.
    """
    sampler, facts = model.sampler, model.sampler.facts
    began = time.monotonic()
    with join(sampler.device, PATIENCE) as world:
        world.from_main("the folder for the samples", lambda: open_folder(folder, model.settings()))
        npz = NpzShards(folder, facts.shape, facts.num_classes is not None)
        store: Store = PngFolder(folder, facts.shape) if kind == "png" else npz
        if kind != "png" and world.from_main("the look at samples.npz", lambda: npz.complete(seeds)):
            return Drawn(0, len(seeds), 0.0)
        parts = shards(seeds, math.prod(facts.shape), sampler.batch, world.size, at_least=store.rows)
        share = sum(len(part) for _, part in mine(parts, world.rank, world.size))
        with out.progress("sampling", "samples") as bar, world.phase("sampling"):
            new = _draw_share(sampler, store, mine(parts, world.rank, world.size), share, bar)
        world.any(False, "the last shard of every process")
        if kind != "png":
            world.from_main("merging the shards", lambda: npz.merge(parts) and None)
    return Drawn(new, len(seeds), time.monotonic() - began)


def _draw_share(sampler: Sampler | EnergySampler, store: Store, parts: Any, share: int, bar: Any) -> int:
    """Draw what is missing of one process's shards."""
    new = done = 0
    for index, part in parts:
        missing = store.missing(index, part)
        done += len(part) - len(missing)
        if len(missing):
            labels = sampler.labels(missing.tolist())
            x = sampler(missing.tolist(), on_batch=lambda n, before=done: bar.to(before + n, share))
            store.write(index, missing, x, labels)
        new += len(missing)
        done += len(missing)
        bar.to(done, share)
    return new


def read_samples(folder: Path) -> tuple[Tensor, np.ndarray, Tensor | None]:
    """Samples, seeds and labels of `samples.npz`."""
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
        return torch.from_numpy(arrays["samples"]), arrays["seeds"], labels
