"""Figure 3 of chapter 3: Langevin dynamics `x <- x + eta s(x) + sqrt(2 eta) z` (eq. 3.2.3); where it works, where not.

Left: the score carries chains to where the density is high. Middle: modes far apart keep the chains that fell to them,
so their shares, 0.8 and 0.2, come out as the start has it. Right: the share of the heavy mode against time.
"""

from pathlib import Path

import torch
from drawing import BLUE, GREEN, INK, MUTED, ORANGE, RED, arrows, command, image, lattice, plane, save, sheet
from torch import Tensor

from undiffuse import GaussianMixture, Langevin, LawEnergy, Streams

HEAVY, STEP = 0.8, 0.02


def modes(distance: float) -> GaussianMixture:
    """Weights 0.8 and 0.2, standard deviation 0.7, centres `distance` apart on the diagonal."""
    centre = torch.full((2,), distance / 8**0.5)
    return GaussianMixture(torch.stack([centre, -centre]), torch.full((2,), 0.7), torch.tensor([HEAVY, 1 - HEAVY]))


def share(law: GaussianMixture, x: Tensor) -> float:
    """Mean chance that a point belongs to the heavy mode: its weight, 0.8, where x has the law."""
    return float(law.responsibilities(x)[:, 0].mean())


def run(law: GaussianMixture, step: float, start: Tensor, steps: int, seed: int) -> Tensor:
    """Every tenth state of the chains, (steps / 10, B, 2)."""
    streams = Streams.of(seed, len(start))
    return Langevin(step).run(LawEnergy(law), start, steps, generator=streams, keep=True, thin=10).samples


def main(out: Path | None = None, chains: int = 4000, steps: int = 1000) -> dict[str, float]:
    """Errors of near modes' mean, variance and share after a run, and the share that distant modes are left with."""
    start = 2.5 * Streams.of(0, chains).normal((chains, 2))
    near, far = modes(2.4), modes(8.0)
    runs = [run(law, STEP, start, steps, seed=1) for law in (near, far)]
    late = runs[0][-steps // 20 :].flatten(0, 1)  # the second half of the run
    # A single Gaussian has a closed form for the price of a finite step: variance v / (1 - eta / (2 v)).
    wide = run(GaussianMixture(torch.zeros(1, 2), torch.ones(1)), 0.3, start, 500, seed=2)[5:]
    if out is not None:
        draw(out, near, far, runs)
    return {
        "near modes: error of the mean": float((late.mean(0) - near.mean).norm()),
        "near modes: variance / true": float(late.var(0).sum() / near.covariance.trace()),
        "near modes: error of the share": abs(share(near, late) - HEAVY),
        "distant modes: share of the heavy one": share(far, runs[1][-1]),
        "Gaussian, step 0.3: variance / predicted": float(wide.var((0, 1)).mean() * (1 - 0.3 / 2)),
    }


def draw(out: Path, near: GaussianMixture, far: GaussianMixture, runs: list[Tensor]) -> None:
    fig, (left, middle, right) = sheet(3, 2.95)
    for ax, law, limit in ((left, near, 4.2), (middle, far, 6.5)):
        image(ax, law.log_prob(lattice(limit, 121)).mul(0.5).exp(), limit, alpha=0.75)
        arrows(ax, x := lattice(0.94 * limit, 15), law.score(x), MUTED, 0.11 * limit, alpha=0.6)
    begun = torch.tensor([[-3.4, 3.4], [3.4, -3.4], [-3.6, -1.2], [0.6, 3.8]])
    path = Langevin(STEP / 2).run(LawEnergy(near), begun, 160, generator=Streams.of(4, 4), keep=True).samples
    for i, colour in enumerate((ORANGE, GREEN, RED, INK)):
        left.plot(*path[:, i].T, color=colour, linewidth=0.9)
        left.plot(*begun[i], "o", color="white", markeredgecolor=colour, markersize=5)
        left.plot(*path[-1, i], "o", color=colour, markersize=6)
    middle.plot(*runs[1][-1][:400].T, ".", color=ORANGE, markersize=2.5)
    plane(left, 4.2, r"Near modes: four chains, $\eta$ = 0.01")
    plane(middle, 6.5, f"Distant modes: {len(runs[1]) * 10} steps later")
    time = STEP * 10 * torch.arange(1, len(runs[0]) + 1)
    for law, states, colour, name in zip((near, far), runs, (BLUE, ORANGE), ("near", "distant")):
        right.plot(time, [share(law, x) for x in states], color=colour, label=f"{name} modes")
    right.axhline(HEAVY, color=INK, linewidth=0.8, linestyle="--", label="true")
    right.set(ylim=(0.45, 0.85), xlabel=r"time $n \eta$", title="Share of the heavy mode", box_aspect=1)
    right.legend(loc="center right", bbox_to_anchor=(1, 0.45))
    save(fig, out, "03_langevin")


if __name__ == "__main__":
    command(main, __doc__)
