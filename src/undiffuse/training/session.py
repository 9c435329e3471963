"""A training session: steps, records, samples and checkpoints in a run folder, and taking it up again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.training.checkpoint import checkpoint_shelf, save_checkpoint
from undiffuse.training.conditions import Cond, map_cond
from undiffuse.training.failure import save_failed_step
from undiffuse.training.files import clean
from undiffuse.training.learner import Learner
from undiffuse.training.losses import Losses
from undiffuse.training.optim import Scalar, learning_rate
from undiffuse.training.posthoc import snapshot_shelf
from undiffuse.training.precision import to_device
from undiffuse.training.records import KINDS, Meter, MetricsFile, Record, Tracker, means
from undiffuse.training.run_folder import refuse_changes

OnSample = Callable[[int, nn.Module], Any]
OnLog = Callable[[Record], Any]


class Session:
    """A learner at work in a run folder. All processes call every method, at the same step; the first one writes.

    Args:
        learner: what is trained.
        folder: the run folder, held by this run.
        facts: what may not change between sessions of a run, as JSON.
    """

    def __init__(self, learner: Learner, folder: Path, facts: Mapping[str, Any]):
        self.learner, self.folder, self.facts = learner, folder, facts
        self.config, self.world = learner.config, learner.world
        self.meter = Meter(self.world.device)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.trackers: list[Tracker] = []
        self._seconds_before, self._began = 0.0, time.monotonic()
        self._last_log = (0, self._began)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def seconds(self) -> float:
        """Time spent training, earlier sessions included."""
        return self._seconds_before + time.monotonic() - self._began

    # ------------------------------------------------------------ steps

    def step(self, k: int, x: Tensor, cond: Cond) -> None:
        """Step k = 0, 1, ... on this process's rows of global batch k."""
        if len(x) * self.world.size != self.config.batch:
            raise ArgumentError(
                f"the loader gave {len(x)} samples to each of {self.world.size} processes: "
                f"expected {self.config.batch} in all (training.batch)"
            )
        x = to_device(x, self.config, self.world.device)
        cond = map_cond(cond, lambda value: value.to(self.world.device, non_blocking=True))
        losses, norm = self.learner.gradient(k, x, cond)
        self._refuse_non_finite(k, (x, cond), losses, norm)
        self.learner.settle()
        self.learner.update(k)
        self.meter.add(losses.loss, losses.half_log_snr, norm)

    def _refuse_non_finite(self, k: int, batch: tuple[Tensor, Cond], losses: Losses, norm: Scalar) -> None:
        """The step's one synchronisation with the device. The step has changed nothing yet."""
        fine = bool(torch.isfinite(losses.loss).all() & torch.isfinite(norm))
        if not self.world.any(not fine, f"the check of step {k + 1}"):
            return
        part = "" if self.world.is_main else f"-process-{self.world.rank}"
        stem = self.folder / f"failed-step-{k + 1:07d}{part}"
        first = self.world.rank * len(losses.loss)
        facts = {"seed": self.config.seed, "k": k, "first_row": first, "lr": learning_rate(self.config, k)}
        error = save_failed_step(stem, k + 1, batch, losses, norm, facts)
        # The first process to fail has the launcher end the others: not before all have saved theirs.
        self.world.any(True, "the saving of the failed batch")
        raise error

    # ------------------------------------------------------------ records

    def log(self, step: int, on_log: OnLog | None) -> None:
        """Write the means since the last record."""
        sums = self.world.sum(self.meter.sums, f"the record of step {step}")
        self.meter.reset()
        now = time.monotonic()
        (last_step, last_time), self._last_log = self._last_log, (step, now)
        rate = (step - last_step) * self.config.batch / max(now - last_time, 1e-9)  # the clock's resolution
        record: Record = {
            "step": step,
            "steps": self.config.steps,
            **means(sums),
            **self.learner.diagnostics(),
            "lr": learning_rate(self.config, step - 1),
            "images_per_second": rate,
            "seconds": self.seconds(),
            "eta_seconds": (self.config.steps - step) * self.config.batch / rate,
        }
        if self.world.is_main:
            self.metrics.write(record)
            for tracker in self.trackers:
                tracker.write(record)
            if on_log is not None:
                on_log(record)

    def sample(self, step: int, on_sample: OnSample) -> None:
        """Hand an averaged copy of the model to the caller; the others wait."""

        def show() -> None:
            on_sample(step, self.learner.averages.averaged(self.learner.model))

        self.world.from_main(f"the samples of step {step}", show)

    # ------------------------------------------------------------ saving and resuming

    def save(self, step: int) -> None:
        """A checkpoint of everything that the next step depends on."""
        sums = self.world.sum(self.meter.sums, f"the sums of step {step}")
        self.meter.reset()
        if self.world.is_main:
            self.meter.sums.copy_(sums)

        def write() -> None:
            self.metrics.sync()
            state = {
                "fingerprint": self.facts,
                "averages": [kind.name for kind in self.learner.averages.kinds],
                "seconds": self.seconds(),
                "sums": sums.tolist(),
                "torch": torch.__version__,
            }
            save_checkpoint(self.folder, step, self.learner.tensors(), state, self.config.keep)

        self.world.from_main(f"the checkpoint of step {step}", write)

    def snapshot(self, step: int) -> None:
        """The power-function averages, from which others are rebuilt after training."""
        names = [f"power-{width:g}" for width in self.config.ema_power]

        def write() -> None:
            every = self.learner.averages.tensors()
            kept = {key: value for key, value in every.items() if key.split("/")[0] in names}
            state = {"averages": names, "widths": list(self.config.ema_power)}
            snapshot_shelf(self.folder).save(step, {"ema": kept}, state)

        self.world.from_main(f"the snapshot of step {step}", write)

    def resume(self) -> int:
        """Take up the newest whole checkpoint; returns the steps done (0: a new run)."""
        step = self.world.from_main("the search for a checkpoint", self._prepare_folder)
        if step:
            checkpoint = checkpoint_shelf(self.folder).load(step)
            self.learner.restore(checkpoint)
            self._seconds_before = float(checkpoint.state["seconds"])
            if self.world.is_main:
                self.meter.sums.copy_(torch.tensor(checkpoint.state["sums"], dtype=torch.float64))
        if self.world.is_main:
            self.trackers = [KINDS[name](self.folder, step, self.facts) for name in self.config.trackers]
        self._began = time.monotonic()
        self._last_log = (step, self._began)
        return step

    def _prepare_folder(self) -> int:
        """Remove the remains of an interruption, choose the checkpoint, and drop what lies beyond it."""
        shelf, snapshots = checkpoint_shelf(self.folder), snapshot_shelf(self.folder)
        for place in (self.folder, shelf.folder, snapshots.folder):
            clean(place)
        found, problems = shelf.newest_whole()
        if found is None and problems:
            raise CheckpointError(
                f"no checkpoint in {shelf.folder} is whole: {'; '.join(problems)}. "
                "Give another run folder, or move these away to start anew"
            )
        step = found.step if found else 0
        for problem in problems:
            warnings.warn(f"damaged checkpoint left as it is, resuming from step {step}: {problem}", stacklevel=2)
        if found:
            refuse_changes(found.state["fingerprint"], self.facts, self.folder)
        self.metrics.rewind(step)
        snapshots.drop_after(step)
        return step
