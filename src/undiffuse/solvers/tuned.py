"""Solvers as tables of numbers: any that is linear in x and in the denoiser's answers, for one number of calls.

With `y = x / hypot(alpha, sigma)` (Prop. 6.3.3; the flow is one curve on every path), every deterministic solver of
this library, on a grid, asks at angles psi_i about

    u_i = a_i y + sum over j < i of b_ij D_j,    D_i = E[x_0 | u_i, psi_i],    i = 0 ... n - 1,

y its start, and ends in u_n. Nothing says that a step goes on from the one before it, or that the sum lies at the
level at which it is asked about: such solvers are non-stationary (Shaul et al. 2024, "Bespoke Non-Stationary
Solvers", there with the velocity). `tune` fits the numbers to a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.sums import weighted_sum
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.base import Course, Event, Field, Noise, Scalar, Solver
from undiffuse.solvers.grids import check_grid
from undiffuse.solvers.integrate import integrate
from undiffuse.solvers.table_file import unpacked, usable, written

MOST_CALLS = 64
# Two paths are one where their angles and sizes agree here, at as many equal times.
_PLACES = 9
_SAME = 1e-6


@dataclass(frozen=True)
class Tuned(Solver):
    """A linear solver of n calls, its every number free; made by `tune`, `linear_table` or `Tuned.load`.

    It is for one path and one shape of data, and for n steps. Its states on the way are what the denoiser was asked
    about.

    Args:
        angles: psi_i, at which the denoiser is asked, not rising (n,).
        weights: row i is `(a_i, b_i0 ... b_i,i-1)`, n + 1 rows.
        profile: what the path is: rows (angle, hypot(alpha, sigma)) at equal times from t_min to t_max.
        path: it in words.
        event: the shape of the data; None: any.
        prediction: of the network that it was fitted to; None: any.
        about: how it was made, for people.

    Raises:
        ArgumentError: not such numbers, or one that is not finite.
    """

    order: ClassVar[float] = math.nan  # of a single number of steps: there is nothing that converges
    evals_per_step: ClassVar[int] = 1
    at_once: ClassVar[bool] = True

    angles: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    profile: tuple[tuple[float, float], ...]
    path: str
    event: tuple[int, ...] | None = None
    prediction: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        n = len(self.angles)
        if not 1 <= n <= MOST_CALLS:
            raise ArgumentError(f"a table of {n} calls: expected 1 to {MOST_CALLS}")
        if [len(row) for row in self.weights] != list(range(1, n + 2)):
            raise ArgumentError(f"weights of a table of {n} calls: expected {n + 1} rows of 1, 2, ... {n + 1} numbers")
        if not all(map(math.isfinite, (*self.angles, *(w for row in self.weights for w in row)))):
            raise ArgumentError("a table of a solver holds a number that is infinite or NaN: make it anew")
        if any(a < b for a, b in zip(self.angles, self.angles[1:])):
            raise ArgumentError("angles of a table must not rise: they go from noise to data")

    @property
    def calls(self) -> int:
        """n."""
        return len(self.angles)

    @property
    def made_for(self) -> int:  # type: ignore[override]
        return self.calls

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """The path's ends, and between them the times at which calls 2 to n are made."""
        self.for_steps(steps)
        self.check_path(path)
        ends = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
        return torch.cat([ends[:1], self.times(path)[1:], ends[1:]])

    def for_steps(self, steps: int) -> Tuned:
        if steps != self.calls:
            raise ArgumentError(
                f"steps is {steps}: this solver was made for {self.calls} calls, and has no numbers for another count. "
                f"Give steps={self.calls}, or tune one for {steps}"
            )
        return self

    def for_event(self, event: Sequence[int]) -> Tuned:
        if self.event is not None and tuple(event) != self.event:
            raise ArgumentError(
                f"samples of shape {tuple(event)}: this solver was tuned for {self.event}. Tune one for that shape, or "
                "take this one at your own risk: dataclasses.replace(solver, event=None)"
            )
        return self

    def check_path(self, path: Path) -> None:
        """Refuse another path than the one that the table is of.

        Raises:
            ArgumentError: says which it is of.
        """
        if not same_path(self.profile, path):
            raise ArgumentError(
                f"this solver was made for the path {self.path}, not for {path}: tune one on that, or sample with "
                "ud.on_path(denoiser, that path)"
            )

    def times(self, path: Path) -> Float[Tensor, " n"]:
        """When the denoiser is asked."""
        return path.time_of_angle(torch.tensor(self.angles, dtype=torch.float64)).clamp(path.t_min, path.t_max)

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        raise NotImplementedError("a table is run as a whole: Tuned.run")

    def run(self, field: Field, x: Event, grid: Float[Tensor, " n"], keep: bool = False) -> Course:
        self._check(field, grid)
        times, known, states = self.times(field.path), [x], []
        ends = torch.cat([times, grid[-1:]])
        size, start = (torch.hypot(field.path.alpha(t), field.path.sigma(t)) for t in (ends, grid[0]))
        for i, row in enumerate(self.weights):
            scale = float(size[i])
            states.append(weighted_sum(known, [scale * row[0] / float(start), *(scale * w for w in row[1:])]))
            if i < self.calls:
                known.append(field(states[-1], times[i]))
        if not keep:
            return Course(states[-1])
        return Course(states[-1], torch.stack([x, *states[1:]]), torch.stack(known[1:]))

    def _check(self, field: Field, grid: Tensor) -> None:
        self.check_path(field.path)
        if not torch.allclose(grid, self.default_grid(field.path, len(grid) - 1), rtol=_SAME, atol=1e-9):
            raise ArgumentError("grid: a tuned solver has times of its own; leave the grid out")
        theirs = prediction_of(getattr(field, "field", field))
        if None not in (self.prediction, theirs) and theirs != self.prediction:
            raise ArgumentError(
                f"this solver was tuned for a network that predicts '{self.prediction}', not '{theirs}': tune another"
            )

    def save(self, file: str | File) -> File:
        """Write it as safetensors: under another name first, synced, then renamed."""
        n = self.calls
        rows = [[*row, *[0.0] * (n + 1 - len(row))] for row in self.weights]
        tensors = {"angles": self.angles, "weights": rows, "profile": self.profile}
        words = {"path": self.path, "event": self.event, "prediction": self.prediction, "about": dict(self.about)}
        return written(file, tensors, words)

    @classmethod
    def load(cls, file: str | File) -> Tuned:
        """What `save` wrote.

        Raises:
            CheckpointError: it is not there, or not whole, or no such file.
        """
        tensors, words = unpacked(File(file))
        with usable(file, "solver", "Tune it again"):
            angles, weights, profile = (tensors[k].tolist() for k in ("angles", "weights", "profile"))
            return cls(
                angles=tuple(angles),
                weights=tuple(tuple(row[: i + 1]) for i, row in enumerate(weights)),
                profile=tuple((a, b) for a, b in profile),
                path=str(words["path"]),
                event=None if words["event"] is None else tuple(words["event"]),
                prediction=words["prediction"],
                about=words["about"],
            )

    def with_about(self, **more: Any) -> Tuned:
        """With more said of how it was made."""
        return replace(self, about={**self.about, **more})


