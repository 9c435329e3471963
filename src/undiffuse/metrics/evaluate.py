"""Measure samples against a reference: the checks that come first, the features, the metrics, the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics.features import UNHASHED, Features, Progress
from undiffuse.metrics.protocol import PIXELS, Protocol, Result
from undiffuse.metrics.registry import Metric, Sets, metric
from undiffuse.metrics.rows import Others, Points, Rows, pair


def evaluate(
    samples: Points,
    reference: Others,
    *,
    metrics: Sequence[str | Metric],
    protocol: Protocol,
    held_out: Tensor | None = None,
    features: Features | Callable[[Tensor], Tensor] | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Every metric asked for, each number with its protocol. Sums are float64; sets are read block by block.

    Args:
        samples: (n, *event), floating point, n = protocol.n.
        reference: (m, *event), on the same scale, m = protocol.reference_n.
        metrics: names from `METRICS`, or metric objects where other settings are wanted.
        protocol: how both sets were made; its features and features_hash are filled in from `features`.
        held_out: images never trained on, for "nearest".
        features: what to measure on in place of pixels; any callable (b, *event) -> (b, d).
        labels: (intended classes of the samples, classes of the reference), int64, for "class-accuracy".
        progress: called with (what, done, total).

    Returns:
        One result for each number, in the order of `metrics`; some metrics give two.

    Raises:
        ArgumentError: before anything is computed: an unknown metric, counts or features that contradict the
            protocol, data outside its range, an absent set that a metric needs, and all that `Rows` refuses.
    """
    chosen = [metric(name) for name in metrics]
    if not chosen:
        raise ArgumentError("no metric was asked for: metrics is empty")
    wrapped = None if features is None else Features.of(features)
    protocol = _with_features(protocol, wrapped)
    sets = Sets(samples, reference, held_out, *(labels or (None, None)))
    _check_sets(sets, protocol)
    for one in chosen:
        one.check(sets)
    notes: tuple[str, ...] = ()
    if wrapped is not None:
        sets = sets.through(partial(wrapped, progress=progress))
        if wrapped.hash == UNHASHED:
            notes = (f"features '{wrapped.name}' have no hash: results are matched by their name alone",)
    results: list[Result] = []
    for done, one in enumerate(chosen):
        if progress is not None:
            progress(one.name, done, len(chosen))
        results += _measure(one, sets, protocol, notes)
    if progress is not None:
        progress("metrics", len(chosen), len(chosen))
    return results


def _measure(one: Metric, sets: Sets, protocol: Protocol, notes: tuple[str, ...]) -> list[Result]:
    around = one.advice(sets) + notes
    return [
        Result(v.name, v.value, protocol, v.std, one.settings(), dict(v.extra), v.warnings + around)
        for v in one.measure(sets)
    ]


def _with_features(protocol: Protocol, features: Features | None) -> Protocol:
    name, digest = (PIXELS, "") if features is None else (features.name, features.hash)
    stated = (protocol.features, protocol.features_hash)
    if stated not in ((PIXELS, ""), (name, digest)):
        raise ArgumentError(f"the protocol states features {stated}, but these were given: {(name, digest)}")
    return replace(protocol, features=name, features_hash=digest)


def _check_sets(sets: Sets, protocol: Protocol) -> None:
    pair(sets.samples, sets.reference, least=2)
    if sets.held_out is not None:
        pair(sets.held_out, sets.reference, ("held-out images", "reference images"))
    for what, given, stated in (
        ("samples", len(sets.samples), protocol.n),
        ("reference images", len(sets.reference), protocol.reference_n),
    ):
        if given != stated:
            raise ArgumentError(f"{given} {what} were given, and the protocol states {stated}")
    _check_range(sets.reference, protocol.data_range)


def _check_range(reference: Tensor, data_range: tuple[float, float] | None) -> None:
    """Real data that leave the stated range are on another scale, and so would be every number."""
    if data_range is None:
        return
    rows = Rows(reference, "reference images")
    low = min(float(rows.block(part).min()) for part in rows.parts())
    high = max(float(rows.block(part).max()) for part in rows.parts())
    # A thousandth of the range: above float32 rounding of a resized image, far below what a rescaling does.
    slack = 1e-3 * (data_range[1] - data_range[0])
    if low < data_range[0] - slack or high > data_range[1] + slack:
        raise ArgumentError(
            f"reference images lie in [{low:g}, {high:g}], the protocol states {data_range}: bring "
            "samples and reference to the stated range"
        )
