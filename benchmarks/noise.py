"""Where noise on the way helps: samples of a ring by an exact denoiser, and by one whose score is 5 % too small.

    python benchmarks/noise.py                   # some minutes of one core

Prints for 10, 20 and 50 calls of each solver the energy distance of samples to as many exact ones, times 1,000, and
the spread of a sample about its mode over the true one; means over seeds. The ring has 8 modes, at unit variance.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from solver_truth import ring
from torch import Tensor

import undiffuse as ud
from undiffuse.metrics import energy_distance

EVERYWHERE = (0.0, math.inf)
SOLVERS: dict[str, str | ud.Multistep] = {
    "abm-4": "abm-4",
    "sa-2": "sa-2",
    "sa-2, noise everywhere": ud.Multistep(2, "data", "half-log-snr", rule="midpoint", eta=1.0, noisy=EVERYWHERE),
    "sa-3": "sa-3",
    "sa-3, noise everywhere": ud.Multistep(3, "data", "half-log-snr", eta=1.0, noisy=EVERYWHERE),
    "dpmpp-2m-sde": "dpmpp-2m-sde",
    "ddpm": "ddpm",
}


class Weak(ud.Denoiser):
    """A denoiser whose noise, and so whose score, is a share of another's: `D' = (x - share sigma eps) / alpha`."""

    def __init__(self, field: ud.Denoiser, share: float):
        super().__init__(field.path)
        self.field, self.share = field, share

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | dict[str, Tensor] | None = None) -> Tensor:
        return self.share * self.field(x_t, t, cond) + (1 - self.share) * x_t / self.path.alpha(t)


def figures(law: ud.GaussianMixture, x: Tensor, seed: int) -> tuple[float, float]:
    """Energy distance to exact samples, times 1,000; root mean square distance to the nearest mode, over the law's."""
    exact = law.sample(len(x), torch.Generator().manual_seed(1000 + seed))
    spread, true = ((torch.cdist(y, law.flat_means).amin(1) ** 2).mean().sqrt() for y in (x, exact))
    return 1e3 * energy_distance(x, exact), float(spread / true)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=4, help="2 at least")
    parser.add_argument("--share", type=float, default=0.95, help="of the score, in the second half")
    options = parser.parse_args()
    law, path, calls = ring(), ud.VP(), (10, 20, 50)
    floor = [figures(law, law.sample(options.n, torch.Generator().manual_seed(s)), s)[0] for s in range(options.seeds)]
    print(f"exact samples: {sum(floor) / len(floor):.2f}, standard deviation of a seed {statistics.stdev(floor):.2f}")
    for share in (1.0, options.share):
        for name, solver in SOLVERS.items():
            cells = []
            for steps in calls:
                field = Weak(law.denoiser(path), share)
                found = [
                    figures(law, ud.sample(field, (options.n, 2), solver=solver, steps=steps, seed=s).double(), s)
                    for s in range(options.seeds)
                ]
                cells.append(" ".join(f"{sum(values) / len(values):7.2f}" for values in zip(*found)))
            print(f"score x {share:4.2f}  {name:23s} " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
