"""Measuring a run: its samples, the reference, the yardsticks, and the record of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.cli.console import Console, is_lead
from undiffuse.cli.drawing import How, Model, draw, read_samples
from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.core.random import Streams, hash_key
from undiffuse.metrics import METRICS, Features, Protocol, Result, as_bytes_rgb, evaluate, torchscript_features
from undiffuse.recipes import Recipe, Run, load_run
from undiffuse.recipes.devices import pick_device
from undiffuse.recipes.text import apply_overrides, parse_override
from undiffuse.training.files import disk_errors

HELD_OUT = "held-out"
RESAMPLED = "resampled training"


def load_changed(run: str | Path, changes: Sequence[str], allowed: Sequence[str]) -> Run:
    """A run whose recipe is changed where that does not touch what was trained.

    Raises:
        ArgumentError: a key outside `allowed`.
    """
    loaded = load_run(run)
    for change in changes:
        key = ".".join(parse_override(change)[0])
        if not key.startswith(tuple(allowed)):
            raise ArgumentError(
                f"{key} cannot be changed on a trained run: only {', '.join(a + '*' for a in allowed)} can"
            )
    if not changes:
        return loaded
    tree = apply_overrides(loaded.recipe.to_dict(), changes)
    return Run(loaded.folder, Recipe.from_tree(tree, origin=str(loaded.folder / "recipe.yaml")))


@dataclass(frozen=True)
class RealData:
    """A split in memory."""

    x: Tensor
    labels: Tensor | None
    name: str
    split: str
    fingerprint: str

    @classmethod
    def load(cls, recipe: Recipe, split: str) -> RealData:
        """All rows of a split.

        Raises:
            DataError: as loading does; or the data are streamed.
        """
        dataset = recipe.data(split)
        if not hasattr(dataset, "batch"):
            raise DataError(
                "measuring compares with the data as a whole, and these are streamed: "
                "give data.streaming=false, with data.limit=50000 for instance"
            )
        x, labels = dataset.batch(torch.arange(len(dataset)))
        classes = labels if dataset.num_classes is not None else None
        return cls(x, classes, dataset.name, split, dataset.fingerprint)

    def resampled(self, n: int) -> RealData:
        """n rows drawn with replacement, always the same: as close to the data as memory can come."""
        rows = Streams.of(hash_key("evaluate", "resampled"), n).integers(len(self.x), (n,))
        return replace(self, x=self.x[rows], labels=None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class Figure:
    """A result, and what the same metric gives for other sets."""

    result: Result
    references: dict[str, float] = field(default_factory=dict)
    samples: str = ""
    at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the result's, and `references`, `samples` (folder, within the run), `at` (time)."""
        rest = asdict(self)
        rest.pop("result")
        return self.result.to_dict() | rest


@dataclass(frozen=True)
class Measuring:
    """What to measure, on what, beside what."""

    run: Run
    how: How
    features: Path | None = None
    sha256: str = ""
    options: tuple[str, ...] = ()
    references: bool = True

    def run_all(self, screen: Console) -> list[Figure]:
        """Draw the samples (all processes), measure them (the first process; the others get nothing)."""
        section = self.run.recipe.settings.evaluation
        keys = ("solver", "steps", "grid", "corrector", "denoise", "threshold")
        changes = {key: getattr(section, key) for key in keys}
        model = Model.load(self.run, self.how, {k: v for k, v in changes.items() if v is not None})
        seeds = np.arange(section.seed, section.seed + section.n, dtype=np.int64)
        features = self._features(model)
        folder = model.folder_for(seeds, "eval")
        screen.say(f"{section.n:,} samples of {self.run.folder} (step {model.step}, weights {model.ema}): {model.said}")
        # What could refuse comes before the hours of sampling.
        against = Against.of(self.run.recipe, features, screen) if is_lead() else None
        draw(model, seeds, folder, "npz", screen)
        return [] if against is None else self._measure(model, folder, against, screen)

    def _features(self, model: Model) -> Features | None:
        if self.features is None:
            return None
        return torchscript_features(
            self.features,
            self.sha256,
            prepare=as_bytes_rgb,
            options=dict.fromkeys(self.options, True),
            device=pick_device(self.how.device),
        )

    def _measure(self, model: Model, folder: Path, against: Against, screen: Console) -> list[Figure]:
        x, seeds, labels = read_samples(folder)
        protocol = protocol_of(model, len(x), f"{seeds[0]}-{seeds[-1]}", against.reference)
        sets = {"": (x, labels)} | (against.sets(len(x)) if self.references else {})
        found: dict[str, dict[str, Result]] = {}
        with screen.progress("measuring", "metrics") as bar:
            for i, (name, (rows, classes)) in enumerate(sets.items()):
                bar.to(i, len(sets), note=name or "samples")
                found[name] = against.measure(rows, classes, protocol, None if name else screen)
            bar.to(len(sets), len(sets))
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        place = str(folder.relative_to(self.run.folder))
        beside = {name: results for name, results in found.items() if name}
        return [
            Figure(result, {name: other[key].value for name, other in beside.items() if key in other}, place, now)
            for key, result in found[""].items()
        ]


