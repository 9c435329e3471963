"""The only loop along a path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.sums import large
from undiffuse.fields import Denoiser
from undiffuse.solvers.adaptive_sde import AdaptiveSDE
from undiffuse.solvers.annealed import AnnealedLangevin
from undiffuse.solvers.base import Bound, Event, Noise, Solver, scales, spending
from undiffuse.solvers.corrector import LangevinCorrector, Stay
from undiffuse.solvers.exponential import DDIM
from undiffuse.solvers.flow import Adaptive
from undiffuse.solvers.multistep import MULTISTEP
from undiffuse.solvers.picard import Picard
from undiffuse.solvers.reverse import SRK, EulerMaruyama, ReverseDiffusion, StochasticHeun
from undiffuse.solvers.runge_kutta import RK4, Euler, Heun, Midpoint
from undiffuse.solvers.singlestep import SINGLESTEP
from undiffuse.solvers.stochastic import DDPM, EDM

SOLVERS: dict[str, Callable[[], Solver]] = {
    "adaptive-sde": AdaptiveSDE,
    "annealed-langevin": AnnealedLangevin,
    "bosh3": partial(Adaptive, "bosh3"),
    "ddim": DDIM,
    "ddpm": DDPM,
    "dopri5": Adaptive,
    "edm": EDM,
    "euler": Euler,
    "euler-maruyama": EulerMaruyama,
    "heun": Heun,
    "midpoint": Midpoint,
    "picard": Picard,
    "reverse-diffusion": ReverseDiffusion,
    "rk4": RK4,
    "srk": SRK,
    "stay": Stay,
    "stochastic-heun": StochasticHeun,
    "tsit5": partial(Adaptive, "tsit5"),
    **SINGLESTEP,
    **MULTISTEP,
}

# The name that stands for `DPMv3`, which is nothing without statistics.
DPM_V3 = "dpm-v3"


@runtime_checkable
class Corrector(Protocol):
    """Moves x at a fixed time towards `p_t` (predictor-corrector sampling)."""

    def correct(self, field: Bound, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """x after the correction; t a float64 scalar with sigma(t) > 0."""
        ...


CORRECTORS: dict[str, Callable[[], Corrector]] = {"langevin": LangevinCorrector}


@dataclass(frozen=True)
class Step:
    """What a callback sees after a step.

    Attributes:
        index: of the step, from 0.
        t, s: it went from time t to time s.
        x: the state at s; not to be changed in place.
        denoised: the last E[x_0 | x] evaluated in the step.
        nfe: field evaluations so far.
    """

    index: int
    t: float
    s: float
    x: Tensor
    denoised: Tensor
    nfe: int


def get_solver(solver: str | Solver) -> Solver:
    """A solver by name; an object passes through.

    Raises:
        ArgumentError: an unknown name (the nearest is offered), or no solver.
    """
    if solver == DPM_V3:
        raise ArgumentError(
            f"solver '{DPM_V3}' goes by statistics of the model: ud.DPMv3(ud.model_statistics(denoiser, x_0)). For a "
            f"run: undiffuse statistics RUN, then run.solver('{DPM_V3}')"
        )
    if isinstance(solver, str):
        return choose(solver, SOLVERS, "solver")()
    if not isinstance(solver, Solver):
        raise ArgumentError(f"solver is {solver!r}: expected a name ({', '.join(SOLVERS)}) or a Solver object")
    return solver


def get_corrector(corrector: str | Corrector | None) -> Corrector | None:
    """A corrector by name; an object, or None, passes through.

    Raises:
        ArgumentError: an unknown name, or no corrector.
    """
    if isinstance(corrector, str):
        return choose(corrector, CORRECTORS, "corrector")()
    if corrector is not None and not isinstance(corrector, Corrector):
        raise ArgumentError(f"corrector is {corrector!r}: expected a name ({', '.join(CORRECTORS)}) or a Corrector")
    return corrector


def integrate(
    field: Bound | Denoiser,
    x: Event,
    grid: Float[Tensor, " n"],
    solver: Solver,
    noise: Noise | None = None,
    *,
    corrector: Corrector | None = None,
    callback: Callable[[Step], object] | None = None,
) -> Event:
    """Carry x along the grid, from its first time to its last.

    Args:
        field: a denoiser, or a `Bound` one where there is a condition or calls are to be counted.
        x: state at `grid[0]`.
        grid: float64 times on the CPU.
        solver: what makes a step.
        noise: draws one tensor like x; needed where the solver or the corrector is stochastic.
        corrector: applied after each step that ends in sigma > 0.
        callback: called with a `Step` after each step; of a solver that is `at_once`, for all of them at the end.

    Raises:
        ArgumentError: a corrector with a solver that is `at_once`.
    """
    run = field if isinstance(field, Bound) else Bound(field, grid=grid)
    solver = solver.for_steps(len(grid) - 1).for_event(x.shape[1:])
    if solver.at_once:
        return _at_once(run, x, grid, solver, corrector, callback)
    draw = noise if noise is not None else _no_noise
    state = solver.init(run, x, grid[0])
    # Of states that nobody else sees, all but the first are the run's own.
    unseen = callback is None and corrector is None and type(run) is Bound
    owning = unseen and large(x) and spending(solver)
    for index, (t, s) in enumerate(pairwise(grid.unbind())):
        run.own = x if owning and index > 0 else None
        x, state = solver.step(run, x, t, s, state, draw)
        if corrector is not None and scales(run, s)[1] > 0:
            x = corrector.correct(run, x, s, draw)
        if callback is not None:
            denoised = run.denoised
            callback(Step(index, float(t), float(s), x, x if denoised is None else denoised, run.calls))
    run.own = None
    return x


def _at_once(
    run: Bound,
    x: Event,
    grid: Float[Tensor, " n"],
    solver: Solver,
    corrector: Corrector | None,
    callback: Callable[[Step], object] | None,
) -> Event:
    """The end of the grid by `Solver.run`, and its steps told of afterwards."""
    if corrector is not None:
        raise ArgumentError(
            f"{type(solver).__name__} solves all steps at once, and nothing can be corrected between them: leave the "
            "corrector out, or take a solver that goes step by step"
        )
    course = solver.run(run, x, grid, keep=callback is not None)
    if callback is not None and course.states is not None and course.denoised is not None:
        for index, (t, s) in enumerate(pairwise(grid.tolist())):
            callback(Step(index, t, s, course.states[index + 1], course.denoised[index], run.calls))
    return course.x


def _no_noise() -> Tensor:
    raise ArgumentError("this solver draws noise: give integrate a `noise` callable")
