"""`optimise_grid`: the times of a given solver, fitted to a model's own trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, CheckpointError, SamplingError
from undiffuse.core.files import replace_file
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.base import Cond, Solver, rows_of
from undiffuse.solvers.grids import GRIDS, Grid, make_grid
from undiffuse.solvers.integrate import get_solver
from undiffuse.solvers.sampling import placed, sample
from undiffuse.solvers.table_file import packed, unpacked
from undiffuse.solvers.tuned import MOST_CALLS, profile_of, same_path

LEAST = 16
OWN_GRID = "own"
# Gaps are of the angle's square root, where grids of few steps are nearly equal; each is so much of the whole at least,
# at the beginning.
_POWER, _APART = 0.5, 1e-3
# A gap's logarithm is moved by so much for a difference, and by this at most in a round.
_MOVED, _LONGEST = 1e-3, 0.7
# Below so much of the start's median error an error counts as none.
_FLOOR = 0.01
# Rounds without a fall of the held-out error, and tries of a round with ever more damping.
_PATIENCE, _TRIES = 4, 8
# The least fall of the fitted cost that is worth a round.
_FALL = 1e-6


@dataclass(frozen=True)
class OptimisedGrid:
    """Times that were fitted, what they are for, and how they were made.

    Args:
        times: strictly decreasing, from the path's t_max to its t_min.
        profile, path: of the path, see `Tuned`.
        about: `solver`, `start` (the named grid that was changed), `n`, `seed`, `reference`, `rounds`; `before` (of
            that grid) and `after`, each `rms` and `median` error relative to the RMS of the true ends, on noises that
            neither fitted nor chose.
    """

    times: tuple[float, ...]
    profile: tuple[tuple[float, float], ...]
    path: str
    about: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps(self) -> int:
        """One less than there are times."""
        return len(self.times) - 1

    def grid(self, path: Path) -> Grid:
        """The times, for `ud.sample(..., grid=...)`.

        Raises:
            ArgumentError: another path than they were fitted on.
        """
        if not same_path(self.profile, path):
            raise ArgumentError(f"this grid was fitted on the path {self.path}, not on {path}: fit another")
        return torch.tensor(self.times, dtype=torch.float64)

    def save(self, file: str | File) -> File:
        """Write it as safetensors, whole or not at all."""
        target = File(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"times": self.times, "profile": self.profile}
        words = {"path": self.path, "about": dict(self.about)}
        replace_file(target, packed({k: torch.tensor(v, dtype=torch.float64) for k, v in tensors.items()}, words))
        return target

    @classmethod
    def load(cls, file: str | File) -> OptimisedGrid:
        """What `save` wrote.

        Raises:
            CheckpointError: it is not there, or not whole, or no such file.
        """
        tensors, words = unpacked(File(file))
        try:
            times, profile = tensors["times"].tolist(), tensors["profile"].tolist()
            return cls(tuple(times), tuple((a, b) for a, b in profile), str(words["path"]), words["about"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} holds no grid that can be used: {error}. Fit it again") from error

    def with_about(self, **more: Any) -> OptimisedGrid:
        """With more said of how it was made."""
        return replace(self, about={**self.about, **more})


def optimise_grid(
    denoiser: Denoiser,
    event: Sequence[int],
    steps: int,
    *,
    solver: str | Solver = "abm-4",
    n: int = 96,
    seed: int = 0,
    cond: Cond = None,
    reference: int = 100,
) -> Grid:
    """Times at which a solver ends nearest to this denoiser's own trajectories: `ud.sample(..., grid=times)`.

    Arguments and errors are those of `undiffuse.solvers.fit_grid`, whose result says how much was gained.
    """
    how = {"solver": solver, "n": n, "seed": seed, "cond": cond, "reference": reference}
    return fit_grid(denoiser, event, steps, **how).grid(denoiser.path)


def fit_grid(
    denoiser: Denoiser,
    event: Sequence[int],
    steps: int,
    *,
    solver: str | Solver = "abm-4",
    n: int = 96,
    seed: int = 0,
    cond: Cond = None,
    reference: int = 100,
    batch: int = 256,
    most_rounds: int = 30,
    callback: Callable[[int, int, float], object] | None = None,
) -> OptimisedGrid:
    """Times at which a solver ends nearest to the true ends of n trajectories of this denoiser.

    The solver stays what it is. What falls is the mean of `log(d^2 + floor^2)`, d a trajectory's distance from its true
    end, by Gauss and Newton with Levenberg's damping in the logarithms of the gaps between the angles' square roots;
    derivatives by differences, so the denoiser is only called. It begins with the best of the named grids. Half of the
    noises are fitted, a quarter chooses among all that was seen, named grids included, and says when to stop; a quarter
    is only measured.

    Args:
        denoiser: any; guided ones too.
        event: the shape of its data.
        steps: 1 to 64; of one step there is nothing to fit.
        solver: a name or a solver, deterministic, with steps of its own.
        n: noises, at least 16.
        seed: of them.
        cond: for all n of them.
        reference: steps of the "abm-4" that makes the true ends.
        batch: trajectories at a time.
        most_rounds: of the fit, each of about `steps` runs.
        callback: called with the rounds made, the most, and the held-out error as a share of the best named grid's.

    Raises:
        ArgumentError: an argument out of its range, or a solver that draws noise or chooses its own times.
        SamplingError: the reference is not finite, or no named grid's run is.
    """
    _check(steps, n, reference, batch, most_rounds)
    chosen = _checked(solver)
    ends = _Ends.of(denoiser, tuple(event), cond, n, seed, reference, batch)
    fitted, held, kept = ends.rows(0, n // 2), ends.rows(n // 2, 3 * n // 4), ends.rows(3 * n // 4, n)
    tell = callback or (lambda done, total, error: None)

    def distances(times: Tensor, some: _Ends) -> Tensor:
        return _squares(_runs(denoiser, chosen, times, some, batch) - some.x).sqrt()

    named = _named(denoiser.path, chosen.for_event(tuple(event)), steps)
    far = {name: _tried(lambda t=times: distances(t, fitted)) for name, times in named.items()}
    far = {name: d for name, d in far.items() if d is not None}
    if not far:
        raise SamplingError(f"{solver!r} ends in numbers that are not finite on every named grid: give more steps")
    start = min(far, key=lambda name: float(torch.log(far[name] + 1e-300).mean()))
    unit = float(far[start].median())

    def cost(d: Tensor | None) -> float:
        return math.inf if d is None else float(0.5 * torch.log((d / unit).square() + _FLOOR**2).mean())

    seen = {name: cost(_tried(lambda t=named[name]: distances(t, held))) for name in far}
    first = min(seen, key=lambda name: seen[name])
    best, least, rounds, stale = named[first], seen[first], 0, 0
    form = _Form(denoiser, named[start])
    if steps > 1 and unit > 0:
        for rounds, times in enumerate(_descent(form, denoiser, chosen, fitted, batch, cost, unit), start=1):
            now = cost(_tried(lambda t=times: distances(t, held)))
            stale = 0 if now < least else stale + 1
            if now < least:
                best, least = times, now
            tell(rounds, most_rounds, math.exp(least - seen[first]))
            if rounds >= most_rounds or stale >= _PATIENCE:
                break
    errors = [_relative(distances(times, kept), kept) for times in (named[first], best)]
    made = {"solver": str(solver), "start": first, "n": n, "seed": seed, "reference": reference, "rounds": rounds}
    found = OptimisedGrid(tuple(best.tolist()), profile_of(denoiser.path), repr(denoiser.path))
    return found.with_about(**made, before=errors[0], after=errors[1])


def _check(steps: int, n: int, reference: int, batch: int, most_rounds: int) -> None:
    for name, value, low, high in (
        ("steps", steps, 1, MOST_CALLS),
        ("n", n, LEAST, math.inf),
        ("reference", reference, 2, math.inf),
        ("batch", batch, 1, math.inf),
        ("most_rounds", most_rounds, 1, math.inf),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            span = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ArgumentError(f"{name} is {value!r}: expected a whole number, {span}")


def _checked(given: str | Solver) -> Solver:
    solver = get_solver(given)
    if solver.stochastic or solver.adaptive or solver.made_for is not None or solver.evals_per_step == 0:
        raise ArgumentError(
            f"{given!r} has no times to be fitted: expected a deterministic solver of fixed steps, such as 'dpmpp-2m'"
        )
    return solver


def _named(path: Path, solver: Solver, steps: int) -> dict[str, Grid]:
    """All grids of that many steps which have a name, the solver's own first."""
    found = {OWN_GRID: solver.default_grid(path, steps)}
    for name in GRIDS:
        try:
            found[name] = make_grid(path, steps, name)
        except ArgumentError:  # so many steps that times coincide
            continue
    return found


