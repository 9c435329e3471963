"""`undiffuse evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console, is_lead
from undiffuse.core.errors import ArgumentError

if TYPE_CHECKING:
    from undiffuse.cli.measuring import Figure, Measuring

DATA_KEYS = ("data.", "evaluation.", "sampling.")


def evaluate(
    run: options.RunName,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values of data, sampling, evaluation: data.path=..."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "--samples", help="Number of samples. Default: the recipe's.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Metrics, by comma. Default: the recipe's.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="TorchScript file to measure on instead of pixels, for example Inception.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="Its checksum, from a source you trust; required with it.")] = None,
    feature_option: Annotated[
        list[str] | None, typer.Option(help="A switch of its call, for example return_features. May be repeated.")
    ] = None,
    references: Annotated[
        bool, typer.Option(help="Measure resampled training data and held-out data too, to read the figures against.")
    ] = True,
    solver: options.SolverName = None,
    corrector: options.CorrectorName = None,
    threshold: options.ThresholdName = None,
    steps: options.Steps = None,
    grid: options.GridName = None,
    batch_size: options.BatchSize = None,
    ema: options.Ema = None,
    step: options.Step = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw samples of a run and measure them. Appends to evaluation.jsonl in the run folder.

    Every figure carries its protocol: how many samples, against which split, by which solver. A classifier draws no
    samples: its metrics are cross-entropy and accuracy (by noise level), on held-out data.

    \b
    Examples:
      undiffuse evaluate digits
      undiffuse evaluate classifier-digits --metrics accuracy
      undiffuse evaluate digits --n 2000 --metrics frechet,precision-recall --solver heun --steps 10
      undiffuse evaluate cifar10 --n 50000 --features inception.pt --sha256 6726... --feature-option return_features
      torchrun --nproc-per-node 8 -m undiffuse.cli evaluate cifar10 --samples 50000
    """
    if (features is None) != (sha256 is None):
        raise ArgumentError("--features and --sha256 go together: give the file and its checksum (sha256sum FILE)")
    from undiffuse.cli.drawing import How
    from undiffuse.cli.measuring import Measuring, load_changed

    screen = Console(json, quiet)
    extra = [f"evaluation.n={n}"] if n is not None else []
    extra += [f"evaluation.metrics=[{metrics}]"] if metrics is not None else []
    loaded = load_changed(run, [*(changes or []), *extra], DATA_KEYS)
    how = How(solver, steps, grid, batch_size, None, ema, step, device, corrector, threshold=threshold)
    if loaded.recipe.kind == "classifier":
        from undiffuse.cli.classifying import evaluate_classifier

        stray = {"--features": features, "--solver": solver, "--corrector": corrector, "--steps": steps}
        stray |= {"--grid": grid, "--threshold": threshold}
        evaluate_classifier(loaded, how, [name for name, value in stray.items() if value is not None], screen)
        return
    job = Measuring(loaded, how, features, sha256 or "", tuple(feature_option or ()), references)
    evaluate_run(job, screen)


def evaluate_run(job: Measuring, screen: Console) -> list[Figure]:
    """Measure, record, print; the figures, in the first process."""
    from undiffuse.cli.measuring import append

    folder = job.run.folder
    figures = job.run_all(screen)
    if is_lead():
        append(folder / "evaluation.jsonl", figures)
        _print(figures, screen)
        screen.say(f"appended to {folder / 'evaluation.jsonl'}")
        screen.result({"run": str(folder), "results": [figure.to_dict() for figure in figures]})
    return figures


def _print(figures: list[Figure], screen: Console) -> None:
    names = list(dict.fromkeys(name for figure in figures for name in figure.references))
    rows = [
        [figure.result.name, _number(figure.result.value, figure.result.std)]
        + [_number(figure.references[name]) if name in figure.references else "" for name in names]
        for figure in figures
    ]
    protocol = figures[0].result.protocol
    title = (
        f"{protocol.n:,} samples ({protocol.solver}, {protocol.steps} steps, {protocol.nfe} calls) against "
        f"{protocol.reference_n:,} of {protocol.reference} ({protocol.split}), on {protocol.features}"
    )
    screen.table(title, ["metric", "samples", *names], rows)
    for warning in dict.fromkeys(w for figure in figures for w in figure.result.warnings):
        screen.say(f"note: {warning}")


def _number(value: float, std: float | None = None) -> str:
    return f"{value:.4g}" + (f" ± {std:.2g}" if std is not None else "")
