"""Figure 7 of chapter 3: a noise-conditional score network and annealed Langevin dynamics through its noise levels.

One network learns the scores of `p_sigma` for all levels (eq. 3.4.1 with lambda = sigma^2). Langevin dynamics at the
widest level, where there is one mode only, gets the shares of the modes right; each narrower level starts from there.
With the same network and start, Langevin dynamics at the narrowest level alone does not.
"""

from pathlib import Path

import torch
from drawing import ORANGE, RED, command, image, lattice, plane, plt, save
from fitting import fit
from torch import Tensor

from undiffuse import (
    AnnealedLangevin,
    DenoiserAt,
    Denoising,
    GaussianMixture,
    Langevin,
    NetworkDenoiser,
    Streams,
    Tabulated,
    geometric_levels,
    sample,
)
from undiffuse.nets import MLP
from undiffuse.objectives.times import Discrete

LEVELS, STEPS = 10, 60  # noise levels, Langevin steps at each
HEAVY = 0.8


def main(out: Path | None = None, steps: int = 1500, n: int = 4000) -> dict[str, float]:
    """Share of the heavy mode, 0.8, as the two samplers give it, and the spread of each mode."""
    law = GaussianMixture(torch.tensor([[1.8, 1.8], [-1.8, -1.8]]), torch.full((2,), 0.4), torch.tensor([HEAVY, 0.2]))
    path = Tabulated.from_sigmas(geometric_levels(0.1, 5.0, LEVELS))
    torch.manual_seed(0)
    model = NetworkDenoiser(MLP(2, hidden=64, layers=2), path, "noise")  # the noise is -sigma times the score
    fit(model, Denoising(time=Discrete(LEVELS), weight="snr"), law, steps)
    annealed = AnnealedLangevin(STEPS, delta=0.3 * 0.1**2)
    run = sample(model, (n, 2), solver=annealed, steps=LEVELS, seed=1, return_info=True)
    at, start = DenoiserAt(model, path.t_low), run.trajectory[0]
    plain = Langevin(0.01).run(at, start, LEVELS * STEPS, generator=Streams.of(2, n), keep=True, thin=10).samples

    if out is not None:
        draw(out, law, path, run, torch.cat([start[None], plain]))
    heavy = run.x[run.x.sum(1) > 0]
    return {
        "annealed: share of the heavy mode": share(run.x),
        "plain: share of the heavy mode": share(plain[-1]),
        "annealed: spread of the mode / true": float(heavy.var(0).mean().sqrt() / 0.4),
    }


def share(x: Tensor) -> float:
    return float((x.sum(1) > 0).float().mean())


def draw(out: Path, law: GaussianMixture, path: Tabulated, run, plain: Tensor) -> None:
    rows, columns = run.trajectory, [1, 3, 5, 7, LEVELS]
    fig, axes = plt.subplots(2, 5, figsize=(8, 4), layout="constrained")
    for above, below, i, k in zip(*axes, columns, [0, 1, 6, 30, 60]):
        wide, narrow = (float(path.sigma(run.grid[j])) for j in (i - 1, LEVELS - 1))
        for ax, level, x, colour in ((above, wide, rows[i], ORANGE), (below, narrow, plain[k], RED)):
            limit = max(4.5, 2.4 * level)
            marginal = law.scaled(torch.tensor(1.0), torch.tensor(level))
            image(ax, marginal.log_prob(lattice(limit, 101)).mul(0.5).exp(), limit, alpha=0.75)
            ax.plot(*x[:600].T, ".", color=colour, markersize=1.8, alpha=0.7)
        plane(above, max(4.5, 2.4 * wide), rf"$\sigma$ = {wide:.2g}: {share(rows[i]):.0%}", ticks=False)
        plane(below, 4.5, f"{10 * k} steps: {share(plain[k]):.0%}", ticks=False)
    axes[0, 0].set_ylabel("annealed Langevin")
    axes[1, 0].set_ylabel(rf"Langevin at $\sigma$ = {narrow:.2g} alone")
    fig.supxlabel("Shares of the samples above the diagonal; that mode has 80 % of the data", fontsize=9)
    save(fig, out, "03_ncsn")


if __name__ == "__main__":
    command(main, __doc__)
