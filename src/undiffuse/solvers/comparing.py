"""Which solver, on which grid, in how many calls: errors against each noise's own exact end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError, SamplingError, UndiffuseError, choose
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.base import Cond, Solver, rows_of
from undiffuse.solvers.comparison import Cell, Comparison
from undiffuse.solvers.flow import Adaptive
from undiffuse.solvers.grids import GRIDS, Spacing
from undiffuse.solvers.integrate import Step, get_solver
from undiffuse.solvers.kernels import KERNELS
from undiffuse.solvers.sampling import placed, sample

OWN = "own"
# What is compared where nothing is said: solver and grid.
DEFAULT = (
    ("abm-4", OWN), ("dpmpp-2m", OWN), ("dpmpp-2m", "karras"), ("unipc-2", "half-log-snr"), ("deis-3", OWN),
    ("ab4", OWN), ("heun", OWN), ("ddim", OWN), ("euler", OWN),
)  # fmt: skip
CALLS = (5, 8, 10, 15, 20, 30)
# The truth, in so many parts for the sake of progress, and the other way to it, for the first noises. On a U-Net of
# 8 x 8 digits `tsit5` at 1e-6 and "abm-4" differ by 3e-5 with half these steps already; `dopri5` at 1e-5 is 3e-4 off.
TRUTH, PARTS = Adaptive("dopri5", 1e-6, 1e-6), 8
CHECK, CHECK_GRID, CHECK_STEPS, CHECKED = "abm-4", "half-log-snr", 200, 8
# Calls that the truth is supposed to take, before its first part is done.
USUAL = 300

Named = tuple[str, Solver]
# A name of a grid, and the grid: None is the solver's own.
Placed = tuple[str, str | Spacing | Tensor | None]


def compare(
    denoiser: Denoiser,
    shape: Sequence[int],
    solvers: Sequence[str | Solver] | Mapping[str, str | Solver] | None = None,
    grids: Sequence[str] | Mapping[str, str | Spacing | Tensor] | None = None,
    calls: Sequence[int] = CALLS,
    *,
    n: int = 32,
    seed: int | Sequence[int] = 0,
    cond: Cond = None,
    noisy: bool = False,
    progress: Callable[[int, int, str], object] | None = None,
) -> Comparison:
    """How far each solver ends from where the probability flow takes each noise, by grid and number of calls.

    The truth is `dopri5` at a tolerance of 1e-6; how near to it 200 steps of "abm-4" on "half-log-snr" end is measured
    on the first eight noises (`truth_error`: errors below it say nothing). Solvers that draw noise have no such error.

    Args:
        denoiser: the model, called in its own precision.
        shape: of one sample, (*event).
        solvers: names, solvers, or solvers by the names to give them. None: nine choices of solver and grid.
        grids: names of `GRIDS`, "own" for the solver's; or grids by the names to give them (one of times is for their
            own number of steps only). Every solver is run on each. None: its own.
        calls: network calls allowed; a solver of k calls a step takes the most steps that fit.
        n: noises.
        seed: as in `sample`.
        cond: passed to every call, n rows.
        noisy: keep solvers that draw noise, as rows without an error, for `Comparison.judge` to measure.
        progress: called with the calls made, all that will be made, and what is being done.

    Raises:
        ArgumentError: an unknown name, a solver that draws noise or chooses its own steps, calls < 1, n < 2.
        SamplingError: the truth itself cannot be found. That a solver fails is kept in its cell.
    """
    pairs = _pairs(solvers, grids, noisy)
    columns = _columns(calls)
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise ArgumentError(f"n is {n!r}: expected at least 2 noises, better 32, for a median to mean something")
    fits = {(pair, k): _fit(denoiser.path, pair, tuple(shape), k) for pair in pairs for k in columns}
    exact = {key: nfe for key, (_, nfe, _) in fits.items() if not key[0][0][1].stochastic}
    meter = _Meter(progress, CHECK_STEPS + sum(exact.values()))
    truth, gap = _truth(denoiser, (n, *shape), seed, cond, meter) if exact else (None, None)
    cells = []
    for (name, solver), (on, grid) in pairs:
        for k in columns:
            key = ((name, solver), (on, grid)), k
            steps, nfe, why = fits[key]
            error = median = None
            if not why and truth is not None and key in exact:
                try:
                    x = _run(denoiser, truth.shape, solver, grid, steps, seed, cond)
                    error, median = relative_errors(x, truth)
                except UndiffuseError as failed:
                    why = str(failed)
            cells.append(Cell(name, on, k, steps, nfe, error, median, why))
            if key in exact:
                meter.add(nfe, f"{name}, {k} calls")
    if truth is None:
        return Comparison(tuple(cells), repr(denoiser.path), tuple(shape), n, None, "", None)
    words = f"{TRUTH.method} at {TRUTH.rtol:g}, checked by {CHECK_STEPS} steps of {CHECK} on {CHECK_GRID}"
    size = float(truth.double().square().mean().sqrt())
    return Comparison(tuple(cells), repr(denoiser.path), tuple(shape), n, size, words, gap)


def relative_errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """`RMS(x - truth)` over all samples and of the median sample, both over `RMS(truth)`."""
    far = (x.double() - truth.double()).reshape(len(x), -1).square().mean(1)
    size = truth.double().square().mean().sqrt()
    return float(far.mean().sqrt() / size), float(far.sqrt().quantile(0.5) / size)


def _columns(calls: Sequence[int]) -> list[int]:
    wrong = [k for k in calls if not isinstance(k, int) or isinstance(k, bool) or k < 1]
    if wrong or not calls:
        raise ArgumentError(f"calls are {list(calls)}: expected whole numbers of at least 1, for example 5, 10, 20")
    return sorted(set(calls))


def _pairs(
    solvers: Sequence[str | Solver] | Mapping[str, str | Solver] | None,
    grids: Sequence[str] | Mapping[str, str | Spacing | Tensor] | None,
    noisy: bool,
) -> list[tuple[Named, Placed]]:
    """What to run: named solvers, each with a named grid."""
    if isinstance(solvers, str) or isinstance(grids, str):
        raise ArgumentError(f"solvers = {solvers!r}, grids = {grids!r}: expected lists of names, for example ['heun']")
    on = None if grids is None else _placed(grids)
    if solvers is None:
        names = dict.fromkeys(name for name, _ in DEFAULT)
        usual = [(name, place) for name, grid in DEFAULT for place in _placed([grid])]
        wanted = usual if on is None else [(name, place) for name in names for place in on]
        return [((name, get_solver(name)), place) for name, place in wanted]
    items = solvers.items() if isinstance(solvers, Mapping) else [(str(solver), solver) for solver in solvers]
    named = [_checked(name, solver, noisy) for name, solver in items]
    if not named or on == []:
        raise ArgumentError("there is nothing to compare: name a solver and a grid at least, or leave them out")
    return list(dict.fromkeys((solver, place) for solver in named for place in on or _placed([OWN])))


def _placed(grids: Sequence[str] | Mapping[str, str | Spacing | Tensor]) -> list[Placed]:
    named = grids.items() if isinstance(grids, Mapping) else [(grid, grid) for grid in grids]
    for _, grid in named:
        if isinstance(grid, str):
            choose(grid, {**GRIDS, OWN: None}, "grid")
    return [(name, None if isinstance(grid, str) and grid == OWN else grid) for name, grid in named]


def _checked(name: str, given: str | Solver, noisy: bool) -> Named:
    kernel = isinstance(given, str) and given in KERNELS
    solver = TRUTH if kernel else get_solver(given)
    if noisy and (kernel or solver.evals_per_step == 0):
        raise ArgumentError(
            f"'{name}' follows no grid from noise to data, so its calls are not comparable: take it out"
        )
    if kernel or solver.evals_per_step == 0 or (solver.stochastic and not noisy):
        raise ArgumentError(
            f"'{name}' draws noise of its own, so a noise has no one end to compare its sample with: take it out, or "
            "measure its samples instead (undiffuse compare RUN --metrics, undiffuse evaluate RUN --solver NAME)"
        )
    if solver.adaptive:
        raise ArgumentError(f"'{name}' takes as many calls as its tolerance asks for, not as many as are given: out")
    return name, solver


class _Free(Denoiser):
    """Costs nothing: for counting calls."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return torch.zeros_like(x_t)


