"""A denoiser trained by SURE on noisy digits only, beside the same denoiser trained with the clean ones.

    python benchmarks/sure.py                    # noise drawn anew for every batch, and noise drawn once
    python benchmarks/sure.py --noise once --steps 2000

Both see the same noisy pictures in the same order, from the same first weights, for the same number of steps; the one
trained by SURE never sees a clean picture. "anew": every batch is a fresh noisy observation of its digits. "once": each
digit was observed once, before training, and nothing else is known; then both keep the weights that do best on a tenth
of the digits held back for that, judged by SURE on its noisy pictures and by the squared error respectively.

The figure is the mean squared error per pixel against the clean digits of the held-out split, 16 noise draws each.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from undiffuse.data.digits import digits_dataset
from undiffuse.fields.energy import DenoisingScore
from undiffuse.objectives.score_matching import SURE

Loss = Callable[[DenoisingScore, Tensor, Tensor, torch.Generator], Tensor]


class Denoiser(nn.Module):
    """x + W h(x): a perceptron that corrects its input."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def losses(sigma: float, probes: int) -> dict[str, Loss]:
    """Per-sample losses of (model, noisy, clean, generator); both estimate |D(x) - clean|^2."""
    sure = SURE(sigma, probes=probes)
    return {
        "clean targets": lambda model, x, clean, generator: (model.denoise(x) - clean).square().sum(1),
        "SURE": lambda model, x, clean, generator: sure(model, x, generator=generator),
    }


class Observations:
    """Noisy pictures beside their digits, the noise drawn anew for every batch or once."""

    def __init__(self, clean: Tensor, options, seed: int):
        self.clean, self.options = clean, options
        self.generator = torch.Generator().manual_seed(seed)
        self.once = self._noise(clean) if options.noise == "once" else None

    def _noise(self, clean: Tensor) -> Tensor:
        return clean + self.options.sigma * torch.randn(clean.shape, generator=self.generator)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        clean = self.clean[rows]
        return (self._noise(clean) if self.once is None else self.once[rows]), clean

    def draw(self) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.clean), (self.options.batch,), generator=self.generator)
        return self.batch(rows)


def train(loss: Loss, clean: Tensor, options) -> DenoisingScore:
    """Adam at a cosine rate, weights averaged; with noise drawn once, the best average by the loss itself."""
    torch.manual_seed(options.seed)
    model = DenoisingScore(Denoiser(clean.shape[1], options.hidden), options.sigma)
    average = copy.deepcopy(model).requires_grad_(False)
    best, least = copy.deepcopy(average), math.inf
    kept = len(clean) // 10
    data = Observations(clean[kept:], options, options.seed + 1)
    judged = Observations(clean[:kept], options, options.seed + 2).batch(torch.arange(kept))
    generator = torch.Generator().manual_seed(options.seed + 3)
    adam = torch.optim.Adam(model.parameters(), lr=options.rate, fused=True)
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / 100)
        adam.param_groups[0]["lr"] = options.rate * warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        loss(model, *data.draw(), generator).mean().backward()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            for a, w in zip(average.parameters(), model.parameters()):
                a.lerp_(w, 1 / min(step + 1, options.steps / 20))
        if options.noise == "once" and (step + 1) % max(1, options.steps // 50) == 0:
            with torch.no_grad():
                value = loss(average, *judged, torch.Generator().manual_seed(0)).mean().item()
            if value < least:
                best, least = copy.deepcopy(average), value
    return best if options.noise == "once" else average


def squared_error(model: DenoisingScore, clean: Tensor, options) -> float:
    """Per pixel, on 16 noise draws of every held-out digit."""
    clean = clean.repeat(16, 1)
    noisy = clean + options.sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(77))
    with torch.no_grad():
        return float((model.denoise(noisy) - clean).square().mean())


def compare(options) -> dict[str, float]:
    """Mean squared error of the denoiser of each loss."""
    clean, held_out = (digits_dataset(split).x.flatten(1) for split in ("train", "test"))
    clean = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))]
    return {
        name: squared_error(train(loss, clean, options), held_out, options)
        for name, loss in losses(options.sigma, options.probes).items()
    }


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", choices=["anew", "once", "both"], default="both")
    parser.add_argument("--sigma", type=float, default=0.4, help="pixels are in [-1, 1]")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    print("| noise | clean targets | SURE | ratio |\n|---|--:|--:|--:|")
    for noise in ["anew", "once"] if options.noise == "both" else [options.noise]:
        found = compare(argparse.Namespace(**{**vars(options), "noise": noise}))
        clean, sure = found["clean targets"], found["SURE"]
        print(f"| drawn {noise} | {clean:.5f} | {sure:.5f} | {sure / clean:.3f} |", flush=True)


if __name__ == "__main__":
    main()
