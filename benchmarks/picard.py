"""Rounds of Picard's iteration (ParaDiGMS) to a result of 1,000 steps, and its distance from that of step by step.

python benchmarks/picard.py                    # exact denoiser of 1,000 digits smoothed by 0.1, float64
python benchmarks/picard.py --run runs/digits  # a trained one, classes 0, 1, 2, ...
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits

import undiffuse as ud

PATHS = {"vp": ud.VP(), "linear": ud.Linear(), "ve": ud.VE()}


def compare(name: str, denoiser: ud.Denoiser, inner: str, windows: list[int], steps: int, **options) -> None:
    """A line for each window: rounds, rows, errors relative to the root mean square of the step-by-step result."""
    wanted = ud.sample(denoiser, solver=inner, steps=steps, seed=0, **options)
    size = wanted.square().mean().sqrt()
    for window in windows:
        solver = ud.Picard(inner, window)
        found = ud.sample(denoiser, solver=solver, steps=steps, seed=0, return_info=True, **options)
        each = (found.x - wanted).flatten(1).square().mean(1).sqrt() / size
        print(
            f"| {name}, `{inner}` | {window} | {found.nfe} | {float(found.rounds.double().mean()):.1f} "
            f"| {float(found.nfe_each.double().mean()):,.0f} | {float(each.square().mean().sqrt()):.1e} "
            f"| {float(each.max()):.1e} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="run folder of a recipe with classes")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--windows", type=int, nargs="+", default=[128])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("| field, rule | window | rounds, most | mean | rows per sample | error, RMS | of the worst sample |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    if chosen.run:
        run = ud.load_run(chosen.run)
        cond = torch.arange(chosen.samples) % 10
        shape = (chosen.samples, *run.facts.shape)
        options = {"shape": shape, "cond": cond}
        compare(chosen.run, run.denoiser(), "ddim", chosen.windows, chosen.steps, **options)
        return
    law = ud.Empirical(torch.tensor(load_digits().data[:1000]) / 8 - 1, std=0.1)
    options = {"shape": (chosen.samples, 64), "dtype": torch.float64}
    for name, inner in (("vp", "ddim"), ("vp", "euler"), ("vp", "dpmpp-2m"), ("linear", "ddim"), ("ve", "ddim")):
        compare(name, law.denoiser(PATHS[name]), inner, chosen.windows, chosen.steps, **options)


if __name__ == "__main__":
    main()