def _fit(path: Path, pair: tuple[Named, Placed], event: tuple[int, ...], calls: int) -> tuple[int, int, str]:
    """The most steps within that many calls, the calls they take; and why there is none."""
    (_, solver), (_, grid) = pair
    solver = solver.for_event(event)
    # The first and the last step may be closed forms of one call.
    counts = range(min(calls, calls // solver.evals_per_step + 2), 0, -1)
    only = len(grid) - 1 if isinstance(grid, Tensor) else solver.made_for
    for steps in counts if only is None else [only]:
        try:
            info: Any = _run(_Free(path), (1, *event), solver, grid, steps, 0, None, return_info=True)
        except SamplingError:
            continue
        except ArgumentError as failed:
            return steps, 0, str(failed)
        if info.nfe <= calls:
            return steps, info.nfe, ""
    if only is None:
        return 0, 0, f"not one step can be made in {calls} calls"
    return 0, 0, f"it has {only} steps, which take more than {calls} calls"


def _run(
    denoiser: Denoiser,
    sizes: Sequence[int],
    solver: Solver,
    grid: str | Spacing | Tensor | None,
    steps: int,
    seed: int | Sequence[int] | Streams,
    cond: Cond,
    **more: Any,
) -> Any:
    return sample(denoiser, tuple(sizes), solver=solver, grid=grid, steps=steps, seed=seed, cond=cond, **more)


class _Meter:
    """Calls made of all that will be; those of the truth are guessed from its parts so far."""

    def __init__(self, tell: Callable[[int, int, str], object] | None, known: int):
        self.tell, self.known, self.done = tell, known, 0
        self.start("exact ends", USUAL)

    def start(self, note: str, truth: int) -> None:
        self.truth = truth
        self.add(0, note)

    def part(self, step: Step) -> None:
        """A part of the truth is done."""
        self.done = step.nfe
        self.start("exact ends", round(step.nfe * PARTS / (step.index + 1)))

    def add(self, nfe: int, note: str) -> None:
        self.done += nfe
        if self.tell is not None:
            self.tell(self.done, self.truth + self.known, note)


def _truth(
    denoiser: Denoiser, sizes: tuple[int, ...], seed: int | Sequence[int], cond: Cond, meter: _Meter
) -> tuple[Tensor, float]:
    """The exact ends, and how far another method's are from the first of them, relative."""
    truth = _run(denoiser, sizes, TRUTH, "angle", PARTS, seed, cond, callback=meter.part)
    streams, rows = Streams.of(seed, sizes[0]), torch.arange(min(CHECKED, sizes[0]))
    first = Streams(streams.keys[rows], streams.draw)
    some = rows_of(placed(cond, sizes[0], truth.device), rows)
    again = _run(denoiser, (len(rows), *sizes[1:]), get_solver(CHECK), CHECK_GRID, CHECK_STEPS, first, some)
    meter.add(CHECK_STEPS, "the same in another way")
    return truth, relative_errors(again, truth[rows])[0]
