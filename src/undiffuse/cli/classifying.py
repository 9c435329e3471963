"""What `evaluate` says of a classifier of noisy data: its cross entropy, and its accuracy by noise level."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.cli.console import Console, is_lead
from undiffuse.cli.drawing import How
from undiffuse.cli.measuring import HELD_OUT, Figure, RealData, append
from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.core.random import Streams
from undiffuse.fields import NetworkClassifier
from undiffuse.metrics import Protocol, Result
from undiffuse.objectives.classification import NoisyClassification
from undiffuse.paths import Path
from undiffuse.recipes.classifiers import METRICS
from undiffuse.recipes.run import Run
from undiffuse.training import load_checkpoint

# Times and noises of each row that the cross entropy is a mean over.
DRAWS = 8
# The accuracy is taken at these quantiles of the times of training: the middles of five equal shares.
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


def evaluate_classifier(run: Run, how: How, stray: list[str], screen: Console) -> None:
    """Measure, record in evaluation.jsonl, print; in the first process alone.

    Raises:
        ArgumentError: options that belong to sampling. DataError: data of another shape, or without classes.
    """
    if stray:
        raise ArgumentError(f"{stray[0]}: {run.folder} trained a classifier, which draws no samples; leave it out")
    if not is_lead():
        return
    settings = run.recipe.settings
    batch = settings.sampling.batch if how.batch is None else how.batch
    if batch < 1:
        raise ArgumentError(f"--batch-size {batch}: expected at least one")
    saved = load_checkpoint(run.folder, how.step)
    ema = run.average(how.ema, saved.step)
    classifier = run.classifier(ema, saved.step, how.device)
    data = RealData.load(run.recipe, settings.evaluation.split or HELD_OUT)
    if list(data.x.shape[1:]) != run.facts.shape:
        raise DataError(f"{data.name} has shape {list(data.x.shape[1:])}, the run {run.facts.shape}: expected the same")
    section = settings.evaluation
    found = measure(classifier, run.recipe.objective(), data, section.n, section.seed, batch, section.metrics)
    protocol = Protocol(
        n=found.n,
        reference=data.name,
        split=data.split,
        reference_n=len(data.x),
        reference_fingerprint=data.fingerprint,
        seeds=str(settings.evaluation.seed),
        ema=ema,
        path=repr(classifier.path),
        model=run.recipe.name,
        run=run.folder.name,
        step=saved.step,
    )
    _record(run, found, protocol, screen)


def _record(run: Run, found: Found, protocol: Protocol, screen: Console) -> None:
    results = {}
    if found.loss is not None:
        results["cross-entropy"] = Result(
            "cross-entropy", found.loss, protocol, std=found.error, settings={"draws": DRAWS}
        )
    if found.levels:
        mean = sum(level["accuracy"] for level in found.levels) / len(found.levels)
        results["accuracy"] = Result("accuracy", mean, protocol, extra={"levels": found.levels})
    at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    figures = [Figure(results[name], at=at) for name in dict.fromkeys(run.recipe.settings.evaluation.metrics)]
    append(run.folder / "evaluation.jsonl", figures)
    _print(found, f"{found.n:,} of {protocol.reference} ({protocol.split})", screen)
    screen.say(f"appended to {run.folder / 'evaluation.jsonl'}")
    screen.result({"run": str(run.folder), "results": [figure.to_dict() for figure in figures]})


def _print(found: Found, rows: str, screen: Console) -> None:
    """What was measured of some rows, for people."""
    title = f"accuracy on {rows}"
    if found.loss is not None:
        title = f"cross entropy {found.loss:.4f} ± {found.error:.2g} nats over the times of training, {rows}"
    if not found.levels:
        screen.say(title)
        return
    levels = [[_said(one["t"], one["noise"]), f"{one['accuracy']:.3f}"] for one in found.levels]
    screen.table(title, ["noise level", "accuracy"], levels)


def _said(t: float, noise: float | None) -> str:
    return f"t = {t:.3g}, " + ("noise alone" if noise is None else f"σ/α = {noise:.3g}")


@dataclass(frozen=True)
class Found:
    """Of n rows: the cross entropy in nats, its standard error over rows, and `t`, `noise` (sigma / alpha) and
    `accuracy` of each level; noise None is infinite. What was not asked for is None, or no levels."""

    n: int
    loss: float | None
    error: float | None
    levels: list[dict[str, Any]]


@torch.no_grad()
def measure(
    classifier: NetworkClassifier,
    objective: NoisyClassification,
    data: RealData,
    n: int,
    seed: int,
    batch: int,
    metrics: Sequence[str] = tuple(METRICS),
) -> Found:
    """The loss at `DRAWS` times of each of the first n rows that have a class, and the accuracy at `SHARES`.

    Args:
        metrics: "cross-entropy", "accuracy", or both. Each is the same number with the other or alone.

    Raises:
        DataError: there are no such rows.
    """
    labels = torch.full((len(data.x),), -1) if data.labels is None else data.labels
    rows = torch.nonzero(labels >= 0)[:n, 0]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} rows of {data.name} ({data.split}) have a class: expected at least 2")
    path, device = classifier.path, next(classifier.parameters()).device
    times = objective.time.quantile(path, torch.tensor(SHARES, dtype=torch.float64))
    streams = Streams.of(seed, len(labels))
    losses, hits = [], []
    for part in rows.split(batch):
        x, y, own = data.x[part].to(device), labels[part].to(device), Streams(streams.keys[part].to(device))
        if "cross-entropy" in metrics:
            drawn = [objective(classifier, x, y, own.fold("times").fold(k)) for k in range(DRAWS)]
            losses.append(torch.stack(drawn, 1).double().mean(1).cpu())
        if "accuracy" in metrics:
            noise = own.fold("levels").normal(x.shape, device=device)
            hits.append(torch.stack([_right(classifier, x, y, t, noise) for t in times.float()], 1).cpu())
    loss = torch.cat(losses) if losses else None
    return Found(
        len(rows),
        None if loss is None else float(loss.mean()),
        None if loss is None else float(loss.std() / len(loss) ** 0.5),
        _levels(path, times, torch.cat(hits).double().mean(0)) if hits else [],
    )


def _levels(path: Path, times: Tensor, share: Tensor) -> list[dict[str, Any]]:
    """The shares of rows read rightly, with the times and noises of their levels."""
    noises = path.sigma(times) / path.alpha(times)
    rows = zip(times.tolist(), noises.tolist(), share.tolist())
    # JSON has no infinity, which sigma / alpha is where alpha = 0.
    return [{"t": t, "noise": s if math.isfinite(s) else None, "accuracy": hit} for t, s, hit in rows]


def _right(classifier: Any, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Float[Tensor, " b"]:
    """1 where the likeliest class at a time is the row's own."""
    time = t.to(x.device).expand(len(x))
    return (classifier(classifier.path.perturb(x, time, noise), time).argmax(1) == y).float()
