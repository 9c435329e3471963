"""Figure 2 of chapter 3: the score `s(x) = grad log p(x)` points to where the density grows, and holds all of it.

The energy below is 7 nats off and so belongs to no normalised density: its score is the same. Integrated along lines,
`log p(x) = log p(x_0) + integral from 0 to 1 of s(x_0 + u (x - x_0))^T (x - x_0) du`, it gives log p back.
"""

from pathlib import Path

import torch
from drawing import INK, ORANGE, arrows, command, contours, image, lattice, plane, save, sheet

from undiffuse import FunctionEnergy, GaussianMixture, log_density_ratio

LIMIT = 3.5


@torch.no_grad()
def main(out: Path | None = None) -> dict[str, float]:
    """Largest errors over a grid: of the energy's score, and of log p recovered from it."""
    means = torch.tensor([[-1.4, -0.9], [1.5, -0.7], [0.1, 1.5]])
    law = GaussianMixture(means, torch.tensor([0.75, 0.6, 0.5]), torch.tensor([0.45, 0.3, 0.25])).double()
    energy = FunctionEnergy(lambda x: 7 - law.log_prob(x))  # exp(-E) integrates to exp(-7)

    x, cell = lattice(2 * LIMIT, 141).double(), (4 * LIMIT / 140) ** 2
    log_p, score = law.log_prob(x), law.score(x)
    recovered = log_density_ratio(energy, x, torch.zeros(2).double(), points=96)
    recovered = recovered - torch.log(recovered.exp().sum() * cell)  # the constant: all probability is 1

    if out is not None:
        draw(out, law, log_p, recovered)
    gap = (energy.score(x) - score).norm(dim=1).max() / score.norm(dim=1).max()
    return {
        "score of the energy, relative error": float(gap),
        "log p from the score, error in nats": float((recovered - log_p).abs().max()),
    }


def draw(out: Path, law: GaussianMixture, log_p: torch.Tensor, recovered: torch.Tensor) -> None:
    fig, (left, right) = sheet(2, 4.35)
    fine = lattice(LIMIT, 161)
    image(left, law.log_prob(fine).exp(), LIMIT)
    coarse = lattice(LIMIT * 0.95, 21)
    arrows(left, coarse, law.score(coarse), INK, 0.48)
    plane(left, LIMIT, r"Score $\nabla \log p(x)$ over the density $p(x)$")

    levels = torch.arange(-15, 0, 1.5)
    contours(right, log_p, 2 * LIMIT, levels, colors="#c3cbe0", linewidths=4, linestyles="solid")
    lines = contours(right, recovered, 2 * LIMIT, levels, colors=ORANGE, linewidths=1.2, linestyles="solid")
    right.clabel(lines, lines.levels[::2], fmt="%g", fontsize=7.5)
    right.plot([], [], color="#c3cbe0", linewidth=4, label="closed form")
    right.plot([], [], color=ORANGE, linewidth=1.2, label="line integrals of the score")
    right.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    plane(right, LIMIT, r"Level lines of $\log p(x)$, in nats")
    save(fig, out, "03_score_field")


if __name__ == "__main__":
    command(main, __doc__)
