"""Figure 1 of chapter 3: maximum likelihood pushes the energy down at the data and up at the model's own samples.

The gradient of `-log p(x) = E(x) + log Z` is `grad E` at the data minus its mean over the model. The model's samples
come from Markov chains that go on from step to step: contrastive divergence with a buffer. Z is known here by
quadrature, for the figures alone; training does without.
"""

from pathlib import Path

import torch
from drawing import BLUE, GREEN, INK, MUTED, RED, command, save, sheet
from fitting import fit
from torch import Tensor

from undiffuse import MALA, ContrastiveDivergence, Energy, GaussianMixture, NetworkEnergy
from undiffuse.nets import EnergyMLP
from undiffuse.objectives import ReplayBuffer

GRID = torch.linspace(-8, 8, 1601)[:, None]
CELL = 0.01


@torch.no_grad()
def surprise(energy: Energy) -> Tensor:
    """`-log p = E + log Z` on the grid, nats."""
    value = energy(GRID)
    return value + torch.logsumexp(-value, 0) + torch.tensor(CELL).log()


def main(out: Path | None = None, steps: int = 500) -> dict[str, float]:
    """Change of -log p at the data and at the samples of the untrained model; distance to the data before and after."""
    law = GaussianMixture(torch.tensor([[-1.7], [1.5]]), torch.tensor([0.5, 0.7]), torch.tensor([0.4, 0.6]))
    torch.manual_seed(0)
    net = EnergyMLP(1, hidden=64, layers=2)
    torch.nn.init.zeros_(net.last.weight)  # the untrained model is N(0, 2^2)
    energy = NetworkEnergy(net, prior_std=2.0)
    before = surprise(energy)
    chains = ReplayBuffer((1,), 1024, reinit=0.01, scale=4.0)
    fit(energy, ContrastiveDivergence(MALA(0.25), 6, chains, penalty=0.0), law, steps)
    after, truth = surprise(energy), -law.log_prob(GRID)
    mass, begun = truth.neg().exp() * CELL, before.neg().exp() * CELL
    if out is not None:
        draw(out, law, before, after, truth)
    return {
        "change of -log p at the data": float(mass @ (after - before)),
        "change of -log p at the first samples": float(begun @ (after - before)),
        "total variation, before": 0.5 * float((begun - mass).abs().sum()),
        "total variation, after": 0.5 * float((after.neg().exp() * CELL - mass).abs().sum()),
    }


def draw(out: Path, law: GaussianMixture, before: Tensor, after: Tensor, truth: Tensor) -> None:
    x = GRID[:, 0]
    fig, (left, right) = sheet(2, 3.4)
    left.plot(x, before, color=MUTED, linestyle="--", label="model, before")
    left.plot(x, after, color=BLUE, label="model, after")
    left.plot(x, truth, color=INK, linewidth=0.9, linestyle=":", label="data")
    for i in range(400, 1201, 40):
        if abs(after[i] - before[i]) > 0.25:
            colour = GREEN if after[i] < before[i] else RED
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
            left.annotate("", (float(x[i]), float(after[i])), (float(x[i]), float(before[i])), arrowprops=arrow)
    left.set(xlim=(-4.5, 4.5), ylim=(0, 8), xlabel="$x$", ylabel=r"$-\log p = E + \log Z$ (nats)", title="Energy")
    left.legend(loc="upper center")
    right.fill_between(x, truth.neg().exp(), color="#d5e0f6", label="data")
    right.plot(x, before.neg().exp(), color=MUTED, linestyle="--", label="model, before")
    right.plot(x, after.neg().exp(), color=BLUE, label="model, after")
    right.set(xlim=(-4.5, 4.5), ylim=(0, 0.42), xlabel="$x$", ylabel="$p(x)$", title="Density")
    right.legend(loc="upper left")
    save(fig, out, "03_energy_training")


if __name__ == "__main__":
    command(main, __doc__)
