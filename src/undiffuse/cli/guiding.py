"""The options `--classifier` and `--classifier-scale`: a denoiser's samples guided by a classifier of noisy data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from undiffuse.cli.console import Console
from undiffuse.core.errors import ArgumentError


@dataclass(frozen=True)
class Guide:
    """What the options say: the run of the classifier, and the scale of its gradient."""

    run: str
    scale: float = 1.0


def guide_of(classifier: str | None, scale: float | None) -> Guide | None:
    """What the options say, checked.

    Raises:
        ArgumentError: a scale that is not finite, or one without a classifier.
    """
    if classifier is None and scale is not None:
        raise ArgumentError(f"--classifier-scale {scale:g} belongs to --classifier RUN, which is not given")
    if scale is not None and not math.isfinite(scale):
        raise ArgumentError(f"--classifier-scale {scale}: expected a finite number")
    return None if classifier is None else Guide(classifier, 1.0 if scale is None else scale)


def check_label(label: int | None, classes: int) -> None:
    """A classifier guides to one class.

    Raises:
        ArgumentError: none is given, or one that it does not know.
    """
    if label is None or not 0 <= label < classes:
        given = "no --label is given" if label is None else f"--label {label}"
        raise ArgumentError(f"{given}: --classifier guides to one class, expected --label 0 ... {classes - 1}")


def say_guide(guide: dict[str, Any] | None, note: str | None, screen: Console) -> None:
    """What guides, for people; `guide` is the record of it."""
    if guide is not None:
        weights = f"step {guide['step']}, weights {guide['ema']}"
        screen.say(f"guided by {guide['recipe']} ({weights}) at scale {guide['scale']:g}, once back in each call")
    if note is not None:
        screen.say(f"note: {note}")
