"""`tune`: the numbers of a solver of few calls, fitted to a model's own trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from torch import Tensor

from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.base import Cond, Solver
from undiffuse.solvers.comparing import OWN
from undiffuse.solvers.curves import Curves
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.ends import Ends, check_counts, noises, relative, squares
from undiffuse.solvers.grids import make_grid
from undiffuse.solvers.integrate import get_solver
from undiffuse.solvers.places import Places
from undiffuse.solvers.sampling import sample
from undiffuse.solvers.tuned import MOST_CALLS, Tuned, linear_table, prediction_of

LEAST = 32
# A generation of grids, the best of it that say where the next one is, how far the first is spread, and the least that
# a later one is. A search ends when the score has not fallen by this much in so many generations.
_GENERATION, _BEST, _SPREAD, _NARROWEST, _FALL, _PATIENCE = 24, 6, 0.4, 0.02, 0.01, 2
# Directions of a regression fainter than this, of the mean square, are rounding.
_FAINT = 1e-14
# Rounds of weighing the end's errors anew.
_ROUNDS = 6

# How many numbers move the angles.
_NUMBERS = 4
Point = Float[np.ndarray, " 4"]


class Progress(NamedTuple):
    """What `tune` tells its callback.

    Attributes:
        stage: "reference", "fit" or "measure".
        done, total: how many noises or grids of it; fits may end before their total.
        error: of the best so far as a share of the start's: RMS and median, as `tune` weighs them.
    """

    stage: str
    done: int
    total: int
    error: float = 1.0


def tune(
    denoiser: Denoiser,
    event: Sequence[int],
    calls: int = 8,
    *,
    n: int = 512,
    seed: int = 0,
    cond: Cond = None,
    start: str | Solver = "abm-4",
    grids: Sequence[str] = (OWN, "angle"),
    reference: int = 100,
    batch: int = 256,
    most_steps: int = 126,
    callback: Callable[[Progress], object] | None = None,
) -> Tuned:
    """A solver of that many calls, fitted to n trajectories of this denoiser, which is only called.

    For given angles the weights of a `Tuned` follow by regression, row by row: of all sums of the start and the answers
    so far, the one nearest to where the trajectories are at the next angle; at the end the few that went to another
    mode weigh little. A search over four numbers moves the angles (cross-entropy method: each generation of grids lies
    around the mean of the last one's best), once from each of `grids`, and stops when `RMS^2 median` of the ends'
    errors stops falling. Half of the noises make the weights, they and a quarter more are scored, and in the end make
    them again; a quarter is only measured, before and after: `solver.about` has `before` and `after`, each `rms` and
    `median` of the distance to the true end relative to the RMS length of the ends, and `grid`, from which it came.
    True is what `reference` steps find: of errors below theirs nothing is known.

    All curves are kept in memory: `reference + 1` states of n samples.

    Args:
        denoiser: any; guided ones too.
        event: the shape of its data.
        calls: 1 to 64.
        n: noises, at least 32.
        seed: of them.
        cond: for all n of them.
        start: the solver, of as many steps as calls, that is to be improved; where nothing does, it is what comes back.
        grids: its times to begin with, one search from each: "own", or names of grids. `before` is of the first.
        reference: steps of the 'abm-4' that makes the true trajectories.
        batch: trajectories at a time.
        most_steps: grids tried of each search.
        callback: told of what is done.

    Raises:
        ArgumentError: an argument out of its range; a start that does not take `calls` calls in as many steps; no
            grid, or an unknown one; curves that do not fit into memory.
        SamplingError: the reference, or the start's run, is not finite; the start has no error.
    """
    check_counts(
        calls=(calls, 1, MOST_CALLS),
        n=(n, LEAST, math.inf),
        reference=(reference, 2, math.inf),
        batch=(batch, 1, math.inf),
        most_steps=(most_steps, 1, math.inf),
    )
    tell = callback or (lambda progress: None)
    tables = _tables(get_solver(start), grids, denoiser.path, calls, event)
    first, *_ = tables.values()
    scored = 3 * n // 4
    with evaluating(denoiser), torch.no_grad():
        starts = noises(denoiser, tuple(event), cond, n, seed)
        curves = Curves.of(denoiser, starts, reference, batch, lambda done: tell(Progress("reference", done, n)))
        before = _score(_distances(denoiser, first, curves.ends.rows(0, scored), batch))
        if before == -math.inf:
            raise SamplingError("the start has no error on half of the noises: there is nothing to be tuned")
        regression = _Regression(denoiser, curves, n // 2, scored, batch)
        best, solver, grid, tried = before, first, next(iter(tables)), 0
        for k, (name, table) in enumerate(tables.items()):
            places = _Angles(denoiser, table.angles)

            def told(count: int, least: float, done: int = k * most_steps, best: float = best) -> None:
                error = math.exp(min(least, best) - before)
                tell(Progress("fit", done + count, len(tables) * most_steps, error))

            z, least, count = _search(lambda z, at=places: _score(regression(at(z))[1]), most_steps, seed, told)
            if least < best:
                best, grid, tried, angles = least, name, count, places(z)
                weights = tuple(tuple(row.tolist()) for row in regression(angles, of_all=True)[0])
                solver = replace(first, angles=tuple(angles), weights=weights)
        kept = curves.ends.rows(scored, n)
        errors = [relative(_distances(denoiser, made, kept, batch), kept) for made in (first, solver)]
    tell(Progress("measure", 1, 1))
    solver = replace(solver, prediction=prediction_of(denoiser))
    made = {"n": n, "seed": seed, "start": str(start), "grid": grid, "steps": tried, "reference": reference}
    return solver.with_about(**made, before=errors[0], after=errors[1])


def _tables(solver: Solver, grids: Sequence[str], path: Path, calls: int, event: Sequence[int]) -> dict[str, Tuned]:
    """The start on each of the grids; on those that are the same, once."""
    if isinstance(grids, str) or not grids:
        raise ArgumentError(f"grids is {grids!r}: expected names of grids to begin with, such as ('own', 'angle')")
    tables: dict[str, Tuned] = {}
    for grid in grids:
        table = linear_table(solver, path, calls, event, None if grid == OWN else make_grid(path, calls, grid))
        if table.calls != calls:
            raise ArgumentError(
                f"start {solver!r}: {calls} steps of it take {table.calls} calls; take one of a call a step"
            )
        if table not in tables.values():
            tables[grid] = table
    return tables


def _scales(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    return path.alpha(t), path.sigma(t)


def _distances(denoiser: Denoiser, solver: Solver, ends: Ends, batch: int) -> Float[Tensor, " b"]:
    """How far from their true ends the solver's are."""
    far = []
    for part in ends.batches(batch):
        x = sample(denoiser, noise=part.start, solver=solver, cond=part.cond, device=part.start.device)
        assert isinstance(x, Tensor)
        far.append(squares(x - part.x).sqrt())
    return torch.cat(far).cpu()


def _score(distances: Tensor) -> float:
    """`log(RMS^2 median) / 3`; infinite where there is no such number."""
    value = float(distances.square().mean().log() + distances.median().log()) / 3
    return math.inf if math.isnan(value) else value


class _Angles:
    """Angles as a point z of four numbers; 0 is the start.

    The first moves the logarithm of the first gap, the others those of the rest by Legendre's polynomials of degree 1
    to 3 in the number of the gap.
    """

    def __init__(self, denoiser: Denoiser, angles: Sequence[float]):
        self.places, n = Places(denoiser, angles), len(angles)
        self.moves = np.zeros((n + 1, _NUMBERS))
        self.moves[0, 0] = 1
        self.moves[1:, 1:] = legendre.legvander(np.linspace(-1, 1, n), _NUMBERS - 1)[:, 1:]

    def __call__(self, z: Point) -> list[float]:
        return self.places(torch.from_numpy(self.moves @ z)).tolist()


class _Regression:
    """Rows of a table for given angles, each the sum of what is known that is nearest to the curves."""

    def __init__(self, denoiser: Denoiser, curves: Curves, fitted: int, scored: int, batch: int):
        self.denoiser, self.curves, self.batch = denoiser, curves, batch
        self.fitted, self.scored, self.ends = fitted, scored, curves.ends.rows(0, scored)
        self.size = float(torch.hypot(*_scales(denoiser.path, torch.tensor(denoiser.path.t_min, dtype=torch.float64))))

    def __call__(self, angles: Sequence[float], of_all: bool = False) -> tuple[list[Tensor], Float[Tensor, " b"]]:
        """Rows, by the curves that are fitted or by all that are scored, and how far from their ends all are then."""
        path, start = self.denoiser.path, self.curves.y[0, : self.scored]
        some = (self.scored if of_all else self.fitted) * start[0].numel()
        known = torch.empty(len(angles) + 1, start.numel(), dtype=torch.float64, device=start.device)
        known[0] = start.flatten()
        rows: list[Tensor] = []
        times = path.time_of_angle(torch.tensor(angles, dtype=torch.float64)).clamp(path.t_min, path.t_max)
        sizes = torch.hypot(*_scales(path, times)).tolist()
        for k, (angle, time, size) in enumerate(zip(angles, times.tolist(), sizes), start=1):
            goal = self.curves.at(angle)[: self.scored].flatten().double()
            rows.append(_nearest(known[:k, :some], goal[:some]))
            x = (size * (rows[-1] @ known[:k])).to(start).view_as(start)
            known[k] = self._asked(x, time).flatten()
        goal, weights = self.ends.x.flatten().double() / self.size, torch.ones_like(known[0])
        for _ in range(_ROUNDS):
            last = _nearest(known[:, :some], goal[:some], weights[:some])
            far = squares((last @ known - goal).view_as(start))
            weights = (1 / (far + far.median()).clamp(min=torch.finfo(far.dtype).tiny)).repeat_interleave(
                start[0].numel()
            )
        return [*rows, last], self.size * far.sqrt().cpu()

    def _asked(self, x: Tensor, time: float) -> Tensor:
        parts = zip(x.split(self.batch), self.ends.batches(self.batch))
        return torch.cat([self.denoiser(part, time, ends.cond) for part, ends in parts])


def _nearest(known: Tensor, goal: Tensor, weights: Tensor | None = None) -> Float[Tensor, " k"]:
    """w with the least `|goal - sum_j w_j known_j|^2`, of those the shortest where several have it."""
    weighed = known if weights is None else known * weights
    gram, right = (weighed @ known.T).cpu(), (weighed @ goal).cpu()
    unit = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    gram, right = gram * unit * unit[:, None], right * unit
    if not bool(torch.isfinite(gram).all()):
        return torch.full_like(goal[: len(gram)], math.nan)
    found = torch.linalg.lstsq(gram, right[:, None], rcond=_FAINT, driver="gelsd").solution[:, 0]
    return (found * unit).to(goal)


def _search(
    score: Callable[[Point], float], most: int, seed: int, tell: Callable[[int, float], object]
) -> tuple[Point, float, int]:
    """The point of the least score, that, and how many were tried, 0 first: the cross-entropy method.

    Only the means of generations are candidates: what is best among many points is so by luck too.
    """
    random = np.random.default_rng(seed)
    tried, least = 0, math.inf

    def look(z: Point) -> float:
        nonlocal tried
        value = score(z)
        tried += 1
        tell(tried, least)
        return value

    best = mean = np.zeros(_NUMBERS)
    least, spread, stale = look(mean), np.full(_NUMBERS, _SPREAD), 0
    while stale < _PATIENCE and (size := min(_GENERATION, most - tried - 1)) > 0:
        points = mean + spread * random.standard_normal((size, _NUMBERS))
        scores = np.array([look(z) for z in points])
        chosen = points[[k for k in scores.argsort()[:_BEST] if math.isfinite(scores[k])]]
        if not len(chosen):
            break
        mean, spread = chosen.mean(0), chosen.std(0) + _NARROWEST
        value = look(mean)
        stale = 0 if value < least - _FALL else stale + 1
        if value < least:
            best, least = mean, value
    return best, least, tried
