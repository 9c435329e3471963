"""What is written down while training: means since the last line, loss by noise level, trackers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import require
from undiffuse.training.files import disk_errors, replace_file, sync
from undiffuse.training.optim import Scalar

Record = dict[str, Any]

# Bins of half log-SNR of width one; the first and last take all that lies beyond. Every path in use is within.
EDGES = tuple(float(edge) for edge in range(-8, 9))
_BINS = len(EDGES) - 1
_SCALARS = 3  # sum of losses, sum of gradient norms, number of norms


class Meter:
    """Sums since the last record, kept on the device: adding costs no synchronisation.

    Layout of `sums`: loss, gradient norm, number of norms, then the sum of losses and the number of samples per bin,
    with one bin more for samples whose noise level is not known.
    """

    def __init__(self, device: torch.device):
        # No float64 on Apple's GPUs.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(_SCALARS + 2 * (_BINS + 1), dtype=dtype, device=device)
        self._inner = torch.tensor(EDGES[1:-1], dtype=dtype, device=device)
        self._bins = torch.arange(_BINS + 1, device=device)

    @torch.no_grad()
    def add(self, loss: Float[Tensor, " b"], half_log_snr: Float[Tensor, " b"] | None, norm: Scalar) -> None:
        """Take in one step."""
        loss = loss.to(self.sums.dtype)
        if half_log_snr is None:
            index = torch.full_like(loss, _BINS, dtype=torch.int64)
        else:
            index = torch.bucketize(half_log_snr.to(self.sums.dtype), self._inner, right=True)
        # A product with the one-hot matrix, not a scatter: the order of the sum is fixed on every device.
        one_hot = (index[:, None] == self._bins).to(self.sums.dtype)
        scalars = torch.stack([loss.sum(), norm.to(self.sums.dtype), torch.ones_like(self.sums[0])])
        self.sums += torch.cat([scalars, loss @ one_hot, one_hot.sum(0)])

    def reset(self) -> None:
        """Begin a new window."""
        self.sums.zero_()


def means(sums: Tensor) -> Record:
    """Loss, gradient norm and loss by noise level from the sums of a `Meter` (of all processes)."""
    loss, norm, steps = sums[:_SCALARS].tolist()
    by_bin, count = (part.tolist() for part in sums[_SCALARS:].reshape(2, -1))
    record = {"loss": loss / max(sum(count), 1.0), "grad_norm": norm / max(steps, 1.0)}
    if sum(count[:_BINS]) > 0:
        record["loss_by_noise"] = {
            "edges": list(EDGES),
            "mean": [total / n if n else None for total, n in zip(by_bin[:_BINS], count)],
            "count": [int(n) for n in count[:_BINS]],
        }
    return record


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, each with its "step"."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, and a last line that an interruption cut short: they will be written again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        with disk_errors(f"{self.path}", "The checkpoints are intact"):
            replace_file(self.path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        consolation = "The checkpoints are intact: free some space, then start again to resume"
        with disk_errors(f"{self.path}", consolation), open(self.path, "a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Have the lines on the disk, before a checkpoint says that they were written."""
        if self.path.exists():
            with disk_errors(f"{self.path}", "The checkpoints are intact"):
                sync(self.path)


def _step_of(line: str) -> float:
    """The step of a line; infinite where it is not a whole record."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Tracker(Protocol):
    """Somewhere else to send the records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run folder. What an interrupted run wrote beyond `step` is hidden."""

    def __init__(self, folder: Path, step: int, facts: Mapping[str, Any]):
        require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if step == 0:
            self._writer.add_text("recipe", f"```\n{json.dumps(facts, indent=1)}\n```")

    def write(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the run folder and taken up again on resuming."""

    def __init__(self, folder: Path, step: int, facts: Mapping[str, Any]):
        # Another run folder of the same name is another run.
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        self._run = require("wandb", "wandb").init(
            project="undiffuse",
            dir=str(folder),
            name=folder.name,
            id=f"{folder.name}-{place}",
            resume="allow",
            config=dict(facts),
        )

    def write(self, record: Record) -> None:
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by name; the loss of a bin is named by its centre in half log-SNR."""
    numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    levels = record.get("loss_by_noise", {"edges": [], "mean": []})
    for low, high, mean in zip(levels["edges"], levels["edges"][1:], levels["mean"]):
        if mean is not None:
            numbers[f"loss_by_noise/{(low + high) / 2:+.1f}"] = mean
    return numbers
