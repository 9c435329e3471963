"""Exact log-likelihood beside a peer's: time to equal accuracy on mixtures whose density is known.

    python benchmarks/likelihood.py               # one thread, some minutes
    python benchmarks/likelihood.py --sizes 2 10 --accuracy 1e-3

Both integrate the same exact field of a mixture on the straight path, from data to noise, with the divergence taken
exactly, in float64. For each, the solver and setting are chosen that reach the accuracy (largest error of any sample,
in nats) in the least time: the loosest accurate one of each solver's settings, three to a decade of tolerance, is
found by bisection. Then both run in turn; medians of the processor's time, of the wall's, and the ratio of the first.
The peer is flow_matching's `ODESolver.compute_likelihood` (pip install flow_matching torchdiffeq) with the solvers of
torchdiffeq of order 4 and more; if it is not there, ours stands alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import undiffuse as ud

Run = Callable[[], Tensor]
# Solver -> settings by name, the cheapest first.
Side = dict[str, dict[str, Run]]


def mixture(size: int) -> ud.GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(8, size, dtype=torch.float64, generator=generator)
    return ud.GaussianMixture(means, 0.3 + 0.3 * torch.rand(8, dtype=torch.float64, generator=generator))


def tolerances(first: int, last: int) -> list[float]:
    """From 10^-first down to 10^-last, three to a decade."""
    return [float(f"{10 ** (-k / 3):.1g}") for k in range(3 * first, 3 * last + 1)]


def ours(law: ud.GaussianMixture, x: Tensor) -> Side:
    field = law.denoiser(ud.Linear())

    def run(method: str, tolerance: float) -> Run:
        return lambda: (
            ud.log_likelihood(field, x, divergence="exact", rtol=tolerance, atol=tolerance, method=method).nats
        )

    return {m: {f"{tol:g}": run(m, tol) for tol in tolerances(2, 7)} for m in ("dopri5", "tsit5")}


def peer(law: ud.GaussianMixture, x: Tensor) -> Side:
    try:
        from flow_matching.solver import ODESolver
        from flow_matching.utils import ModelWrapper
    except ImportError as error:
        print(f"the peer is left out: {error}")
        return {}
    field = law.denoiser(ud.Linear())

    class Reversed(ModelWrapper):
        """The same field with their time, 1 at the data."""

        def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
            return -field.velocity(x, (1 - t).clamp(0, 1))  # its adaptive steps run past the end

    solver = ODESolver(Reversed(torch.nn.Identity()))
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    grid = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def run(**options: Any) -> Run:
        return lambda: solver.compute_likelihood(
            x.clone(), lambda z: normal.log_prob(z).sum(1), time_grid=grid, exact_divergence=True, **options
        )[1]

    adaptive = {
        m: {f"{tol:g}": run(step_size=None, method=m, atol=tol, rtol=tol) for tol in tolerances(3, 8)}
        for m in ("dopri5", "dopri8")
    }
    counts = (8, 12, 16, 24, 32, 48, 64, 96, 128)
    return adaptive | {"rk4": {f"1/{n}": run(step_size=1 / n, method="rk4") for n in counts}}


def timed(run: Run) -> tuple[float, float, Tensor]:
    """Seconds of the processor, of the wall, and what came out."""
    wall, own = time.perf_counter(), time.process_time()
    value = run()
    return time.process_time() - own, time.perf_counter() - wall, value


def fastest(side: Side, truth: Tensor, accuracy: float) -> tuple[str, float, Run] | None:
    """The setting that is accurate enough in the least time, its largest error, and how to run it again."""
    found = []
    for solver, settings in side.items():
        names = list(settings)
        first, last = 0, len(names)  # bisection: the cheapest accurate one is in [first, last]
        while first < last:
            middle = (first + last) // 2
            seconds, _, value = timed(settings[names[middle]])
            error = float((value.detach() - truth).abs().max())
            if error <= accuracy:
                found.append((seconds, f"{solver} {names[middle]}", error, settings[names[middle]]))
                last = middle
            else:
                first = middle + 1
    return min(found, key=lambda setting: setting[0])[1:] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 10, 64])
    parser.add_argument("--accuracy", type=float, default=1e-4, help="largest error, in nats")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # the peer's log-determinant has the default type
    for size in words.sizes:
        law = mixture(size)
        x = law.sample(words.samples, ud.Streams.of(1, words.samples))
        sides = {"ours": ours(law, x), "flow_matching": peer(law, x)}
        chosen = {who: fastest(side, law.log_prob(x), words.accuracy) for who, side in sides.items() if side}
        best = {who: setting for who, setting in chosen.items() if setting}
        times: dict[str, list[tuple[float, float]]] = {who: [] for who in best}
        for _ in range(words.rounds):
            for who, (_, _, run) in best.items():
                times[who].append(timed(run)[:2])
        medians = {who: [statistics.median(column) for column in zip(*own)] for who, own in times.items()}
        for who in chosen:
            if who not in best:
                print(f"D = {size:3d}  {who:14s} no setting reaches {words.accuracy:g} nats")
                continue
            (name, error, _), (own, wall) = best[who], medians[who]
            ratio = own / medians["flow_matching"][0] if "flow_matching" in medians else float("nan")
            print(
                f"D = {size:3d}  {who:14s} {name:14s} {own:8.3f} s (wall {wall:8.3f} s)  error {error:.1e}  "
                f"{ratio:.3f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
