"""The only loop, and `sample`, which sets it up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, SamplingError, choose
from undiffuse.core.random import Streams, fresh_seed
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.annealed import AnnealedLangevin
from undiffuse.solvers.base import Bound, Cond, Event, Noise, Solver, scales
from undiffuse.solvers.exponential import DDIM, DPMpp2M
from undiffuse.solvers.grids import check_grid, make_grid
from undiffuse.solvers.runge_kutta import Euler, Heun
from undiffuse.solvers.stochastic import DDPM, EDM

SOLVERS: dict[str, Callable[[], Solver]] = {
    "annealed-langevin": AnnealedLangevin,
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpmpp-2m": DPMpp2M,
    "edm": EDM,
    "euler": Euler,
    "heun": Heun,
}


@runtime_checkable
class Corrector(Protocol):
    """Moves x at a fixed time towards `p_t` (predictor-corrector sampling)."""

    def correct(self, field: Bound, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """x after the correction; t a float64 scalar with sigma(t) > 0."""
        ...


@dataclass(frozen=True)
class Step:
    """What a callback sees after a step.

    Attributes:
        index: of the step, from 0.
        t, s: it went from time t to time s.
        x: the state at s.
        denoised: the last E[x_0 | x] evaluated in the step.
        nfe: field evaluations so far.
    """

    index: int
    t: float
    s: float
    x: Tensor
    denoised: Tensor
    nfe: int


@dataclass(frozen=True)
class Sample:
    """What `sample(..., return_info=True)` returns.

    Attributes:
        x: the samples, (B, *event).
        nfe: number of network calls.
        trajectory: the states at the times of `grid`, steps + 1 tensors like x, both ends included.
        denoised: the estimate of x_0 of each step, steps tensors like x.
        grid: the times, float64.
        seed: what makes these samples again: the seed given, or the one drawn.
    """

    x: Tensor
    nfe: int
    trajectory: tuple[Tensor, ...]
    denoised: tuple[Tensor, ...]
    grid: Tensor
    seed: object


def get_solver(solver: str | Solver) -> Solver:
    """A solver by name; an object passes through.

    Raises:
        ArgumentError: an unknown name (the nearest is offered), or no solver.
    """
    if isinstance(solver, str):
        return choose(solver, SOLVERS, "solver")()
    if not isinstance(solver, Solver):
        raise ArgumentError(f"solver is {solver!r}: expected a name ({', '.join(SOLVERS)}) or a Solver object")
    return solver


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
        callback: called with a `Step` after each step.
    """
    run = field if isinstance(field, Bound) else Bound(field, grid=grid)
    solver = solver.for_steps(len(grid) - 1)
    draw = noise if noise is not None else _no_noise
    state = solver.init(run, x, grid[0])
    for index, (t, s) in enumerate(pairwise(grid.unbind())):
        x, state = solver.step(run, x, t, s, state, draw)
        if corrector is not None and scales(run, s)[1] > 0:
            x = corrector.correct(run, x, s, draw)
        if callback is not None:
            callback(Step(index, float(t), float(s), x, run.denoised if run.denoised is not None else x, run.calls))
    return x


def _no_noise() -> Tensor:
    raise ArgumentError("this solver draws noise: give integrate a `noise` callable")


