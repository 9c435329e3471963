"""`optimise_grid`: the times of a given solver, fitted to a model's own trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.base import Cond, Solver
from undiffuse.solvers.comparing import OWN
from undiffuse.solvers.ends import Ends, check_counts, relative, squares
from undiffuse.solvers.grids import GRIDS, Grid, make_grid
from undiffuse.solvers.integrate import get_solver
from undiffuse.solvers.optimised_grid import OptimisedGrid
from undiffuse.solvers.places import Places
from undiffuse.solvers.sampling import sample
from undiffuse.solvers.tuned import MOST_CALLS, profile_of

LEAST = 16
# A gap's logarithm is moved by so much for a difference, and by this at most in a round.
_MOVED, _LONGEST = 1e-3, 0.7
# Below so much of the start's median error an error counts as none.
_FLOOR = 0.01
# Rounds without a fall of the held-out error, and tries of a round with ever more damping.
_PATIENCE, _TRIES = 4, 8
# The least fall of the fitted cost that is worth a round.
_FALL = 1e-6


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
    check_counts(
        steps=(steps, 1, MOST_CALLS),
        n=(n, LEAST, math.inf),
        reference=(reference, 2, math.inf),
        batch=(batch, 1, math.inf),
        most_rounds=(most_rounds, 1, math.inf),
    )
    chosen = _checked(solver)
    fitted, held, kept = Ends.of(denoiser, tuple(event), cond, n, seed, reference, batch).shared_out()
    named = _named(denoiser.path, chosen.for_event(tuple(event)), steps)
    first, best, rounds = _search(denoiser, chosen, named, fitted, held, batch, most_rounds, callback)
    errors = [relative(_far(denoiser, chosen, times, kept, batch), kept) for times in (named[first], best)]
    made = {"solver": str(solver), "start": first, "n": n, "seed": seed, "reference": reference, "rounds": rounds}
    found = OptimisedGrid(tuple(best.tolist()), profile_of(denoiser.path), repr(denoiser.path))
    return found.with_about(**made, before=errors[0], after=errors[1])


def _search(
    denoiser: Denoiser,
    solver: Solver,
    named: dict[str, Grid],
    fitted: Ends,
    held: Ends,
    batch: int,
    most_rounds: int,
    callback: Callable[[int, int, float], object] | None,
) -> tuple[str, Grid, int]:
    """The best named grid, and the best of all that was seen, on `held`; the rounds made from that on `fitted`."""
    far = {name: _tried(lambda t=times: _far(denoiser, solver, t, fitted, batch)) for name, times in named.items()}
    far = {name: d for name, d in far.items() if d is not None}
    if not far:
        raise SamplingError(f"{solver!r} ends in numbers that are not finite on every named grid: give more steps")
    start = min(far, key=lambda name: float(torch.log(far[name] + 1e-300).mean()))
    unit = float(far[start].median())

    def cost(d: Tensor | None) -> float:
        return math.inf if d is None else float(0.5 * torch.log((d / unit).square() + _FLOOR**2).mean())

    def held_cost(times: Grid) -> float:
        return cost(_tried(lambda: _far(denoiser, solver, times, held, batch)))

    seen = {name: held_cost(named[name]) for name in far}
    first = min(seen, key=lambda name: seen[name])
    best, least, rounds, stale = named[first], seen[first], 0, 0
    if len(named[start]) == 2 or unit == 0:
        return first, best, rounds
    form = _Form(denoiser, named[start])
    for rounds, times in enumerate(_descent(form, denoiser, solver, fitted, batch, cost, unit), start=1):
        now = held_cost(times)
        stale = 0 if now < least else stale + 1
        if now < least:
            best, least = times, now
        if callback is not None:
            callback(rounds, most_rounds, math.exp(least - seen[first]))
        if rounds >= most_rounds or stale >= _PATIENCE:
            break
    return first, best, rounds


def _checked(given: str | Solver) -> Solver:
    solver = get_solver(given)
    if solver.stochastic or solver.adaptive or solver.made_for is not None or solver.evals_per_step == 0:
        raise ArgumentError(
            f"{given!r} has no times to be fitted: expected a deterministic solver of fixed steps, such as 'dpmpp-2m'"
        )
    return solver


def _named(path: Path, solver: Solver, steps: int) -> dict[str, Grid]:
    """All grids of that many steps which have a name, the solver's own first."""
    found = {OWN: solver.default_grid(path, steps)}
    for name in GRIDS:
        try:
            found[name] = make_grid(path, steps, name)
        except ArgumentError:  # so many steps that times coincide
            continue
    return found


def _runs(denoiser: Denoiser, solver: Solver, times: Grid, ends: Ends, batch: int) -> Tensor:
    """Where a solver ends."""
    with torch.no_grad():
        parts = [
            sample(denoiser, noise=part.start, solver=solver, grid=times, cond=part.cond, device=part.start.device)
            for part in ends.batches(batch)
        ]
    return torch.cat(parts)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _far(denoiser: Denoiser, solver: Solver, times: Grid, ends: Ends, batch: int) -> Float[Tensor, " b"]:
    """How far from their true ends the solver's are."""
    return squares(_runs(denoiser, solver, times, ends, batch) - ends.x).sqrt().cpu()


def _tried(run: Callable[[], Tensor]) -> Tensor | None:
    try:
        return run()
    except SamplingError:
        return None


class _Form:
    """Times of a grid as a point z, 0 where it begins: the logarithms of the gaps, relative to those of the start."""

    def __init__(self, denoiser: Denoiser, start: Grid):
        self.path = denoiser.path
        self.places = Places(denoiser, self.path.angle(start[1:-1]))
        self.zero = torch.zeros_like(self.places.gaps)

    def __call__(self, z: Tensor) -> Grid:
        ends = torch.tensor([self.path.t_max, self.path.t_min], dtype=torch.float64)
        return torch.cat([ends[:1], self.path.time_of_angle(self.places(z)), ends[1:]])


def _descent(
    form: _Form,
    denoiser: Denoiser,
    solver: Solver,
    fitted: Ends,
    batch: int,
    cost: Callable[[Tensor | None], float],
    unit: float,
) -> Iterator[Grid]:
    """Times after each round that lowers the cost of `fitted`, until none does.

    With residuals r = x - truth and weights w = 1 / (d^2 + floor^2) the cost has the gradient mean(w J^T r), and
    mean(w J^T J) is its curvature where the weights hardly change.
    """

    def far(z: Tensor) -> float:
        return cost(_tried(lambda: _far(denoiser, solver, form(z), fitted, batch)))

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
    form: _Form, denoiser: Denoiser, solver: Solver, ends: Ends, batch: int, unit: float, z: Tensor
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
