"""How the figures of the examples are drawn: the report's colours, densities, arrows. Nothing of the theory is here."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from undiffuse.report.pictures import PALETTE
from undiffuse.report.style import LIGHT

BLUE, ORANGE, GREEN, RED, VIOLET = ("#{:02x}{:02x}{:02x}".format(*rgb) for rgb in PALETTE[:5])
INK, MUTED, RULE = LIGHT["ink"], LIGHT["muted"], LIGHT["rule"]
SHADE = LinearSegmentedColormap.from_list("shade", ["#ffffff", LIGHT["band"], LIGHT["middle"], LIGHT["accent"]])
HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#f4cfc9", "#dd7f76", LIGHT["bad"], "#6a120c"])
FIGURES = Path(__file__).parents[1] / "docs" / "figures"

plt.rcParams.update(
    {
        "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlepad": 7,
        "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.linewidth": 0.7, "axes.spines.top": False,
        "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK,
        "legend.frameon": False, "legend.fontsize": 8.5, "mathtext.fontset": "cm", "lines.linewidth": 1.6,
        "figure.facecolor": "white", "figure.dpi": 150,
    }
)  # fmt: skip


def sheet(columns: int, height: float = 3.9, **options) -> tuple[Figure, list[Axes]]:
    """A row of panels, 8 inches (1200 pixels) wide."""
    fig, axes = plt.subplots(1, columns, figsize=(8, height), layout="constrained", squeeze=False, **options)
    return fig, list(axes[0])


def lattice(limit: float, n: int) -> Tensor:
    """The n x n points of a square [-limit, limit]^2, (n^2, 2); x runs fastest."""
    line = torch.linspace(-limit, limit, n)
    return torch.cartesian_prod(line, line).flip(1)


def image(ax: Axes, values: Tensor, limit: float, **options):
    """Numbers on a `lattice` as colours."""
    n = round(len(values) ** 0.5)
    extent = (-limit, limit, -limit, limit)
    options = {"cmap": SHADE, "interpolation": "bilinear", **options}
    return ax.imshow(values.detach().reshape(n, n), origin="lower", extent=extent, **options)


def contours(ax: Axes, values: Tensor, limit: float, levels, **options):
    """Level lines of numbers on a `lattice`."""
    n = round(len(values) ** 0.5)
    line = torch.linspace(-limit, limit, n)
    return ax.contour(line, line, values.detach().reshape(n, n), levels, **options)


def arrows(ax: Axes, x: Tensor, v: Tensor, colour: str, longest: float, **options):
    """v at x; the longest arrow is `longest` units of x, lengths grow as |v|^(1/2) so that weak ones are seen."""
    length = v.norm(dim=1, keepdim=True)
    way = v / length.clamp(min=1e-12) * (length / length.max()).sqrt() * longest
    options = {"width": 0.0045, "headwidth": 4, "headlength": 4.5, "headaxislength": 4, **options}
    return ax.quiver(*x.T, *way.detach().T, color=colour, angles="xy", scale_units="xy", scale=1, **options)


def plane(ax: Axes, limit: float, title: str, ticks: bool = True) -> None:
    """A square panel with the plane's two axes; x_2 is named once in a row."""
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title, xlabel="$x_1$")
    ax.spines[["top", "right"]].set_visible(True)
    spec = ax.get_subplotspec()
    if spec is not None and spec.is_first_col():
        ax.set_ylabel("$x_2$")
    if not ticks:
        ax.set(xticks=[], yticks=[], xlabel="", ylabel="")


def save(fig: Figure, folder: Path, name: str) -> None:
    """NAME.png in the folder, in 256 colours: a third of the size, and no difference to the eye."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=150)
    plt.close(fig)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        folder / f"{name}.png", optimize=True
    )


def command(main: Callable[..., dict[str, float]], doc: str | None) -> None:
    """Run an example from the command line: its figures of merit to the screen, its picture to a folder."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the picture (default: docs/figures)")
    for name, value in main(parser.parse_args().out).items():
        print(f"{name:38s} {value:.4g}")
