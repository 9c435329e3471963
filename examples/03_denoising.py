"""Figure 5 of chapter 3: denoising score matching puts a known score in the place of an unknown one, by conditioning.

Given its clean x, a noisy `x~ = x + sigma eps` has the score `(x - x~) / sigma^2`. Its mean over the x that x~ may come
from is the score of all noisy data, `grad log p_sigma(x~)`; regression on it finds that mean (theorem 3.3.1).
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from drawing import BLUE, GREEN, INK, ORANGE, arrows, command, image, lattice, plane, plt, save, sheet
from torch import Tensor

from undiffuse import DenoisingScoreMatching, GaussianMixture

SIGMA, LIMIT = 0.5, 3.0


def average(x: Tensor, clean: Tensor) -> Tensor:
    """`sum_i w_i (x_i - x) / sigma^2`: conditional scores, weighted by how likely x comes from each x_i."""
    weight = (-torch.cdist(x, clean).square() / (2 * SIGMA**2)).softmax(1)
    return (weight @ clean - x) / SIGMA**2


@torch.no_grad()
def main(out: Path | None = None, draws: int = 200_000) -> dict[str, float]:
    """Error of the averages, and the multiple of the score of all noisy data that denoising score matching prefers."""
    angle = torch.linspace(0.4, 5.2, 12)
    curve = torch.stack([angle.cos(), angle.sin()], 1) * (0.6 + 0.3 * angle[:, None])
    law = GaussianMixture(curve, torch.full((12,), 0.12))
    noisy = law.scaled(torch.tensor(1.0), torch.tensor(SIGMA))  # p_sigma, in closed form
    generator = torch.Generator().manual_seed(0)
    clean = law.sample(draws, generator)
    x = noisy.sample(300, generator)
    means, score = average(x, clean), noisy.score(x)
    # The objective of c s is a parabola in c. Three values give its lowest point: 1, if s is what it looks for.
    noise, objective = torch.randn(clean.shape, generator=generator), DenoisingScoreMatching(SIGMA)
    multiples = [SimpleNamespace(score=lambda y, _, c=c: c * noisy.score(y)) for c in (0.0, 1.0, 2.0)]
    at = [float(objective.at(model, clean, noise).mean()) for model in multiples]
    best = 0.5 + (at[0] - at[1]) / (at[2] - 2 * at[1] + at[0])
    if out is not None:
        draw(out, law, noisy, clean)
    return {
        "average of conditional scores, error": float((means - score).norm() / score.norm()),
        "best multiple of the score of p_sigma": best,
    }


def draw(out: Path, law: GaussianMixture, noisy: GaussianMixture, clean: Tensor) -> None:
    fig, (left, middle, right) = sheet(3, 2.95)
    for ax in (left, middle):
        image(ax, noisy.log_prob(lattice(LIMIT, 141)).exp(), LIMIT, alpha=0.6)
        ax.plot(*clean[:500].T, ".", color=BLUE, markersize=2)
    dashed = {"fill": False, "color": INK, "linewidth": 0.8, "linestyle": (0, (3, 2))}
    for x in law.flat_means[[1, 5, 9]].tolist():
        left.plot(*x, "o", color=INK, markersize=4)
        left.add_patch(plt.Circle(x, SIGMA, **dashed))
        left.add_patch(plt.Circle(x, 2 * SIGMA, **dashed))
    here = torch.tensor([[-0.35, -0.1]])
    weight = (-(clean[:20_000] - here).square().sum(1) / (2 * SIGMA**2)).softmax(0)
    origins = clean[weight.multinomial(24, generator=torch.Generator().manual_seed(1))]
    mean = (here + SIGMA**2 * noisy.score(here))[0]
    for end, colour, width in [(x, GREEN, 0.8) for x in origins] + [(mean, ORANGE, 2.5)]:
        arrow = {"arrowstyle": "->", "color": colour, "linewidth": width, "mutation_scale": 10 + 2 * width}
        middle.annotate("", end.tolist(), here[0].tolist(), arrowprops=arrow)
    middle.plot(*here[0], "o", color=INK, zorder=5)
    coarse = lattice(0.92 * LIMIT, 13)
    head = {"width": 0.012, "headwidth": 3, "headlength": 3, "headaxislength": 3}
    arrows(right, coarse, noisy.score(coarse), "#bccbea", 0.55, **head)
    arrows(right, coarse, average(coarse, clean), ORANGE, 0.55)
    plane(left, LIMIT, r"Data and kernels $p_\sigma(\tilde x\,|\,x)$")
    plane(middle, LIMIT, r"$\sigma^2\,\nabla \log p_\sigma(\tilde x\,|\,x)$ and its mean")
    middle.set(xlim=(-1.8, 1.2), ylim=(-1.6, 1.4))
    plane(right, LIMIT, r"Means (orange), $\nabla \log p_\sigma$ (pale)")
    save(fig, out, "03_denoising")


if __name__ == "__main__":
    command(main, __doc__)
