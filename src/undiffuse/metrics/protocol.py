"""A number together with how it was measured; numbers measured in unlike ways refuse to be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from undiffuse.core.errors import ArgumentError, choose

PIXELS = "pixels"


def _identity(default: Any = None) -> Any:
    """A field that says which model was measured, not how."""
    return field(default=default, metadata={"identity": True})


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a number was measured. All of it is compared, but for `model`, `run` and `step`.

    Args:
        n: samples measured.
        reference: name of the data set they are compared with.
        split: of that data set ("train", "held-out", ...); no default, because half of all numbers that cannot
            be reproduced forgot it.
        reference_n: images in it.
        reference_fingerprint: of exactly those images, as `Dataset.fingerprint`.
        features: "pixels", or the name of what the images were turned into.
        features_hash: of the network that did it; empty for pixels.
        data_range: (low, high) of pixel values; None where the data are no images.
        solver, steps, nfe, grid, precision, guidance: of sampling; nfe counts network calls per sample.
        seeds: as written for the command, "0-9999".
        ema, path: which average of the weights, and the path sampled on.
        model, run, step: which model it is.

    Raises:
        ArgumentError: a count below 1, an empty reference or split, a range that does not increase.
    """

    n: int
    reference: str
    split: str
    reference_n: int
    reference_fingerprint: str
    features: str = PIXELS
    features_hash: str = ""
    data_range: tuple[float, float] | None = None
    solver: str | None = None
    steps: int | None = None
    nfe: int | None = None
    grid: str | None = None
    precision: str | None = None
    guidance: float | None = None
    seeds: str | None = None
    ema: str | None = None
    path: str | None = None
    model: str | None = _identity()
    run: str | None = _identity()
    step: int | None = _identity()

    def __post_init__(self):
        for name in ("n", "reference_n", "steps", "nfe"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ArgumentError(f"protocol: {name} = {value!r}: expected an integer, at least 1")
        for name in ("reference", "split", "features"):
            if not getattr(self, name):
                raise ArgumentError(f"protocol: {name} is empty: say what the samples are compared with, and on what")
        if self.data_range is not None:
            low, high = (float(end) for end in self.data_range)
            if not low < high:
                raise ArgumentError(f"protocol: data_range = {self.data_range}: expected (low, high) with low < high")
            object.__setattr__(self, "data_range", (low, high))

    def differences(self, other: Protocol, allow: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
        """The fields that differ, identity and `allow` left out: name -> (own value, the other's).

        Raises:
            ArgumentError: `allow` names an unknown field.
        """
        table = {entry.name: entry for entry in fields(self)}
        for name in allow:
            choose(name, table, "protocol field")
        pairs = {
            name: (getattr(self, name), getattr(other, name))
            for name, entry in table.items()
            if not entry.metadata.get("identity") and name not in allow
        }
        return {name: values for name, values in pairs.items() if values[0] != values[1]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """The inverse of `dataclasses.asdict`, after a way through JSON too."""
        return cls(**_known(cls, values, "protocol"))


@dataclass(frozen=True)
class Result:
    """One number and its protocol.

    Args:
        name: of the quantity, "frechet".
        value: finite.
        protocol: how samples and reference were made.
        std: spread, in the sense the metric's docstring states; None where there is none.
        settings: of the metric itself (k, subsets, ...); compared like the protocol.
        extra: what else came out (indices of the nearest, per-class figures), JSON values only.
        warnings: what a reader has to know before trusting the value.
    """

    name: str
    value: float
    protocol: Protocol
    std: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise ArgumentError(f"{self.name} = {self.value}: a result must be finite")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: tuples become lists, as they would on the way."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ArgumentError: `std`, `settings` or `extra` hold a value that JSON has no place for.
        """
        try:
            return json.dumps(asdict(self), allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"the result '{self.name}' cannot be written as JSON: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`.

        Raises:
            ArgumentError: an unknown or a missing key.
        """
        known = _known(cls, values, "result")
        known["protocol"] = Protocol.from_dict(known["protocol"])
        return cls(**{**known, "warnings": tuple(known.get("warnings", ()))})

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The inverse of `to_json`.

        Raises:
            ArgumentError: not JSON, or not a result.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArgumentError(f"a result must be JSON: {error}") from error
        return cls.from_dict(values)


def _known(cls: type, values: Any, what: str) -> dict[str, Any]:
    """`values` as a dict of the fields of `cls`, or the error that names the key at fault."""
    if not isinstance(values, Mapping):
        raise ArgumentError(f"a {what} must be a mapping of names to values, given {type(values).__name__}")
    table = {entry.name: entry for entry in fields(cls)}
    for name in values:
        choose(name, table, f"{what} field")
    missing = [name for name, entry in table.items() if name not in values and _is_required(entry)]
    if missing:
        raise ArgumentError(f"a {what} lacks {', '.join(missing)}")
    return dict(values)


def _is_required(entry) -> bool:
    absent = type(entry.default).__name__ == "_MISSING_TYPE"
    return absent and type(entry.default_factory).__name__ == "_MISSING_TYPE"


@dataclass(frozen=True)
class Comparison:
    """Two values measured alike: `difference = a - b`, and `ratio = a / b` (None where b is 0)."""

    name: str
    a: float
    b: float
    difference: float
    ratio: float | None


def _refuse_unlike(a: Result, b: Result, allow: Sequence[str]) -> None:
    if a.name != b.name:
        raise ArgumentError(f"'{a.name}' and '{b.name}' are different quantities and cannot be compared")
    unlike = a.protocol.differences(b.protocol, allow)
    for key in sorted(a.settings.keys() | b.settings.keys()):
        values = (a.settings.get(key), b.settings.get(key))
        if json.dumps(values[0]) != json.dumps(values[1]):
            unlike[f"settings.{key}"] = values
    if unlike:
        listed = "; ".join(f"{name}: {one!r} and {other!r}" for name, (one, other) in unlike.items())
        raise ArgumentError(
            f"two values of '{a.name}' were measured in unlike ways and cannot be compared. {listed}. "
            "Measure them alike, or name in allow= the protocol fields whose effect you want to see"
        )


def compare(a: Result, b: Result, *, allow: Sequence[str] = ()) -> Comparison:
    """Compare two results of one quantity, measured alike.

    Args:
        a: a result.
        b: another.
        allow: protocol fields that may differ because they are what is studied, ("solver", "steps", "nfe").

    Raises:
        ArgumentError: different quantities, or unlike protocols or settings; names every field that differs.
    """
    _refuse_unlike(a, b, allow)
    ratio = a.value / b.value if b.value != 0.0 else None
    return Comparison(a.name, a.value, b.value, a.value - b.value, ratio)


@dataclass(frozen=True)
class Spread:
    """One quantity over several seeds. `std` has n - 1 below; `minimum` is a field of its own."""

    name: str
    mean: float
    std: float
    minimum: float
    maximum: float
    count: int


def spread(results: Sequence[Result], *, allow: Sequence[str] = ("seeds",)) -> Spread:
    """Mean, standard deviation and range of one quantity over runs that differ in their seeds.

    Raises:
        ArgumentError: fewer than 2 results, or results measured in unlike ways.
    """
    if len(results) < 2:
        raise ArgumentError(f"a spread needs at least 2 results, given {len(results)}")
    for other in results[1:]:
        _refuse_unlike(results[0], other, allow)
    values = [result.value for result in results]
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Spread(results[0].name, mean, std, min(values), max(values), len(values))
