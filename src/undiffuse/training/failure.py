"""A step that cannot be taken: what it stopped on is saved, and the error says where to look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import TrainingError
from undiffuse.training.conditions import Cond
from undiffuse.training.files import disk_errors, replace_file, write_tensors

# Noise levels listed in the message; the file has all.
_SHOWN = 8


def save_failed_step(
    stem: Path, step: int, batch: tuple[Tensor, Cond], losses: Losses, norm: Tensor, facts: Mapping[str, Any]
) -> TrainingError:
    """Write `<stem>.safetensors` (batch, noise levels, losses) and `<stem>.json`; returns the error to raise."""
    bad = (~torch.isfinite(losses.loss)).nonzero().flatten().tolist()
    message = _message(step, losses, norm, bad)
    x, cond = batch
    conditions = cond if isinstance(cond, dict) else {"cond": cond}
    tensors = {"x": x, **{f"cond/{k}": v for k, v in conditions.items()}, **losses._asdict(), "grad_norm": norm}
    report = {"step": step, "message": message, "bad_rows": bad, "t": _times(losses, bad), **facts}
    with disk_errors(f"{stem}.safetensors", message):
        write_tensors(stem.with_suffix(".safetensors"), {k: v for k, v in tensors.items() if v is not None})
        replace_file(stem.with_suffix(".json"), json.dumps(report, indent=1).encode())
    return TrainingError(
        f"{message}. The batch, noise levels and losses are in {stem}.safetensors; the last checkpoint is untouched. "
        "Resuming takes the same step again: lower training.lr or training.clip, or train in fp32, in a new run folder"
    )


def _message(step: int, losses: Losses, norm: Tensor, bad: list[int]) -> str:
    where = ", ".join(f"{t:.6g}" for t in _times(losses, bad)[:_SHOWN]) or "unknown"
    if bad:
        return f"the loss of step {step} is not finite for {len(bad)} of {len(losses.loss)} samples, at t = {where}"
    if not bool(torch.isfinite(norm)):
        largest = losses.loss.argsort(descending=True)[:_SHOWN].tolist()
        where = ", ".join(f"{t:.6g}" for t in _times(losses, largest)) or "unknown"
        return f"the gradient of step {step} is not finite (all losses are); the largest losses are at t = {where}"
    return f"step {step} is not finite in another process, which says more"


def _times(losses: Losses, rows: list[int]) -> list[float]:
    return [] if losses.t is None else [float(losses.t[row]) for row in rows]
