"""How orders are measured: against exact answers, without Monte-Carlo error."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.oracles import Gaussian, GaussianMixture, exact_flow
from undiffuse.paths import Path
from undiffuse.solvers import DDIM, DDPM, EDM, RK4, Bound, Euler, Heun, Midpoint, Multistep, Solver, integrate
from undiffuse.solvers.annealed import AnnealedLangevin
from undiffuse.solvers.multistep import MULTISTEP
from undiffuse.solvers.reverse import SRK, EulerMaruyama, ReverseDiffusion, StochasticHeun
from undiffuse.solvers.singlestep import SINGLESTEP

F64 = torch.float64

DETERMINISTIC: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "rk4": RK4(),
    "ddim": DDIM(),
    **{name: make() for name, make in (SINGLESTEP | MULTISTEP).items() if not make().stochastic},
    "multistep 5": Multistep(5, "noise", "half-log-snr", corrector=False),
    "multistep 3, velocity of the straight path": Multistep(3, 0.5, "canonical"),
    "multistep 2, mean": Multistep(2, "data", "sigma", corrector=False, rule="mean"),
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
    **{name: make() for name, make in MULTISTEP.items() if make().stochastic},
    "multistep 1, corrected, with noise": Multistep(1, "data", "half-log-snr", eta=1.0),
    "multistep 2, noise inside": Multistep(2, "data", "half-log-snr", False, "midpoint", 1.0, noisy=(0.3, 1.0)),
    "dpmpp-2m-sde eta=0.5": Multistep(2, "data", "half-log-snr", corrector=False, eta=0.5),
    "annealed-langevin": AnnealedLangevin(steps_per_level=3),
}
SOLVERS = {**DETERMINISTIC, **STOCHASTIC}
# Where the order shows later than between 100 and 200 steps.
COUNTS = dict.fromkeys(("abm-4", "multistep 5", "multistep 3, velocity of the straight path"), (200, 400))
COUNTS |= {"dpmpp-3m-sde": (800, 1600), "rk4": (40, 80), "sa-3": (1600, 3200)}
# Where noise begins inside a step the error depends on where in it (see test_noise_share.py): here it is everywhere.
MEASURED = SOLVERS | {name: replace(MULTISTEP[name](), noisy=(0.0, math.inf)) for name in ("sa-2", "sa-3")}


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
    """Root mean square distance from the exact flow at the end of the inner interval.

    A multistep method starts from exact states at its first times, so that its own order is seen.
    """
    denoiser, ends = mixture().denoiser(path), inner_grid(path, 1)
    x = mixture().perturbed(path, ends[0]).sample(16, torch.Generator().manual_seed(1))
    exact = exact_flow(denoiser, x, ends[0], ends[1])
    errors = []
    for n in counts:
        grid, given = inner_grid(path, n), getattr(solver, "points", 0)
        run, state, now = Bound(denoiser, grid=grid), None, x
        for i, (t, s) in enumerate(pairwise(grid.unbind())):
            now, state = solver.step(run, now, t, s, state, torch.zeros_like)
            if i < given:
                now = exact_flow(denoiser, x, ends[0], s)
        errors.append(float((now - exact).square().mean().sqrt()))
    return errors


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


def moments_of_run(solver: Solver, path: Path, grid: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """As `moments_after`, for a solver with a memory and one draw a step: a row of the batch for each draw."""
    steps = len(grid) - 1
    draws = iter(torch.eye(steps, dtype=F64))

    def noise() -> Tensor:
        return torch.cat([torch.zeros(2, dtype=F64), next(draws)])[:, None].expand(-1, len(mean)).clone()

    x = torch.zeros(steps + 2, len(mean), dtype=F64)
    x[1] = 1
    end = integrate(Bound(gaussian().denoiser(path), grid=grid), x, grid, solver, noise)
    on_x, on_noise = end[1] - end[0], end[2:] - end[0]
    return on_x * mean + end[0], on_x**2 * variance + on_noise.square().sum(0)


def weak_error(solver: Solver, path: Path, counts: list[int]) -> list[float]:
    """Largest error of the standard deviations, exactly propagated, at the end of the inner interval."""
    errors = []
    for n in counts:
        grid = inner_grid(path, n)
        start, end = (gaussian().perturbed(path, t) for t in (grid[0], grid[-1]))
        moments = moments_of_run if isinstance(solver, Multistep) else moments_after
        mean, variance = moments(solver, path, grid, start.flat_mean, start.variances)
        wrong_spread = (variance.sqrt() - end.variances.sqrt()).abs() / end.variances.sqrt()
        errors.append(float(torch.cat([wrong_spread, (mean - end.flat_mean).abs()]).max()))
    return errors


def order(name: str, path: Path) -> float:
    """Slope of the error between two step counts."""
    measure = strong_error if name in DETERMINISTIC else weak_error
    counts = COUNTS.get(name, (100, 200))
    coarse, fine = measure(MEASURED[name], path, list(counts))
    if fine < 3e-12:  # rounding is in it
        counts = (100, 200)
        coarse, fine = measure(MEASURED[name], path, list(counts))
    return math.log(coarse / fine) / math.log(counts[1] / counts[0])
