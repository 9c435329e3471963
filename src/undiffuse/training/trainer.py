"""`fit`: the training loop."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.training import run_folder
from undiffuse.training.conditions import Cond
from undiffuse.training.config import TrainConfig
from undiffuse.training.distributed import World, join
from undiffuse.training.learner import Learner
from undiffuse.training.session import OnLog, OnSample, Session


@dataclass(frozen=True)
class TrainResult:
    """How a call of `fit` ended.

    Args:
        step: optimiser steps done in all.
        seconds: time spent training, earlier sessions of the run included.
        stopped: whether it was asked to stop before the last step.
    """

    step: int
    seconds: float
    stopped: bool


def fit(
    model: nn.Module,
    objective: Any,
    loader: Any,
    config: TrainConfig,
    folder: str | Path,
    *,
    on_sample: OnSample | None = None,
    on_log: OnLog | None = None,
    device: str | torch.device = "cpu",
    fingerprint: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train `model` for `config.steps` steps, from the newest whole checkpoint in `folder` if there is one.

    Everything random in step k is a function of (config.seed, k, row of the global batch), so an interrupted run
    continues bit for bit. SIGTERM and Ctrl-C make a checkpoint and return. Under `torchrun` each process calls this
    with its share of the batches; files are written by process 0, and `folder` must be one that all can read.

    Args:
        model: trained in place, on `device`. Its weights afterwards are the last; the averages are in the checkpoint.
        objective: `objective(model, x_0, cond, generator) -> (B,)`; where it has `losses`, that is called instead and
            returns a record of `loss`, `t`, `half_log_snr`. One that is a module is trained and saved too. Such a
            module may have `settle(gather)`, called once per step before the weights move (`gather` joins the rows of
            all processes), and `diagnostics()`, numbers by name for `metrics.jsonl`.
        loader: `batch(k) -> (x, cond)`, this process's rows of global batch k = 0, 1, ...; `prefetch(start, stop)`,
            an iterator over the same, is used where it exists.
        config: the numbers.
        folder: the run folder.
        on_sample: called with the step and a copy of the model that has the first average as weights, every
            `sample_every` steps, in process 0.
        on_log: called with each record of `metrics.jsonl`, in process 0.
        device: "cpu", "cuda", ...
        fingerprint: nested dict of what may not change between sessions of a run; default: the configuration.

    Raises:
        TrainingError: a loss or gradient is not finite; the batch is saved.
        RunError: the folder is in use, the recipe has changed, the disk is full, or another process is gone.
        CheckpointError: there are checkpoints, but none is whole or fits the model.
        ArgumentError: device or loader do not fit. DataError: the loader ends early.
    """
    folder = Path(folder)
    facts = run_folder.plain(fingerprint if fingerprint is not None else {"training": config.as_dict()})
    with ExitStack() as stack:
        world = stack.enter_context(join(device, config.timeout))
        _check_loader(loader, config, world)
        world.from_main("the lock of the run folder", lambda: stack.enter_context(run_folder.locked(folder)))
        stop = stack.enter_context(run_folder.stop_request())
        stack.enter_context(_private_random_numbers(world.device))
        learner = Learner(model, objective, config, world)
        session = stack.enter_context(closing(Session(learner, folder, facts)))
        step, stopping = session.resume(), False
        batches = stack.enter_context(closing(_batches(loader, step, config.steps)))
        for k, (x, cond) in batches:
            with world.phase(f"step {k + 1}"):
                session.step(k, x, cond)
            step, stopping = k + 1, world.any(bool(stop), f"the end of step {k + 1}")
            last = step == config.steps
            if last or _due(step, config.log_every):
                session.log(step, on_log)
            if _due(step, config.snapshot_every):
                session.snapshot(step)
            if last or stopping or _due(step, config.checkpoint_every):
                session.save(step)
            if on_sample is not None and not stopping and _due(step, config.sample_every):
                session.sample(step, on_sample)
            if stopping:
                break
        return TrainResult(step, session.seconds(), stopping and step < config.steps)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _batches(loader: Any, start: int, stop: int) -> Generator[tuple[int, tuple[Tensor, Cond]], None, None]:
    """(k, batch k) for k = start ... stop - 1."""
    ahead = loader.prefetch(start, stop) if hasattr(loader, "prefetch") else map(loader.batch, range(start, stop))
    batches = iter(ahead)
    try:
        for k in range(start, stop):
            batch = next(batches, None)
            if batch is None:
                raise DataError(f"the data ended before step {k + 1} of {stop}: train fewer steps")
            yield k, batch
    finally:
        # A loader's iterator may own a thread.
        getattr(batches, "close", lambda: None)()


def _check_loader(loader: Any, config: TrainConfig, world: World) -> None:
    if config.batch % world.size:
        raise ArgumentError(f"training.batch is {config.batch}: expected a multiple of the {world.size} processes")
    for name, expected in (("batch_size", config.batch), ("rank", world.rank), ("world", world.size)):
        given = getattr(loader, name, expected)
        if given != expected:
            raise ArgumentError(f"the loader has {name} {given}: this run has {expected}")


@contextmanager
def _private_random_numbers(device: torch.device) -> Iterator[None]:
    """Torch's global generators, which dropout draws from, are given back to the caller as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
