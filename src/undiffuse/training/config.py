"""`TrainConfig`: every number of a training run, checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from undiffuse.core.errors import ArgumentError, nearest

Number = int | float

# What each named choice may be.
OPTIMIZERS = ("adam", "adamw", "muon")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16")
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Lengths are in optimiser steps, sizes in samples of the global batch.

    Args:
        steps: optimiser steps in all.
        batch: global batch, the same for any number of processes.
        micro_batch: most samples that one process puts through the network at once; None: its whole share.
        lr: learning rate after warm-up.
        optimizer: "adam", "adamw" (decoupled weight decay; with "adam" it is an L2 term of the gradient), or "muon"
            (orthogonalised momentum for matrices and convolutions, AdamW for the rest, at one rate).
        betas, eps, weight_decay: the optimiser's; Muon's momentum is the first of `betas`.
        warmup: steps over which the rate grows linearly from lr / warmup to lr.
        schedule: "constant", or "cosine" down to 0 at `steps`.
        clip: largest norm of the gradient; None: not clipped. The norm is logged either way.
        precision: "fp32", or "bf16": autocast, the weights and all state stay fp32.
        channels_last: memory format of images and convolution weights.
        compile: `torch.compile` the network.
        ema: half-lives of the averages of the weights.
        ema_ramp: at step k the half-life is at most `ema_ramp * k`, so that the start is forgotten.
        ema_power: relative widths of power-function averages, in (0, 0.288].
        cond_dropout: chance that a sample is trained without its condition (classifier-free guidance).
        checkpoint_every, keep: a checkpoint every so many steps, of which the newest `keep` stay.
        snapshot_every: steps between the snapshots from which other power averages are rebuilt; None: none.
        sample_every: steps between calls of `on_sample`; None: never.
        log_every: steps between lines of `metrics.jsonl`.
        seed: of everything random.
        trackers: any of "tensorboard", "wandb".
        timeout: seconds that processes wait for one another before an error names what they waited for.

    Raises:
        ArgumentError: a value out of range; says which, and what is allowed.
    """

    steps: int = 10_000
    batch: int = 128
    micro_batch: int | None = None
    lr: Number = 1e-3
    optimizer: str = "adam"
    betas: Sequence[Number] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    warmup: int = 0
    schedule: str = "constant"
    clip: Number | None = 1.0
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    ema: Sequence[Number] = (500.0,)
    ema_ramp: Number = 0.05
    ema_power: Sequence[Number] = ()
    cond_dropout: Number = 0.0
    checkpoint_every: int = 1000
    keep: int = 2
    snapshot_every: int | None = None
    sample_every: int | None = None
    log_every: int = 50
    seed: int = 0
    trackers: Sequence[str] = ()
    timeout: Number = 600.0

    def __post_init__(self) -> None:
        for name in ("betas", "ema", "ema_power", "trackers"):
            object.__setattr__(self, name, tuple(_sequence(name, getattr(self, name))))
        for name in ("steps", "batch", "checkpoint_every", "keep", "log_every"):
            _integer(name, getattr(self, name), least=1)
        for name in ("micro_batch", "snapshot_every", "sample_every"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), least=1, or_none=True)
        _integer("warmup", self.warmup, least=0)
        _integer("seed", self.seed, least=0)
        for name in ("lr", "eps", "ema_ramp", "timeout"):
            _number(name, getattr(self, name), "a number > 0", lambda v: v > 0)
        if self.clip is not None:
            _number("clip", self.clip, "a number > 0, or null", lambda v: v > 0)
        _number("weight_decay", self.weight_decay, "a number >= 0", lambda v: v >= 0)
        _number("cond_dropout", self.cond_dropout, "a chance in [0, 1]", lambda v: 0 <= v <= 1)
        if len(self.betas) != 2:
            raise ArgumentError(f"training.betas has {len(self.betas)} values: expected two, for example [0.9, 0.999]")
        for name, text, allowed in (
            ("betas", "two numbers in [0, 1)", lambda v: 0 <= v < 1),
            ("ema", "half-lives > 0, in steps", lambda v: v > 0),
            # The relative width of t^gamma with gamma = 0, the widest there is, is 1 / sqrt(12).
            ("ema_power", "relative widths in (0, 0.288]", lambda v: 0 < v <= 12**-0.5),
        ):
            for value in getattr(self, name):
                _number(name, value, text, allowed)
            if name != "betas":
                _distinct(name, getattr(self, name))
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("precision", self.precision, PRECISIONS)
        for tracker in self.trackers:
            _choice("trackers", tracker, TRACKERS)
        if self.snapshot_every is not None and not self.ema_power:
            raise ArgumentError(
                f"training.snapshot_every is {self.snapshot_every} but training.ema_power is empty: there is nothing "
                "to snapshot. Give ema_power, for example [0.05, 0.1], or leave snapshot_every out"
            )

    def as_dict(self) -> dict:
        """The values by name, as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _sequence(name: str, value) -> Sequence:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(f"training.{name} is {value!r}: expected a list, for example [{value}]")
    return value


def _integer(name: str, value, *, least: int, or_none: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(
            f"training.{name} is {value!r}: expected an integer >= {least}{', or null' if or_none else ''}"
        )


def _number(name: str, value, expected: str, allowed) -> None:
    is_number = isinstance(value, Number) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not allowed(value):
        raise ArgumentError(f"training.{name} is {value!r}: expected {expected}")


def _distinct(name: str, values: Sequence) -> None:
    if len({f"{value:g}" for value in values}) < len(values):
        raise ArgumentError(f"training.{name} is {list(values)}: expected values that differ")


def _choice(name: str, value, known: Sequence[str]) -> None:
    if value not in known:
        raise ArgumentError(f"training.{name} is {value!r}: expected {' or '.join(known)}.{nearest(value, known)}")