@dataclass(frozen=True)
class _Ends:
    """Trajectories by their starts and their true ends, and their conditions."""

    start: Tensor
    x: Tensor
    cond: Cond

    @classmethod
    def of(
        cls, denoiser: Denoiser, event: tuple[int, ...], cond: Cond, n: int, seed: int, reference: int, batch: int
    ) -> _Ends:
        weight = next((p for p in (*denoiser.parameters(), *denoiser.buffers()) if p.is_floating_point()), None)
        like = torch.empty(0) if weight is None else weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        z = Streams.of(seed, n).normal((n, *event), dtype=dtype).to(like.device)
        start = z * float(denoiser.path.sigma(torch.tensor(denoiser.path.t_max, dtype=torch.float64)))
        some = cls(start, start, placed(cond, n, like.device))
        return replace(some, x=_runs(denoiser, get_solver("abm-4"), reference, some, batch))

    def rows(self, low: int, high: int) -> _Ends:
        which = torch.arange(low, min(high, len(self.x)))
        return _Ends(self.start[low:high], self.x[low:high], rows_of(self.cond, which))

    def batches(self, size: int) -> Iterator[_Ends]:
        return (self.rows(low, low + size) for low in range(0, len(self.x), size))


def _runs(denoiser: Denoiser, solver: Solver, times: Tensor | int, ends: _Ends, batch: int) -> Tensor:
    """Where a solver ends, on times or in so many steps of its own."""
    how: dict[str, Any] = {"steps": times} if isinstance(times, int) else {"grid": times}
    with torch.no_grad():
        parts = [
            sample(denoiser, noise=part.start, solver=solver, cond=part.cond, device=part.start.device, **how)
            for part in ends.batches(batch)
        ]
    return torch.cat(parts)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _tried(run: Callable[[], Tensor]) -> Tensor | None:
    try:
        return run()
    except SamplingError:
        return None