@dataclass(frozen=True)
class Against:
    """What samples of a run are measured against, and by which metrics."""

    reference: RealData
    held_out: RealData | None
    names: Sequence[str]
    features: Features | None = None

    @classmethod
    def of(cls, recipe: Recipe, features: Features | None, screen: Console) -> Against:
        """As the recipe's `evaluation` says.

        Raises:
            DataError: a split cannot be loaded that is needed.
        """
        section = recipe.settings.evaluation
        reference = RealData.load(recipe, section.split or "train")
        return cls(reference, _held_out(recipe, section.metrics, screen), section.metrics, features)

    def sets(self, n: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        """What to read figures of n samples against: training data drawn again, and held-out data where there are."""
        drawn = self.reference.resampled(n)
        found = {RESAMPLED: (drawn.x, drawn.labels)}
        if self.held_out is not None:
            found[HELD_OUT] = (self.held_out.x, self.held_out.labels)
        return found

    def measure(
        self, x: Tensor, labels: Tensor | None, protocol: Protocol, screen: Console | None = None
    ) -> dict[str, Result]:
        """All numbers of a set by name; metrics that need classes are left out where there are none, and said so."""
        both = None if labels is None or self.reference.labels is None else (labels, self.reference.labels)
        results = evaluate(
            x,
            self.reference.x,
            metrics=self._metrics(both is not None, screen),
            protocol=replace(protocol, n=len(x)),
            held_out=None if self.held_out is None else self.held_out.x,
            features=self.features,
            labels=both,
        )
        return {result.name: result for result in results}

    def _metrics(self, labelled: bool, screen: Console | None) -> Sequence[str]:
        if labelled:
            return self.names
        kept = [name for name in self.names if "labels" not in METRICS[name].needs]
        if screen is not None and len(kept) < len(self.names):
            screen.say(f"note: {', '.join(sorted(set(self.names) - set(kept)))} left out: these data have no classes")
        if not kept:
            raise ArgumentError(f"{', '.join(self.names)}: these data have no classes; choose other metrics")
        return kept


def _held_out(recipe: Recipe, names: Sequence[str], screen: Console) -> RealData | None:
    needed = [name for name in names if "held_out" in METRICS[name].needs]
    try:
        return RealData.load(recipe, HELD_OUT)
    except (DataError, ArgumentError) as error:
        if needed:
            raise DataError(f"{', '.join(needed)} needs held-out data, and there are none: {error}") from error
        screen.say(f"note: no held-out data to compare with: {error}")
        return None


def protocol_of(model: Model, n: int, seeds: str, reference: RealData) -> Protocol:
    """How n samples of a model are measured against a split."""
    sampler = model.sampler
    return Protocol(
        n=n,
        reference=reference.name,
        split=reference.split,
        reference_n=len(reference.x),
        reference_fingerprint=reference.fingerprint,
        data_range=(-1.0, 1.0) if sampler.facts.image else None,
        solver=sampler.said,
        steps=sampler.steps,
        nfe=model.nfe,
        grid=model.grid,
        precision=sampler.precision,
        seeds=seeds,
        ema=model.ema,
        path=sampler.origin,
        model=model.run.recipe.name,
        run=model.run.folder.name,
        step=model.step,
    )


def append(file: Path, figures: Sequence[Figure]) -> None:
    """Add one line per figure; see `append_lines`."""
    append_lines(file, [figure.to_dict() for figure in figures])


def append_lines(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add one line per record in a single write, on the disk when this returns."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with disk_errors(str(file), "The samples are intact"), open(file, "ab") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())
