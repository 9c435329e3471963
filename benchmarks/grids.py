"""What fitted times gain on two exact worlds: error on noises that were never seen, against every named grid.

python benchmarks/grids.py                         # ring and digits, dpmpp-2m and abm-4, at 5, 8, 10 and 15 steps
"""

from __future__ import annotations

import argparse
import math
import time

import torch

import undiffuse as ud
from undiffuse.solvers import GRIDS
from undiffuse.solvers.comparing import relative_errors

F64 = torch.float64
N, SEED = 256, 1234


def worlds() -> dict[str, tuple[object, tuple[int, ...]]]:
    """A ring of 8 modes of std 0.2 at radius 2, and 300 digits of std 0.1."""
    from sklearn.datasets import load_digits

    turns = torch.arange(8, dtype=F64) * math.pi / 4
    ring = ud.GaussianMixture(2 * torch.stack([turns.cos(), turns.sin()], 1), torch.full((8,), 0.2, dtype=F64))
    return {"ring": (ring, (2,)), "digits": (ud.Empirical(torch.tensor(load_digits().data[:300] / 8 - 1), 0.1), (64,))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", default=["dpmpp-2m", "abm-4"])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15])
    words = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| world, solver, steps | named: RMS | fitted | named: median | fitted | seconds |\n|---|--:|--:|--:|--:|--:|"
    )
    for world, (law, event) in worlds().items():
        denoiser = law.denoiser(ud.Linear())
        how = {"seed": SEED, "dtype": F64}
        truth = ud.sample(denoiser, (N, *event), solver="abm-4", steps=400, grid="half-log-snr", **how)
        for solver in words.solvers:
            for steps in words.steps:
                began = time.monotonic()
                times = ud.optimise_grid(denoiser, event, steps, solver=solver)
                seconds = time.monotonic() - began
                errors = [
                    relative_errors(
                        ud.sample(denoiser, (N, *event), solver=solver, steps=steps, grid=grid, **how), truth
                    )
                    for grid in (times, None, *GRIDS)
                ]
                rms, median = (min(error[i] for error in errors[1:]) for i in (0, 1))
                figures = f"{rms:.1e} | {errors[0][0]:.1e} | {median:.1e} | {errors[0][1]:.1e}"
                print(f"| {world}, `{solver}`, {steps} | {figures} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