class _Form:
    """Times of a grid as a point z, 0 where it begins: the logarithms of the gaps, relative to those of the start."""

    def __init__(self, denoiser: Denoiser, start: Grid):
        self.path = denoiser.path
        low = max(self.path.t_min, min(denoiser.t_low, self.path.t_max))
        first, last = self.path.angle(torch.tensor([self.path.t_max, low], dtype=torch.float64)) ** _POWER
        self.first, self.span = first, first - last
        places = torch.cat([first[None], self.path.angle(start[1:-1]) ** _POWER, last[None]])
        self.gaps = (places[:-1] - places[1:]).clamp(min=_APART * float(self.span))
        self.zero = torch.zeros_like(self.gaps)

    def __call__(self, z: Tensor) -> Grid:
        gaps = self.gaps * torch.exp(z)
        places = self.first - self.span * gaps.cumsum(0)[:-1] / gaps.sum()
        inner = self.path.time_of_angle(places ** (1 / _POWER))
        ends = torch.tensor([self.path.t_max, self.path.t_min], dtype=torch.float64)
        return torch.cat([ends[:1], inner, ends[1:]])


def _descent(
    form: _Form,
    denoiser: Denoiser,
    solver: Solver,
    fitted: _Ends,
    batch: int,
    cost: Callable[[Tensor | None], float],
    unit: float,
) -> Iterator[Grid]:
    """Times after each round that lowers the cost of `fitted`, until none does.

    With residuals r = x - truth and weights w = 1 / (d^2 + floor^2) the cost has the gradient mean(w J^T r), and
    mean(w J^T J) is its curvature where the weights hardly change.
    """

    def far(z: Tensor) -> float:
        return cost(_tried(lambda: _squares(_runs(denoiser, solver, form(z), fitted, batch) - fitted.x).sqrt()))

    z, damping, longest = form.zero, 1e-2, _LONGEST
    value = far(z)
    while True:
        try:
            slope, curve = _normal(form, denoiser, solver, fitted, batch, unit, z)
        except SamplingError:  # a run of a neighbouring grid is not finite
            return
        for _ in range(_TRIES):
            scale = torch.diag(curve.diagonal() * damping + 1e-9 * curve.diagonal().max().clamp(min=1e-300))
            move = -torch.linalg.solve(curve + scale, slope)
            size = float(move.abs().max().clamp(min=1e-300))
            move, size = move * min(1.0, longest / size), min(size, longest)
            now = far(z + move)
            if now < value - _FALL:
                z, value, damping, longest = z + move, now, damping / 3, min(_LONGEST, 3 * size)
                yield form(z)
                break
            damping, longest = damping * 5, size / 3
        else:
            return


def _normal(
    form: _Form, denoiser: Denoiser, solver: Solver, ends: _Ends, batch: int, unit: float, z: Tensor
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p p"]]:
    """Gradient and curvature of the cost at z, by forward differences."""
    p = len(z)
    slope, curve = torch.zeros(p, dtype=torch.float64), torch.zeros(p, p, dtype=torch.float64)
    for part in ends.batches(batch):
        x = _runs(denoiser, solver, form(z), part, batch).flatten(1).double()
        r = x - part.x.flatten(1).double()
        weight = (1 / (r.square().sum(1) + (_FLOOR * unit) ** 2)).sqrt()[:, None]
        columns = []
        for k in range(p):
            moved = z.clone()
            moved[k] += _MOVED
            there = _runs(denoiser, solver, form(moved), part, batch).flatten(1).double()
            columns.append(((there - x) / _MOVED * weight).flatten())
        jacobian = torch.stack(columns, 1)
        slope += (jacobian.T @ (r * weight).flatten()).cpu() / len(ends.x)
        curve += (jacobian.T @ jacobian).cpu() / len(ends.x)
    return slope, curve


def _squares(x: Tensor) -> Float[Tensor, " b"]:
    return x.flatten(1).double().square().sum(1).cpu()


def _relative(distances: Tensor, ends: _Ends) -> dict[str, float]:
    """RMS and median relative to the RMS length of the true ends."""
    length = _squares(ends.x).mean().sqrt()
    return {"rms": float(distances.square().mean().sqrt() / length), "median": float(distances.median() / length)}
