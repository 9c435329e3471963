"""What trained energies reach: `python benchmarks/ebm.py ring [RUN]`, `python benchmarks/ebm.py mnist RUN ...`.

ring: trains the recipe `ebm-ring` (or reads a run) and prints the mean absolute error of its log-density under the
data, normalised by quadrature on a grid, beside the log Z that it learned itself.

mnist: reads a run of `ebm-mnist` and prints how well its energy tells held-out digits from uniform noise, from the
same digits turned by 90 degrees, and from CIFAR-10 in grey at 28 x 28 (a folder of its parquet files).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import undiffuse as ud
from undiffuse.data.load import load
from undiffuse.data.plane import MODE_STD, ring_means
from undiffuse.fields.energy import Energy
from undiffuse.inference.energies import STATISTICS, NearestClass, out_of_distribution
from undiffuse.metrics.auroc import auroc
from undiffuse.recipes.build import data


def log_z(energy: Energy, half_width: float = 3.5, points: int = 701) -> float:
    """log of the integral of exp(-E) over a square, by the rectangle rule: exact to rounding for a smooth energy."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    with torch.no_grad():
        values = torch.cat([energy(part) for part in grid.split(50_000)])
    return float(torch.logsumexp(-values, 0)) + 2 * math.log(float(axis[1] - axis[0]))


def ring(run: ud.Run, n: int = 20_000) -> dict[str, float]:
    """Figures of a run of `ebm-ring`, in nats."""
    energy = run.energy().double()
    truth = ud.GaussianMixture(ring_means().double(), torch.full((8,), MODE_STD, dtype=torch.float64))
    x = truth.sample(n, ud.Streams.of(1234, n))
    total = log_z(energy)
    with torch.no_grad():
        error = -energy(x) - total - truth.log_prob(x)
    said = run.metrics()[-1].get("log_z", math.nan)
    return {
        "mean absolute error": float(error.abs().mean()),
        "relative entropy": -float(error.mean()),
        "log Z by quadrature": total,
        "log Z learned": said,
    }


def grey(place: str, n: int) -> Tensor:
    """CIFAR-10's test images in grey, scaled to 28 x 28."""
    images: Any = load(place, "test", channels=1, limit=n, label=None)
    x, _ = images.batch(torch.arange(n))
    return F.interpolate(x, size=(28, 28), mode="bilinear", antialias=True).clamp(-1, 1)


def unlabelled(run: ud.Run) -> Energy:
    """The run's energy; of one with labels, that of the nearest class."""
    energy, settings = run.energy(), run.recipe.settings
    if not settings.model.conditional:
        return energy
    return NearestClass.of(energy, *data(settings, "train").batch(torch.arange(5000)))


def mnist(run: ud.Run, cifar: str, n: int = 10_000) -> dict[str, float]:
    """AUROC of the run's energy, held-out digits against strangers."""
    energy = unlabelled(run)
    digits, _ = data(run.recipe.settings, "held-out").batch(torch.arange(n))
    strangers = {
        "uniform noise": 2 * torch.rand(digits.shape, generator=torch.Generator().manual_seed(0)) - 1,
        "turned by 90 degrees": torch.rot90(digits, 1, (2, 3)),
        "CIFAR-10 in grey": grey(cifar, n),
    }
    figures = {}
    for statistic in STATISTICS:
        inside = out_of_distribution(energy, digits, statistic=statistic)
        for name, x in strangers.items():
            figures[f"{statistic}: {name}"] = auroc(inside, out_of_distribution(energy, x, statistic=statistic))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ring", "mnist"])
    parser.add_argument("run", nargs="?", default="runs/ebm-ring-benchmark")
    parser.add_argument("--cifar", default="cifar10", help="folder of CIFAR-10's parquet files")
    words = parser.parse_args()
    if words.what == "ring":
        begun = (Path(words.run) / "checkpoints").is_dir()
        figures = ring(ud.load_run(words.run) if begun else ud.train("ebm-ring", words.run))
    else:
        figures = mnist(ud.load_run(words.run), words.cifar)
    for name, value in figures.items():
        print(f"{name:32s} {value:.4f}")


if __name__ == "__main__":
    main()
