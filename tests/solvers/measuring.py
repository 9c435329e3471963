"""How orders are measured: against exact answers, without Monte-Carlo error."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.oracles import Gaussian, GaussianMixture, exact_flow
from undiffuse.paths import Path
from undiffuse.solvers import DDIM, DDPM, EDM, RK4, Bound, DPMpp2M, Euler, Heun, Midpoint, Solver, integrate
from undiffuse.solvers.annealed import AnnealedLangevin
from undiffuse.solvers.reverse import SRK, EulerMaruyama, ReverseDiffusion, StochasticHeun

F64 = torch.float64

DETERMINISTIC: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "rk4": RK4(),
    "ddim": DDIM(),
    "dpmpp-2m": DPMpp2M(),
    "edm": EDM(),
    "reverse-diffusion eta=0": ReverseDiffusion(eta=0.0),
}
STOCHASTIC: dict[str, Solver] = {
    "ddpm": DDPM(),
    "ddim eta=0.5": DDIM(eta=0.5),
    "ddim eta=1": DDIM(eta=1.0),
    "edm churn=2": EDM(S_churn=2.0),
    "euler-maruyama": EulerMaruyama(),
    "euler-maruyama eta=0.5": EulerMaruyama(eta=0.5),
    "reverse-diffusion": ReverseDiffusion(),
    "stochastic-heun": StochasticHeun(),
    "stochastic-heun eta=0.5": StochasticHeun(eta=0.5),
    "srk": SRK(),
    "annealed-langevin": AnnealedLangevin(steps_per_level=3),
}
SOLVERS = {**DETERMINISTIC, **STOCHASTIC}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mixture() -> GaussianMixture:
    """Three overlapping modes in the plane: smooth, but not Gaussian."""
    means = torch.tensor([[-1.0, 0.2], [0.9, 0.6], [0.1, -1.1]], dtype=F64)
    return GaussianMixture(means, torch.tensor([0.5, 0.4, 0.6], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64))


def gaussian() -> Gaussian:
    return Gaussian(torch.tensor([0.7, -0.4, 0.2], dtype=F64), std=torch.tensor([1.0, 0.5, 0.2], dtype=F64))


def inner_grid(path: Path, steps: int) -> Tensor:
    """Equal steps in t between the half log-SNRs -1 and 1.3, where no end matters."""
    ends = path.time_of(torch.tensor([-1.0, 1.3], dtype=F64))
    return torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=F64)


def strong_error(solver: Solver, path: Path, counts: list[int]) -> list[float]:
    """Root mean square distance from the exact flow at the end of the inner interval."""
    denoiser, ends = mixture().denoiser(path), inner_grid(path, 1)
    x = mixture().perturbed(path, ends[0]).sample(16, torch.Generator().manual_seed(1))
    exact = exact_flow(denoiser, x, ends[0], ends[1])
    runs = (integrate(denoiser, x, inner_grid(path, n), solver) for n in counts)
    return [float((run - exact).square().mean().sqrt()) for run in runs]


def moments_after(solver: Solver, path: Path, grid: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance that a stochastic solver makes of a Gaussian with independent coordinates.

    Each step is affine in x and in each of its draws, coordinate by coordinate: probing it at 0 and 1 gives the
    coefficients.
    """
    field = Bound(gaussian().denoiser(path), grid=grid)
    solver = solver.for_steps(len(grid) - 1)
    zero, one = torch.zeros(1, len(mean), dtype=F64), torch.ones(1, len(mean), dtype=F64)
    state = solver.init(field, zero, grid[0])
    for t, s in pairwise(grid.unbind()):
        drawn: list[Tensor] = []

        def out(x: Tensor, place: int | None = None, t=t, s=s, state=state, drawn=drawn) -> tuple[Tensor, object]:
            """The step at x where draw number `place` is 1 and the others are 0."""
            drawn.clear()

            def noise() -> Tensor:
                drawn.append(one if len(drawn) == place else zero)
                return drawn[-1]

            return solver.step(field, x, t, s, state, noise)

        offset, after = out(zero)
        on_noise = sum(((out(zero, place)[0] - offset).square() for place in range(len(drawn))), start=0 * zero)
        on_x = out(one)[0] - offset
        mean, variance, state = on_x * mean + offset, on_x**2 * variance + on_noise, after
    return mean[0], variance[0]


def weak_error(solver: Solver, path: Path, counts: list[int]) -> list[float]:
    """Largest error of the standard deviations, exactly propagated, at the end of the inner interval."""
    errors = []
    for n in counts:
        grid = inner_grid(path, n)
        start, end = (gaussian().perturbed(path, t) for t in (grid[0], grid[-1]))
        mean, variance = moments_after(solver, path, grid, start.flat_mean, start.variances)
        wrong_spread = (variance.sqrt() - end.variances.sqrt()).abs() / end.variances.sqrt()
        errors.append(float(torch.cat([wrong_spread, (mean - end.flat_mean).abs()]).max()))
    return errors


def order(name: str, path: Path, counts: tuple[int, int] | None = None) -> float:
    """Slope of the error between two step counts, by default 100 and 200, and fewer where rounding is met before."""
    counts = counts or ((40, 80) if SOLVERS[name].order > 3 else (100, 200))
    measure = strong_error if name in DETERMINISTIC else weak_error
    coarse, fine = measure(SOLVERS[name], path, list(counts))
    return math.log(coarse / fine) / math.log(counts[1] / counts[0])
