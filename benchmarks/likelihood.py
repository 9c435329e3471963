"""Exact log-likelihood beside a peer's: time to equal accuracy on mixtures whose density is known.

    python benchmarks/likelihood.py               # one thread, some minutes
    python benchmarks/likelihood.py --sizes 2 10 --accuracy 1e-3

Both integrate the same exact field of a mixture on the straight path, from data to noise, with the divergence taken
exactly, in float64. For each, the solver and setting are chosen that reach the accuracy (largest error of any sample,
in nats) in the least time; then both run in turn, and medians and their ratio are printed. The peer is flow_matching's
`ODESolver.compute_likelihood` (pip install flow_matching torchdiffeq); if it is not there, ours stands alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import undiffuse as ud

Run = Callable[[], Tensor]


def mixture(size: int) -> ud.GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(8, size, dtype=torch.float64, generator=generator)
    return ud.GaussianMixture(means, 0.3 + 0.3 * torch.rand(8, dtype=torch.float64, generator=generator))


def ours(law: ud.GaussianMixture, x: Tensor) -> dict[str, Run]:
    field = law.denoiser(ud.Linear())

    def run(method: str, tolerance: float) -> Run:
        return lambda: (
            ud.log_likelihood(field, x, divergence="exact", rtol=tolerance, atol=tolerance, method=method).nats
        )

    return {f"{m} {10.0**-k:g}": run(m, 10.0**-k) for m in ("dopri5", "tsit5") for k in (2, 3, 4, 5, 6)}


def peer(law: ud.GaussianMixture, x: Tensor) -> dict[str, Run]:
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

    def run(**options: object) -> Run:
        return lambda: solver.compute_likelihood(
            x.clone(), lambda z: normal.log_prob(z).sum(1), time_grid=grid, exact_divergence=True, **options
        )[1]

    adaptive = {
        f"dopri5 {10.0**-k:g}": run(step_size=None, method="dopri5", atol=10.0**-k, rtol=10.0**-k) for k in range(3, 9)
    }
    fixed = {f"{m} 1/{n}": run(step_size=1 / n, method=m) for m in ("midpoint", "rk4") for n in (16, 32, 64, 128)}
    return adaptive | fixed


def timed(run: Run) -> tuple[float, Tensor]:
    began = time.perf_counter()
    value = run()
    return time.perf_counter() - began, value


def fastest(runs: dict[str, Run], truth: Tensor, accuracy: float) -> tuple[str, float] | None:
    """The setting that is accurate enough in the least time, and its largest error."""
    found = []
    for name, run in runs.items():
        seconds, value = timed(run)
        error = float((value.detach() - truth).abs().max())
        if error <= accuracy:
            found.append((seconds, name, error))
    return min(found)[1:] if found else None


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
        chosen = {who: fastest(runs, law.log_prob(x), words.accuracy) for who, runs in sides.items() if runs}
        times: dict[str, list[float]] = {who: [] for who, best in chosen.items() if best}
        for _ in range(words.rounds):
            for who, own in times.items():
                best = chosen[who]
                assert best is not None
                own.append(timed(sides[who][best[0]])[0])
        for who, best in chosen.items():
            if best is None:
                print(f"D = {size:3d}  {who:14s} no setting reaches {words.accuracy:g} nats")
            else:
                median = statistics.median(times[who])
                ratio = median / statistics.median(times["flow_matching"]) if "flow_matching" in times else float("nan")
                print(f"D = {size:3d}  {who:14s} {best[0]:14s} {median:8.3f} s  error {best[1]:.1e}  {ratio:.3f} x")


if __name__ == "__main__":
    main()
