"""Figures 4 and 6 of chapter 3: a network fitted to samples by implicit score matching, against the true score.

The objective `E tr ds/dx + |s|^2 / 2` (eq. 3.2.2) sees the data alone: what it learns is right where there are data,
and anything at all where there are none.
"""

from pathlib import Path

import torch
from drawing import BLUE, HEAT, INK, arrows, command, contours, image, lattice, plane, save, sheet
from fitting import fit

from undiffuse import GaussianMixture, ImplicitScoreMatching, ScoreNetwork
from undiffuse.metrics import fisher_divergence
from undiffuse.nets import MLP

LIMIT = 4.0


def main(out: Path | None = None, steps: int = 1000) -> dict[str, float]:
    """Fisher divergence under the data, relative to E |s*|^2, and how much worse the score is where data are rare."""
    means = torch.tensor([[-1.6, -1.6], [1.8, 1.4]])
    law = GaussianMixture(means, torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.4]))
    torch.manual_seed(0)
    model = ScoreNetwork(MLP(2, hidden=64, layers=2))
    fit(model, ImplicitScoreMatching(), law, steps, lr=5e-3)
    with torch.no_grad():
        x = law.sample(50_000, torch.Generator().manual_seed(1))
        fisher = fisher_divergence(law, model, x).value / float(law.score(x).square().sum(1).mean())
        grid = lattice(LIMIT, 141)
        error = (model.score(grid) - law.score(grid)).norm(dim=1)
        # Low density: outside the smallest region with 99 % of the probability.
        edge = law.log_prob(x).quantile(0.01)
        rare = law.log_prob(grid) < edge
        if out is not None:
            draw(out, law, model, error, edge)
    return {
        "relative Fisher divergence": fisher,
        "rms error where data are": float(error[~rare].square().mean().sqrt()),
        "rms error where data are rare": float(error[rare].square().mean().sqrt()),
    }


def draw(out: Path, law: GaussianMixture, model: ScoreNetwork, error: torch.Tensor, edge: torch.Tensor) -> None:
    fig, (left, middle, right) = sheet(3, 2.95)
    fine, coarse = lattice(LIMIT, 141), lattice(0.93 * LIMIT, 15)
    for ax, field, title in ((left, law, r"True score $\nabla \log p$"), (middle, model, r"Learned score $s_\phi$")):
        image(ax, law.log_prob(fine).exp(), LIMIT, alpha=0.7)
        arrows(ax, coarse, field.score(coarse), INK, 0.5)
        plane(ax, LIMIT, title)
    heat = image(right, error, LIMIT, cmap=HEAT, vmin=0, vmax=4)
    contours(right, law.log_prob(fine), LIMIT, [float(edge)], colors=BLUE, linewidths=1.4, linestyles="solid")
    right.text(-1.6, -1.6, "99 % of\nthe data", color=BLUE, ha="center", va="center")
    plane(right, LIMIT, r"Error $|s_\phi - \nabla \log p|$")
    fig.colorbar(heat, ax=right, shrink=0.8, extend="max")
    save(fig, out, "03_score_matching")


if __name__ == "__main__":
    command(main, __doc__)
