"""Table 1 of Song et al. 2021 with a score that is exact: predictors alone (P), correctors alone (C), both (PC).

PC of N steps, P and C of 2 N cost the same: 2 N network calls. The world is 200 handwritten digits, each blurred by 0.1
a pixel, whose score is known; what is measured is how far samples are from their nearest digit, as a multiple of the
blur, 1 where they are right, and the energy distance to the law. With --run the denoiser is a trained one, the metric
the energy distance to the run's held-out data, and the path its own.

What comes out (n = 1000, N = 100): C alone is worst by far, since in 2 N levels the noise of a level goes down faster
than Langevin steps lose noise; with 1,000 levels they keep up. PC beats P at equal cost where the predictor is poor, as
in the paper: the probability flow, 1.10 to 1.03. An exact score leaves a corrector nothing to mend but the predictor's
discretisation error, so good predictors gain nothing: reverse diffusion is even, and ancestral sampling on VP loses. A
part of its width (9 % with N, 4 % with 2 N steps) goes in the last step, to sigma = 0, which no corrector follows. In
the paper these two gain as well (4.88 to 3.62 on VE), which an exact score does not show.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from drawing import BLUE, FIGURES, GREEN, INK, MUTED, ORANGE, plt, save
from sklearn.datasets import load_digits
from torch import Tensor

from undiffuse import VE, VP, Denoiser, Empirical, LangevinCorrector, Streams, load_run, sample
from undiffuse.metrics import energy_test, frechet_distance
from undiffuse.solvers import DDPM, ReverseDiffusion, Stay

BLUR, SNR = 0.1, 0.16
PREDICTORS = {
    "ancestral sampling": DDPM(),
    "reverse diffusion": ReverseDiffusion(),
    "probability flow": ReverseDiffusion(eta=0.0),
}
Measure = Callable[[Tensor], tuple[float, float]]  # samples -> (width, energy distance over the 99 % quantile)


def cells(steps: int) -> dict[str, tuple[int, bool]]:
    """Columns of the table: steps, and whether they are corrected."""
    return {f"P{steps}": (steps, False), f"P{2 * steps}": (2 * steps, False), f"PC{steps}": (steps, True)}


def draw_samples(field: Denoiser, solver, shape, steps: int, snr: float | None, cond=None) -> Tensor:
    """As in the paper: one Langevin step for each step of the predictor, and equal steps in t.

    On Karras's path, whose t is sigma, those would miss all small levels: there equal steps in log sigma, which are
    VE's. Samples of VE keep its last noise, 0.01, a tenth of the blur.
    """
    corrector = LangevinCorrector(snr) if snr is not None else None
    grid = "half-log-snr" if field.path.t_max > 1 else "time"
    return sample(field, shape, solver=solver, steps=steps, grid=grid, seed=3, corrector=corrector, cond=cond)


Table = dict[tuple[str, str], tuple[float, float]]


def study(field: Denoiser, measure: Measure, shape, steps: int, cond=None, snr: float = SNR) -> Table:
    """What `measure` says of each predictor and column, and of corrector-only sampling."""
    table = {}
    for name, solver in PREDICTORS.items():
        for column, (count, corrected) in cells(steps).items():
            table[name, column] = measure(draw_samples(field, solver, shape, count, snr if corrected else None, cond))
    table["none", f"C{2 * steps}"] = measure(draw_samples(field, Stay(), shape, 2 * steps, snr, cond))
    return table


def digits() -> tuple[Empirical, Tensor]:
    """The law, and its 200 points in [-1, 1]^64."""
    points = (torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1)[:200]
    return Empirical(points, std=BLUR), points


def measure_of(law: Empirical, points: Tensor, n: int) -> Measure:
    reference = law.sample(n, Streams.of(100, n))

    def measure(x: Tensor) -> tuple[float, float]:
        nearest = torch.cdist(x, points).min(1).values
        test = energy_test(x, reference, permutations=200)
        return float(nearest.square().mean().sqrt()) / BLUR / points.shape[1] ** 0.5, test.distance / test.quantile

    return measure


def main(out: Path | None = None, n: int = 1000, steps: int = 100, long: int = 1000) -> dict[str, float]:
    """Widths of the samples' modes, 1 in truth; `long` is the count with which correctors alone are given a chance."""
    law, points = digits()
    measure, shape = measure_of(law, points, n), (n, 64)
    paths = {"VE": VE(0.01, 20.0), "VP": VP()}
    tables = {name: study(law.denoiser(path), measure, shape, steps) for name, path in paths.items()}
    field = law.denoiser(paths["VE"])
    scan = {
        snr: {
            name: measure(draw_samples(field, PREDICTORS[name], shape, steps, snr))[0]
            for name in ("reverse diffusion", "probability flow")
        }
        for snr in (0.03, 0.06, 0.1, 0.16, 0.25, 0.4)
    }
    patient = measure(draw_samples(field, Stay(), (n // 4, 64), long, SNR))[0]
    value = {
        f"{path}, {row}, {column}": width
        for path, table in tables.items()
        for (row, column), (width, _) in table.items()
    }
    value["the law itself"] = measure(law.sample(n, Streams.of(7, n)))[0]
    value[f"VE, none, C{long}"] = patient
    value |= {f"VE, probability flow, PC{steps}, snr {snr}": widths["probability flow"] for snr, widths in scan.items()}
    if out is not None:
        write(out, tables)
        draw(out, tables, scan, steps, value[f"VE, none, C{2 * steps}"], patient, long)
    return value


def write(out: Path, tables: dict[str, Table], name: str = "04_predictor_corrector") -> None:
    """The table, as text that a page can include: what was measured (energy distance over its 99 % null)."""
    columns = [(path, column) for path, table in tables.items() for column in dict.fromkeys(c for _, c in table)]
    rows = list(dict.fromkeys(row for table in tables.values() for row, _ in table))
    lines = ["| predictor | " + " | ".join(f"{p} {c}" for p, c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        found = [tables[path].get((row, column)) for path, column in columns]
        lines.append(f"| {row} | " + " | ".join("" if v is None else f"{v[0]:.3g} ({v[1]:.2g})" for v in found) + " |")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(out: Path, tables, scan, steps: int, hasty: float, patient: float, long: int) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(8, 3.1), layout="constrained", width_ratios=(1, 1, 1.15))
    colours = dict(zip(PREDICTORS, (BLUE, ORANGE, GREEN)))
    for ax, (path, table) in zip(axes, tables.items()):
        for name, colour in colours.items():
            ax.plot(list(cells(steps)), [table[name, c][0] for c in cells(steps)], "o-", color=colour, label=name)
        ax.set(title=path, ylim=(0.6, 1.28))
        ax.axhline(1, color=INK, linewidth=0.8, linestyle="--")
    axes[0].set_ylabel("width of the modes / true")
    axes[1].legend(loc="lower right")
    axes[0].text(
        0.03, 0.04, f"C{2 * steps}: {hasty:.3g}\nC{long}: {patient:.3g}", transform=axes[0].transAxes, color=MUTED
    )
    for name in ("reverse diffusion", "probability flow"):
        axes[2].plot(list(scan), [w[name] for w in scan.values()], "o-", color=colours[name], label=name)
    axes[2].axhline(1, color=INK, linewidth=0.8, linestyle="--")
    axes[2].set(title=f"VE, PC{steps}", xlabel="snr of the corrector", xscale="log")
    axes[2].set_xticks(list(scan), [f"{s:g}" for s in scan], minor=False)
    axes[2].minorticks_off()
    axes[2].legend(loc="upper right")
    save(fig, out, "04_predictor_corrector")


def of_runs(folders: list[str], out: Path, n: int, steps: int, snr: float) -> dict[str, float]:
    """The same table for trained runs: Frechet distances to their training data, and energy distances."""
    tables = {}
    for folder in folders:
        run = load_run(folder)
        data = run.recipe.data()
        reference, labels = data.batch(torch.arange(min(n, len(data))))

        def measure(x: Tensor, reference: Tensor = reference) -> tuple[float, float]:
            test = energy_test(x, reference, permutations=200)
            return frechet_distance(x, reference), test.distance / test.quantile

        field = run.denoiser()
        tables[type(field.path).__name__] = study(field, measure, tuple(reference.shape), steps, labels, snr)
    write(out, tables, "04_predictor_corrector_run")
    return {
        f"{path}, {row}, {column}": value
        for path, table in tables.items()
        for (row, column), (value, _) in table.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of picture and table (default: docs/figures)")
    parser.add_argument("--runs", nargs="+", help="folders of trained runs, instead of the exact score")
    parser.add_argument("--n", type=int, default=1000, help="samples in each cell")
    parser.add_argument("--steps", type=int, default=100, help="N: predictor steps of P and PC")
    parser.add_argument("--snr", type=float, default=SNR, help="of the corrector, with --runs (default: %(default)s)")
    given = parser.parse_args()
    if given.runs:
        found = of_runs(given.runs, given.out, given.n, given.steps, given.snr)
    else:
        found = main(given.out, given.n, given.steps)
    for name, number in found.items():
        print(f"{name:44s} {number:.4g}")