def sample(
    field: Denoiser,
    shape: Sequence[int] | None = None,
    *,
    noise: Tensor | None = None,
    solver: str | Solver = "dpmpp-2m",
    steps: int = 20,
    grid: str | Tensor | None = None,
    cond: Cond = None,
    seed: int | Sequence[int] | Tensor | Streams | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    corrector: Corrector | None = None,
    callback: Callable[[Step], object] | None = None,
    return_info: bool = False,
) -> Tensor | Sample:
    """Draw samples: from noise at the grid's first time to data at its last.

    Draw 0 of a sample's stream is its noise, `x = sigma(grid[0]) z`; later draws are the solver's. So a sample's noise
    does not depend on who shares its batch.

    Args:
        field: the denoiser; put in evaluation mode while sampling.
        shape: (B, *event). Not needed where `noise` is given.
        noise: the starting x itself (not a standard normal), at the grid's first time.
        solver: a name of `SOLVERS`, or a `Solver`.
        steps: solver steps. A grid tensor has its own count.
        grid: a name of `GRIDS`, times strictly decreasing on the path, or None: the solver's
            own choice, `Solver.default_grid`.
        cond: passed to every call of the field.
        seed: an integer (sample i uses stream i of it), one integer per sample (stream 0 of each), streams, or
            None: a fresh one, found in the record.
        device, dtype: of x; by default those of the field's first parameter (else of `noise`, else cpu and
            float32), the dtype that of `noise` where it is given. x is kept in float32 at least.
        corrector, callback: see `integrate`.
        return_info: return a `Sample` record.

    Raises:
        ArgumentError: an argument out of its range.
        SamplingError: x became infinite or NaN.
    """
    chosen = get_solver(solver)
    path = field.path
    times = _times(path, chosen, steps, grid)
    sizes = _sizes(shape, noise)
    device, dtype = _placement(field, noise, device, dtype)
    cond = _placed(cond, sizes[0], device)
    seed = fresh_seed() if seed is None else seed
    first = Streams(seed.keys, seed.draw) if isinstance(seed, Streams) else Streams.of(seed, sizes[0])
    first = Streams(first.keys.to(device), first.draw)
    start = first.normal(sizes, dtype=dtype, device=device) if noise is None else noise.to(device, dtype)
    after_start = first.draw if noise is None else first.draw + 1
    if noise is None:
        start = start * float(path.sigma(times[0]))

    def run(watch: Callable[[Step], object] | None) -> Tensor:
        streams = Streams(first.keys, after_start)
        bound = Bound(field, cond, times)
        draw = lambda: streams.normal(sizes, dtype=dtype, device=device)  # noqa: E731
        return integrate(bound, start, times, chosen, draw, corrector=corrector, callback=watch)

    record: list[Step] = []
    with _evaluating(field):
        x = run(_watcher(callback, record) if return_info else callback)
        # One pass, one number: a sum is finite unless some entry is not (or the sum overflows, settled next).
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            run(_stop_at_first_bad)
    if not return_info:
        return x
    states, denoised = tuple(r.x for r in record), tuple(r.denoised for r in record)
    return Sample(x, record[-1].nfe, (start, *states), denoised, times, seed)


def _watcher(callback: Callable[[Step], object] | None, record: list[Step]) -> Callable[[Step], object]:
    def watch(step: Step) -> None:
        record.append(step)
        if callback is not None:
            callback(step)

    return watch


def _stop_at_first_bad(step: Step) -> None:
    if bool(torch.isfinite(step.x).all()):
        return
    whole = bool(torch.isfinite(step.denoised).all())
    rows = (~torch.isfinite(step.x.flatten(1)).all(1)).nonzero()[:, 0].tolist()
    raise SamplingError(
        f"x became infinite or NaN in step {step.index}, from t = {step.t:.6g} to {step.s:.6g}, in {len(rows)} of "
        f"{len(step.x)} samples (first: {rows[0]}); there the field's answer was "
        f"{'finite' if whole else 'not finite'}. "
        + ("Check the start x and the solver's options." if whole else "Check the weights and the condition.")
    )


@contextmanager
def _evaluating(field: Denoiser) -> Iterator[None]:
    """No gradients, every module in evaluation mode; each is put back as it was."""
    before = [(module, module.training) for module in field.modules()]
    field.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def _times(path: Path, solver: Solver, steps: int, grid: str | Tensor | None) -> Tensor:
    if grid is None:
        return solver.default_grid(path, steps)
    return make_grid(path, steps, grid) if isinstance(grid, str) else check_grid(path, grid)


def _sizes(shape: Sequence[int] | None, noise: Tensor | None) -> tuple[int, ...]:
    if noise is None and shape is None:
        raise ArgumentError("sample needs the shape (B, *event) of what to draw, or the noise to start from")
    sizes = tuple(shape) if shape is not None else tuple(noise.shape)  # type: ignore[union-attr]
    if not sizes or any(int(n) != n or n < 1 for n in sizes):
        raise ArgumentError(f"shape is {sizes}: expected (B, *event), all at least 1")
    if noise is not None and (tuple(noise.shape) != sizes or not noise.is_floating_point()):
        raise ArgumentError(f"noise is {noise.dtype} of shape {tuple(noise.shape)}: expected floats of shape {sizes}")
    return sizes


def _placement(
    field: Denoiser, noise: Tensor | None, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where x lives, and its dtype, float32 at least."""
    weight = next((p for p in field.parameters() if p.is_floating_point()), noise)
    device = device if device is not None else weight.device if weight is not None else "cpu"
    like = noise if noise is not None else weight
    dtype = dtype if dtype is not None else like.dtype if like is not None else torch.float32
    if not dtype.is_floating_point:
        raise ArgumentError(f"dtype is {dtype}: expected a floating-point one")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device '{device}' cannot be used here: {error}") from error
    return torch.device(device), torch.promote_types(dtype, torch.float32)


def _placed(cond: Cond, rows: int, device: torch.device) -> Cond:
    """The condition on the device, with one row for each sample."""
    if cond is None:
        return None
    parts = cond if isinstance(cond, dict) else {"cond": cond}
    for name, value in parts.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != rows:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"{name} is {given}: expected a tensor with one row for each of {rows} samples")
    moved = {name: value.to(device) for name, value in parts.items()}
    return moved if isinstance(cond, dict) else moved["cond"]
