"""`sample`: from noise to data along a path, or to an energy's density by a Markov chain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError, SamplingError, choose
from undiffuse.core.random import Streams, fresh_seed
from undiffuse.fields import Denoiser, DenoiserAt, HasScore
from undiffuse.paths import Path
from undiffuse.solvers.base import Bound, Cond, Solver, StreamNoise, scales
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.grids import Spacing, check_grid, make_grid
from undiffuse.solvers.integrate import DPM_V3, SOLVERS, Corrector, Step, get_corrector, get_solver, integrate
from undiffuse.solvers.kernels import KERNELS
from undiffuse.solvers.markov import Kernel

# Steps where nothing is said of them.
_USUAL = 20


@dataclass(frozen=True)
class Sample:
    """What `sample(..., return_info=True)` returns.

    Attributes:
        x: the samples, (B, *event).
        nfe: number of network calls, one after the other.
        nfe_each: evaluations that each sample took (B,); fewer than `nfe` where an adaptive solver was done with it,
            more where a solver asks at several times at once.
        rounds: calls that each sample was part of, one after the other (B,).
        trajectory: the states at the times of `grid`, steps + 1 tensors like x, both ends included, each as the
            `corrector` left it; of a method that corrects its own steps as it was predicted.
        denoised: the estimate of x_0 of each step, steps tensors like x; none of a Markov chain.
        grid: the times, float64; none of a Markov chain.
        seed: what makes these samples again: the seed given, or the one drawn.
    """

    x: Tensor
    nfe: int
    trajectory: tuple[Tensor, ...]
    denoised: tuple[Tensor, ...]
    grid: Tensor
    seed: object
    nfe_each: Tensor
    rounds: Tensor

    @property
    def speed_up(self) -> Tensor:
        """Steps of the grid over calls one after the other, of each sample (B,)."""
        return (len(self.grid) - 1) / self.rounds


def sample(
    field: Denoiser | HasScore,
    shape: Sequence[int] | None = None,
    *,
    noise: Tensor | None = None,
    solver: str | Solver | Kernel = "abm-4",
    steps: int | None = None,
    grid: str | Spacing | Tensor | None = None,
    cond: Cond = None,
    seed: int | Sequence[int] | Tensor | Streams | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    corrector: str | Corrector | None = None,
    denoise: bool = False,
    callback: Callable[[Step], object] | None = None,
    return_info: bool = False,
) -> Tensor | Sample:
    """Draw samples: along a path, from noise at the grid's first time to data at its last; or by Markov chains.

    Draw 0 of a sample's stream is its noise, `x = sigma(grid[0]) z`; later draws are the solver's. So a sample's noise
    does not depend on who shares its batch.

    With a Markov kernel ("langevin", "mala", ...) each sample is the end of a chain of `steps` steps that starts from
    `noise`, or from a standard normal: of the density of an energy or score, or of the path's p_t at t_low where the
    field is a denoiser. `kernel.run` offers more: burn-in, states kept, acceptance.

    Args:
        field: the denoiser; for a kernel anything with a score, for one that accepts or rejects an energy. Put in
            evaluation mode while sampling.
        shape: (B, *event). Not needed where `noise` is given.
        noise: the starting x itself (not a standard normal), at the grid's first time.
        solver: a name of `SOLVERS` or `KERNELS`, a `Solver`, or a `Kernel`.
        steps: solver steps; None: 20, or the number that the solver was made for. A grid tensor has its own count.
        grid: a name of `GRIDS`, a `Spacing` such as `karras(5)`, times strictly decreasing on the path, or None: the
            solver's own choice, `Solver.default_grid`.
        cond: passed to every call of the field.
        seed: an integer (sample i uses stream i of it), one integer per sample (stream 0 of each), streams, or
            None: a fresh one, found in the record.
        device, dtype: of x; by default those of the field's first parameter (else of `noise`, else cpu and
            float32), the dtype that of `noise` where it is given. x is kept in float32 at least.
        corrector: a name of `CORRECTORS` or a `Corrector`, applied after each step that ends in noise: predictor and
            corrector (Song et al. 2021). None with a kernel, as are `grid` and `callback`.
        denoise: where the grid ends in noise (VE, NCSN's chains at their t_low), return `E[x_0 | x]` of its end, by one
            more call. No effect where it ends in sigma = 0. The record's trajectory keeps the noisy end.
        callback: see `integrate`.
        return_info: return a `Sample` record.

    Raises:
        ArgumentError: an argument out of its range.
        SamplingError: x became infinite or NaN; of chains, all of them (where some did, a warning names them, and they
            stay at their last finite state).
    """
    chosen = _chosen(solver)
    steps = steps if steps is not None else _steps_of(chosen)
    sizes = _sizes(shape, noise)
    device, dtype = _placement(field, noise, device, dtype)
    cond = placed(cond, sizes[0], device)
    seed = fresh_seed() if seed is None else seed
    own = isinstance(seed, Streams)
    streams = Streams(seed.keys.to(device), seed.draw) if own else Streams.of(seed, sizes[0], device=device)
    z = streams.normal(sizes, dtype=dtype, device=device) if noise is None else noise.to(device, dtype)
    after_start = streams.at(streams.draw + (noise is not None))
    if isinstance(chosen, Kernel):
        if not (grid is None and corrector is None and callback is None and not denoise):
            raise ArgumentError(
                f"{type(chosen).__name__} is a Markov kernel: it has no grid, corrector, denoising or callback here; "
                "see its `run`"
            )
        x, nfe, states = _run_chains(chosen, field, z, steps, cond, after_start, return_info)
        each = torch.full((len(x),), nfe)
        return Sample(x, nfe, (z, *states), (), torch.empty(0), seed, each, each) if return_info else x
    if not isinstance(field, Denoiser):
        raise ArgumentError(
            f"solver '{solver}' follows a path, and {type(field).__name__} has none: give a Denoiser, or a Markov "
            f"kernel ({', '.join(KERNELS)})"
        )
    chosen = chosen.for_event(sizes[1:])
    times = _times(field.path, chosen, steps, grid)
    start = z if noise is not None else z * float(field.path.sigma(times[0]))
    record: list[Step] = []
    watch = _watcher(callback, record) if return_info else callback
    bound = Bound(field, cond, times)
    x = _follow_path(bound, times, start, chosen, after_start, get_corrector(corrector), watch)
    if denoise and scales(bound, times[-1])[1] > 0:
        with evaluating(field):
            x = bound(x, times[-1])
        if not bool(torch.isfinite(x).all()):
            raise SamplingError("the last denoising gave numbers that are infinite or NaN: check the weights and cond")
    if not return_info:
        return x
    states, denoised = tuple(r.x for r in record), tuple(r.denoised for r in record)
    each = torch.full((len(x),), bound.calls) if bound.per_sample is None else bound.per_sample
    rounds = each if bound.rounds is None else bound.rounds
    return Sample(x, bound.calls, (start, *states), denoised, times, seed, each, rounds)


def _follow_path(
    bound: Bound,
    times: Tensor,
    start: Tensor,
    solver: Solver,
    streams: Streams,
    corrector: Corrector | None,
    watch: Callable[[Step], object] | None,
) -> Tensor:
    """The end of the path; where it is not finite, a second run finds the step to name."""

    def run(watching: Callable[[Step], object] | None) -> Tensor:
        draw = StreamNoise(streams.at(streams.draw), start.shape, start.dtype, start.device)
        return integrate(bound, start, times, solver, draw, corrector=corrector, callback=watching)

    with evaluating(bound.field):
        x = run(watch)
        # One pass, one number: a sum is finite unless some entry is not (or the sum overflows, settled next).
        if not math.isfinite(float(x.sum())) and not bool(torch.isfinite(x).all()):
            run(_stop_at_first_bad)
    return x


def _chosen(solver: str | Solver | Kernel) -> Solver | Kernel:
    if isinstance(solver, Kernel):
        return solver
    if not isinstance(solver, str):
        return get_solver(solver)
    if solver == DPM_V3:
        return get_solver(solver)  # says what it needs
    made = choose(solver, {**SOLVERS, **KERNELS}, "solver")
    try:
        return made()
    except TypeError as error:
        raise ArgumentError(f"'{solver}' has no default settings: give the object, {made.__name__}(...)") from error


def _steps_of(chosen: Solver | Kernel) -> int:
    """Where nothing is said of them."""
    own = chosen.made_for if isinstance(chosen, Solver) else None
    return _USUAL if own is None else own


def _run_chains(
    kernel: Kernel, field: Denoiser | HasScore, x: Tensor, steps: int, cond: Cond, streams: Streams, keep: bool
) -> tuple[Tensor, int, tuple[Tensor, ...]]:
    """The ends of the chains, calls of the field, and all states where they are to be kept."""
    target = DenoiserAt(field, field.path.t_low) if isinstance(field, Denoiser) else field
    ran = kernel.run(target, x, steps, cond=cond, generator=streams, keep=keep)
    if ran.diverged:
        rows = ", ".join(str(row) for row in sorted(ran.diverged)[:8])
        warnings.warn(
            f"{len(ran.diverged)} of {len(x)} chains became infinite or NaN and stayed where they were before (rows "
            f"{rows}{', ...' if len(ran.diverged) > 8 else ''}): try a smaller step size",
            stacklevel=3,
        )
    return ran.x, ran.evals, () if ran.samples is None else tuple(ran.samples.unbind())


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
    rows = (~torch.isfinite(step.x.reshape(len(step.x), -1)).all(1)).nonzero()[:, 0].tolist()
    raise SamplingError(
        f"x became infinite or NaN in step {step.index}, from t = {step.t:.6g} to {step.s:.6g}, in {len(rows)} of "
        f"{len(step.x)} samples (first: {rows[0]}); there the field's answer was "
        f"{'finite' if whole else 'not finite'}. "
        + ("Check the start x and the solver's options." if whole else "Check the weights and the condition.")
    )


def _times(path: Path, solver: Solver, steps: int, grid: str | Spacing | Tensor | None) -> Tensor:
    if grid is None:
        return solver.default_grid(path, steps)
    return make_grid(path, steps, grid) if isinstance(grid, str | Spacing) else check_grid(path, grid)


def _sizes(shape: Sequence[int] | None, noise: Tensor | None) -> tuple[int, ...]:
    if noise is None and shape is None:
        raise ArgumentError("sample needs the shape (B, *event) of what to draw, or the noise to start from")
    try:
        sizes = tuple(map(index, shape)) if shape is not None else tuple(noise.shape)  # type: ignore[union-attr]
    except TypeError as error:
        raise ArgumentError(f"shape is {shape!r}: expected whole numbers (B, *event), all at least 1") from error
    if not sizes or min(sizes) < 1:
        raise ArgumentError(f"shape is {sizes}: expected (B, *event), all at least 1")
    if noise is not None and (tuple(noise.shape) != sizes or not noise.is_floating_point()):
        raise ArgumentError(f"noise is {noise.dtype} of shape {tuple(noise.shape)}: expected floats of shape {sizes}")
    return sizes


def _placement(
    field: object, noise: Tensor | None, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where x lives, and its dtype, float32 at least."""
    weights = field.parameters() if isinstance(field, nn.Module) else iter(())
    weight = next((p for p in weights if p.is_floating_point()), noise)
    like = noise if noise is not None else weight
    dtype = dtype if dtype is not None else like.dtype if like is not None else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"dtype is {dtype!r}: expected a floating-point one, such as torch.float32")
    dtype = torch.promote_types(dtype, torch.float32)
    if device is None:
        return weight.device if weight is not None else torch.device("cpu"), dtype
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device '{device}' cannot be used here: {error}") from error
    return torch.device(device), dtype


def placed(cond: Cond, rows: int, device: torch.device) -> Cond:
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
