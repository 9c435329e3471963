"""Power-function averages of any width, rebuilt after training from snapshots of a few (Karras et al. 2024, sec. 3).

The average of exponent g at step t gives the weights of step i the share  (i^(g+1) - (i-1)^(g+1)) / t^(g+1),  the
integral over (i - 1, i] of the profile  f_{g,t}(s) = (g + 1) s^g / t^(g+1)  on (0, t]. A combination sum_j x_j f_j of
the snapshots' profiles that is close to a wanted profile f is therefore, on the same coefficients, close to the
wanted average. We minimise  |sum_j x_j f_j - f|^2  subject to  sum_j x_j = 1,  so that weights that have stopped
moving are rebuilt exactly. All inner products are closed forms:

    <f_{g,t}, f_{h,u}> = (g + 1)(h + 1) / (g + h + 1) * m^(g+h+1) / (t^(g+1) u^(h+1)),   m = min(t, u).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from undiffuse.core.errors import RunError
from undiffuse.training.checkpoint import Checkpoint, Shelf
from undiffuse.training.ema import Power, gamma_of

Profile = tuple[float, float]  # (exponent, last step)


def snapshot_shelf(folder: str | Path) -> Shelf:
    """Where the snapshots of a run folder lie."""
    return Shelf(Path(folder) / "snapshots")


def inner_product(a: Profile, b: Profile) -> float:
    """<f_a, f_b> as in the head of this file, in logarithms so that large exponents do not overflow."""
    (g, t), (h, u) = a, b
    log_ratio = (g + h + 1) * np.log(min(t, u)) - (g + 1) * np.log(t) - (h + 1) * np.log(u)
    return float((g + 1) * (h + 1) / (g + h + 1) * np.exp(log_ratio))


def combination(profiles: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Coefficients x, summing to one, of the combination of `profiles` nearest to `wanted`.

    Stationary point of the Lagrangian: [[A, 1], [1', 0]] [x, multiplier] = [b, 1]. The profiles are scaled to unit
    norm first, and the least-norm solution is taken, since neighbouring snapshots are nearly parallel.
    """
    n = len(profiles)
    norms = np.sqrt([inner_product(p, p) for p in profiles])
    gram = np.array([[inner_product(p, q) for q in profiles] for p in profiles]) / np.outer(norms, norms)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = gram
    system[:n, n] = system[n, :n] = 1 / norms * norms.min()
    right = np.append(np.array([inner_product(p, wanted) for p in profiles]) / norms, norms.min())
    scaled = np.linalg.lstsq(system, right, rcond=None)[0][:n]
    return scaled / norms


def rebuild(folder: str | Path, width: float, step: int | None = None) -> dict[str, Tensor]:
    """The power average of relative width `width` at step `step`, by parameter name, from the run's snapshots.

    Args:
        folder: a run folder trained with `ema_power` and `snapshot_every`.
        width: any width in (0, 0.288]; the nearer to the tracked ones, the more exact.
        step: the step of a snapshot; None: the newest.

    Raises:
        RunError: no snapshots, or none at `step`. CheckpointError: a snapshot is damaged.
    """
    shelf = snapshot_shelf(folder)
    steps = shelf.steps()
    if not steps or (step is not None and step not in steps):
        raise RunError(
            f"{shelf.folder} has no snapshot{'' if step is None else f' of step {step}'}: it has {steps or 'none'}. "
            "Train with training.ema_power and training.snapshot_every"
        )
    last = step or steps[-1]
    snapshots = [shelf.load(s) for s in steps if s <= last]
    sources = [(snapshot, float(width)) for snapshot in snapshots for width in snapshot.state["widths"]]
    coefficients = combination(
        [(gamma_of(w), float(snapshot.step)) for snapshot, w in sources], (gamma_of(width), float(last))
    )
    return _weighted_sum([(s, Power(w).name) for s, w in sources], coefficients)


def _weighted_sum(sources: Sequence[tuple[Checkpoint, str]], coefficients: np.ndarray) -> dict[str, Tensor]:
    """Sum of the averages in float64 (the coefficients alternate in sign), one snapshot in memory at a time."""
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for (snapshot, name), coefficient in zip(sources, coefficients):
        for parameter, value in snapshot.average(name).items():
            kinds[parameter] = value.dtype
            part = value.to(torch.float64) * float(coefficient)
            total[parameter] = total[parameter].add_(part) if parameter in total else part
    return {name: value.to(kinds[name]) for name, value in total.items()}
