"""Langevin throughput beside a bare loop and a peer: 8 modes in the plane, 10,000 chains, an energy as plain code.

    python benchmarks/langevin.py                # one thread, some minutes
    python benchmarks/langevin.py --threads 2 --rounds 15

Everybody differentiates the same function, a log-sum-exp, by autograd, with the same step. The machine's own speed
drifts, so every round runs each in turn, in an order that rotates, and medians over rounds are printed: microseconds
per step of all chains, and how many times faster than the bare loop and than the peer (ratios of medians). "cpu" is the
processor's time in place of the clock's: of use on a machine that others share. The peer, if not installed (pip install
torchebm), is left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from undiffuse import FunctionEnergy, Langevin
from undiffuse.solvers import CompiledEnergy

STEP = 0.01
ANGLES = torch.arange(8) * (math.pi / 4)
MODES = 4 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
WIDTH = 0.5

Run = Callable[[Tensor, int], Tensor]  # states and steps -> states


def energy(x: Tensor) -> Tensor:
    return -torch.logsumexp(-(x[:, None] - MODES).square().sum(-1) / (2 * WIDTH**2), 1)


def bare(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(x).sum(), x)
        with torch.no_grad():
            x = x - STEP * slope + math.sqrt(2 * STEP) * torch.randn_like(x)
    return x


def ours() -> Run:
    target, kernel = FunctionEnergy(energy), Langevin(STEP)
    return lambda x, steps: kernel.run(target, x, steps).x


def compiled() -> Run:
    target, kernel = CompiledEnergy(FunctionEnergy(energy)), Langevin(STEP)
    return lambda x, steps: kernel.run(target, x, steps).x


def torchebm() -> Run | None:
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError:
        print("torchebm is not installed: left out")
        return None

    class Model(BaseModel):
        def forward(self, x: Tensor) -> Tensor:
            return energy(x)

    sampler = LangevinDynamics(Model(), step_size=STEP, device="cpu")
    return lambda x, steps: sampler.sample(x=x, n_steps=steps)


def measure(runs: dict[str, Run], chains: int, steps: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median microseconds per step, by the clock and by the processor."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            x = torch.randn(chains, 2)
            runs[name](x, 3)
            clock, cpu = time.perf_counter(), time.process_time()
            runs[name](x, steps)
            if turn > 0:  # the first round warms up, and compiles
                seconds[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    return {
        name: (
            statistics.median(a for a, _ in times) / steps * 1e6,
            statistics.median(b for _, b in times) / steps * 1e6,
        )
        for name, times in seconds.items()
    }


def check(runs: dict[str, Run], chains: int = 20_000, steps: int = 150) -> None:
    """All of them sample one law: mean energies agree within 4 standard errors."""
    values = {name: energy(run(MODES.repeat(chains // 8, 1), steps)) for name, run in runs.items()}
    first = next(iter(values.values()))
    error = float(first.std()) * math.sqrt(2 / chains)
    for name, value in values.items():
        gap = float(value.mean() - first.mean())
        assert abs(gap) < 4 * error, f"{name} samples another law: mean energy off by {gap:.3f}, error {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chains", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs: dict[str, Run] = {"bare loop": bare, "undiffuse": ours(), "undiffuse, compiled": compiled()}
    peer = torchebm()
    if peer is not None:
        runs["torchebm"] = peer
    check(runs)
    times = measure(runs, options.chains, options.steps, options.rounds)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.chains} chains, {options.rounds} rounds")
    for name, (clock, cpu) in times.items():
        ratios = [f"{other} x {times[other][0] / clock:.2f} (cpu {times[other][1] / cpu:.2f})" for other in times]
        ratios = [r for r in ratios if r.startswith(("bare", "torchebm"))]
        print(f"{name:>22}: {clock:7.0f} us per step (cpu {cpu:7.0f}); {'; '.join(ratios)}")


if __name__ == "__main__":
    main()
