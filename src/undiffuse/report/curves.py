"""From the training log to charts: loss, loss by noise level, gradient norm, learning rate."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undiffuse.report.chart import Band, Chart, Hint, Line
from undiffuse.report.text import escape, number, significant

# More points than this cannot be told apart on a chart this wide, and only make the page heavy.
MOST_POINTS = 240
# Hover strips narrower than about 4 units are hard to hit.
MOST_HINTS = 100
# The bold line averages this part of the run.
SMOOTHING = 1 / 30
# Loss by noise level is shown for three stretches of the run, each this part of it.
STRETCH = 0.1


@dataclass(frozen=True)
class Curve:
    """A chart with its heading and, in words, how to read it; `legend` pairs a CSS class with a name."""

    heading: str
    chart: Chart
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Wanted:
    """A key of the log to draw against the step, whether its axis may be logarithmic, and its line an average."""

    heading: str
    key: str
    label: str
    log: bool = True
    smooth: bool = True


WANTED = (
    Wanted("Loss", "loss", "mean loss"),
    Wanted("Gradient norm", "grad_norm", "norm before clipping"),
    # A schedule ends near zero, where a logarithm would show little else.
    Wanted("Learning rate", "lr", "rate", log=False, smooth=False),
)


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a line that a kill cut short is left out, a missing file has no lines."""
    path = Path(file)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def history(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The log in order of steps; where a resumed run repeated a step, the later line counts."""
    by_step = {step: record for record in log if math.isfinite(step := number(record.get("step")))}
    return [by_step[step] for step in sorted(by_step)]


def all_curves(log: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The curves for which the log has figures."""
    records = history(log)
    found = [curve for wanted in WANTED if (curve := over_steps(records, wanted))]
    by_noise = loss_by_noise(records)
    return [*found[:1], by_noise, *found[1:]] if by_noise else found


def median_of(log: Sequence[Mapping[str, Any]], key: str) -> float:
    """Median of the finite values under a key; NaN where there is none."""
    values = sorted(v for record in log if math.isfinite(v := number(record.get(key))))
    return values[len(values) // 2] if values else math.nan


@dataclass(frozen=True)
class Buckets:
    """Consecutive records drawn as one point each; NaN where a bucket has no finite value."""

    step: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    size: int


def bucket(steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS) -> Buckets:
    """At most `most` buckets of equally many records: mean step; mean, least and greatest of the finite values."""
    size = max(1, math.ceil(len(steps) / most))
    columns: tuple[list[float], ...] = ([], [], [], [])
    for first in range(0, len(steps), size):
        inside = steps[first : first + size]
        finite = [v for v in values[first : first + size] if math.isfinite(v)]
        row = (math.fsum(finite) / len(finite), min(finite), max(finite)) if finite else (math.nan,) * 3
        for column, value in zip(columns, (math.fsum(inside) / len(inside), *row)):
            column.append(value)
    return Buckets(*columns, size=size)


def moving_average(values: Sequence[float], reach: int) -> list[float]:
    """Mean of the finite values within `reach` places on either side; NaN stays NaN."""
    smooth = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if math.isfinite(v)]
        smooth.append(math.fsum(near) / len(near) if math.isfinite(value) else math.nan)
    return smooth


def over_steps(records: Sequence[Mapping[str, Any]], wanted: Wanted) -> Curve | None:
    """A chart of one key of the log against the step, or None where no value is finite."""
    heading, key = wanted.heading, wanted.key
    present = [record for record in records if key in record]
    steps = [number(record["step"]) for record in present]
    values = [number(record[key]) for record in present]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    buckets = bucket(steps, values)
    reach = round(len(buckets.step) * SMOOTHING / 2) if wanted.smooth else 0
    smooth = moving_average(buckets.mean, reach)
    broken = [s for s, v in zip(steps, values) if not math.isfinite(v)]
    stride = math.ceil(len(buckets.step) / MOST_HINTS)
    hints = [
        Hint(s, (v,), f"step {s:,.0f} · {heading.lower()} {significant(v)}")
        for s, v in list(zip(buckets.step, smooth))[::stride]
        if math.isfinite(v)
    ]
    shown = Chart(
        summary=f"{heading} by training step: from {significant(finite[0])} at step {steps[0]:,.0f} to "
        f"{significant(finite[-1])} at step {steps[-1]:,.0f}; least {significant(min(finite))}.",
        x_label="training step",
        y_label=wanted.label,
        lines=(Line(buckets.step, smooth),),
        bands=(Band(buckets.step, buckets.low, buckets.high),) if wanted.smooth else (),
        hints=hints,
        marks=tuple(broken[:MOST_HINTS]),
        log=wanted.log,
    )
    return Curve(heading, shown, _note_over_steps((2 * reach + 1) * buckets.size, buckets.size, broken))


def _note_over_steps(averaged: int, size: int, broken: Sequence[float]) -> str:
    parts = []
    if averaged > size:
        parts.append(f"Line: average over {averaged} log entries.")
        parts.append(f"Shade: range within groups of {size}." if size > 1 else "Shade: single entries.")
    if broken:
        word = "entry is" if len(broken) == 1 else "entries are"
        parts.append(f"{len(broken):,} {word} not finite (red), first at step {broken[0]:,.0f}.")
    return " ".join(parts)


# ---------------------------------------------------------------- loss by noise level


@dataclass(frozen=True)
class Histogram:
    """Mean loss by bin of the half log-SNR over a stretch of training."""

    edges: list[float]
    mean: list[float]
    count: list[float]
    first: float
    last: float

    def centres(self) -> list[float]:
        """Middle of each bin; an unbounded bin is drawn as wide as its neighbour."""
        edges = list(self.edges)
        if math.isnan(edges[0]):
            edges[0] = 2 * edges[1] - edges[2]
        if math.isnan(edges[-1]):
            edges[-1] = 2 * edges[-2] - edges[-3]
        return [(a + b) / 2 for a, b in itertools.pairwise(edges)]


def loss_by_noise(records: Sequence[Mapping[str, Any]]) -> Curve | None:
    """Mean loss against half log-SNR for the start, the middle and the end of the run; None where not logged."""
    usable = [record for record in records if _edges(record) is not None]
    usable = [record for record in usable if _edges(record) == _edges(usable[-1])]
    stretches = [pool(part) for part in _stretches(usable)]
    stretches = [h for h in stretches if any(math.isfinite(m) for m in h.mean)]
    if not stretches:
        return None
    styles = ("late", "early late", "early middle late")[len(stretches) - 1].split()
    names = [f"steps {h.first:,.0f}–{h.last:,.0f}" for h in stretches]
    last = stretches[-1]
    finite = [(m, c) for m, c in zip(last.mean, last.centres()) if math.isfinite(m)]
    chart = Chart(
        summary=f"Mean loss by half log-SNR over {names[-1]}: greatest {significant(max(finite)[0])} at "
        f"{significant(max(finite)[1])}, least {significant(min(finite)[0])} at {significant(min(finite)[1])}.",
        x_label="half log-SNR (noise ← → data)",
        y_label="mean loss",
        lines=[Line(h.centres(), h.mean, style, dots=True) for h, style in zip(stretches, styles)],
        hints=[_noise_hint(stretches, names, i) for i in range(len(last.mean))],
    )
    legend = list(zip(styles, names)) if len(stretches) > 1 else ()
    note = "" if legend else f"Over {names[0]}."
    return Curve("Loss by noise level", chart, note, legend)


def _noise_hint(stretches: Sequence[Histogram], names: Sequence[str], i: int) -> Hint:
    edges = [significant(e) if math.isfinite(e) else "…" for e in stretches[-1].edges[i : i + 2]]
    values = [
        f"{name}: {significant(h.mean[i])} (n = {h.count[i]:,.0f})" if math.isfinite(h.mean[i]) else f"{name}: none"
        for h, name in zip(stretches, names)
    ]
    text = "\n".join([f"half log-SNR {edges[0]} to {edges[1]}", *values])
    return Hint(stretches[-1].centres()[i], [h.mean[i] for h in stretches], text)


def _edges(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Bin edges as a comparable key, or None where the record holds no usable histogram."""
    entry = record.get("loss_by_noise")
    if not isinstance(entry, Mapping):
        return None
    edges, mean, counts = (entry.get(key) for key in ("edges", "mean", "count"))
    if not (isinstance(edges, list) and isinstance(mean, list) and isinstance(counts, list)):
        return None
    matched = len(mean) >= 1 and len(edges) == len(mean) + 1 == len(counts) + 1
    bounded = [math.isfinite(number(e)) for e in edges]
    return tuple(map(str, edges)) if matched and all(bounded[1:-1]) and sum(bounded) >= 2 else None


def _stretches(usable: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """The first, the middle and the last tenth of the records; all of them at once where they are few."""
    width = math.ceil(len(usable) * STRETCH)
    middle = (len(usable) - width) // 2
    if len(usable) < 3:
        return [usable] if usable else []
    return [usable[:width], usable[middle : middle + width], usable[-width:]]


def pool(records: Sequence[Mapping[str, Any]]) -> Histogram:
    """The histograms of several records as one: means weighted by counts."""
    entries = [record["loss_by_noise"] for record in records]
    bins = range(len(entries[0]["mean"]))
    count, mean = [], []
    for i in bins:
        pairs = [(number(e["mean"][i]), number(e["count"][i])) for e in entries]
        pairs = [(m, n) for m, n in pairs if math.isfinite(m) and n > 0]
        count.append(math.fsum(n for _, n in pairs))
        mean.append(math.fsum(m * n for m, n in pairs) / count[-1] if pairs else math.nan)
    steps = [number(record["step"]) for record in records]
    return Histogram([number(e) for e in entries[0]["edges"]], mean, count, steps[0], steps[-1])


def table(log: Sequence[Mapping[str, Any]], rows: int = 12) -> str:
    """The log at about a dozen steps, first and last included, as the body of an HTML table; "" for no log."""
    records = history(log)
    columns = [
        (key, name)
        for key, name in (("step", "Step"), ("loss", "Loss"), ("grad_norm", "Gradient norm"), ("lr", "Learning rate"),
                          ("images_per_second", "Items/s"), ("seconds", "Seconds"))
        if any(key in record for record in records)
    ]  # fmt: skip
    if not records:
        return ""
    picked = sorted({round(i * (len(records) - 1) / max(1, rows - 1)) for i in range(rows)})
    head = "".join(f'<th scope="col">{name}</th>' for _, name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(records[i].get(key))}</td>" for key, _ in columns) + "</tr>" for i in picked
    )
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def _cell(value: object) -> str:
    return "–" if value is None else escape(significant(value))