def profile_of(path: Path) -> tuple[tuple[float, float], ...]:
    """Angle and `hypot(alpha, sigma)` at equal times from t_min to t_max: what tells a path from another."""
    times = torch.linspace(path.t_min, path.t_max, _PLACES, dtype=torch.float64)
    return tuple(zip(path.angle(times).tolist(), torch.hypot(path.alpha(times), path.sigma(times)).tolist()))


def same_path(profile: Sequence[Sequence[float]], path: Path) -> bool:
    """Whether a profile is that of a path."""
    known, own = torch.tensor(profile), torch.tensor(profile_of(path))
    return known.shape == own.shape and torch.allclose(known, own, rtol=_SAME, atol=_SAME)


def prediction_of(denoiser: object) -> str | None:
    """The name of what a network predicts, where it says so."""
    return getattr(getattr(denoiser, "prediction", None), "name", None)


class _Recorder(Denoiser):
    """Answers its k-th question with the k-th unit vector, so that x becomes the weights that made it."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.asked: list[tuple[float, Tensor]] = []

    def forward(self, x_t: Tensor, t: Any, cond: Any = None) -> Tensor:
        self.asked.append((float(t), x_t[0].clone()))
        answer = torch.zeros_like(x_t)
        answer[0, len(self.asked)] = 1.0
        return answer


def linear_table(solver: Solver, path: Path, steps: int, event: Sequence[int], grid: Tensor | None = None) -> Tuned:
    """The table of a deterministic solver with that many steps: its run is the solver's, to rounding.

    Of a solver that chooses by the model's answers (`abm-4`) it is the table of its usual choice.

    Args:
        solver: not adaptive, and not one that solves all steps at once.
        path: on which it goes.
        steps: of the solver.
        event: the shape of the data, on which a solver's grid may depend.
        grid: None: the solver's own.

    Raises:
        ArgumentError: a solver of another kind, or one that takes more than 64 calls, or no table.
    """
    if solver.stochastic or solver.adaptive or solver.at_once:
        raise ArgumentError(f"{solver!r} is no table of numbers: expected a deterministic solver of fixed steps")
    made = solver.for_event(tuple(event)).unconditional()
    times = made.default_grid(path, steps) if grid is None else check_grid(path, grid)
    if len(times) != steps + 1:
        raise ArgumentError(f"grid has {len(times)} times: expected {steps + 1} for {steps} steps")
    recorder = _Recorder(path)
    x = torch.zeros(1, 2 + steps * max(1, math.ceil(made.evals_per_step)), dtype=torch.float64)
    x[0, 0] = 1.0
    end = integrate(recorder, x, times, made)[0]
    asked = torch.tensor([t for t, _ in recorder.asked], dtype=torch.float64)
    at = torch.cat([asked, times[-1:]])
    rows = torch.stack([*(row for _, row in recorder.asked), end])
    rows = rows / torch.hypot(path.alpha(at), path.sigma(at))[:, None]
    rows[:, 0] *= torch.hypot(path.alpha(times[0]), path.sigma(times[0]))
    return Tuned(
        angles=tuple(path.angle(asked).tolist()),
        weights=tuple(tuple(row[: i + 1].tolist()) for i, row in enumerate(rows)),
        profile=profile_of(path),
        path=repr(path),
        event=tuple(event),
    )
