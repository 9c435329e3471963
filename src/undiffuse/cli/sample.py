"""`undiffuse sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console, is_lead
from undiffuse.core.errors import ArgumentError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from undiffuse.cli.drawing import Model

FORMATS = ("grid", "png", "npz")
MOST_IN_GRID = 10_000
# Up to so many classes a grid has a column for each.
MOST_COLUMNS = 20
SIDE = 256  # small images are enlarged, by a whole number, to about a grid of this many pixels per ten


def sample(
    run: options.RunName,
    seeds: Annotated[str, typer.Option(help="Which samples: 0-49999, 17, or 3,8-10. Each seed is a sample.")] = "0-63",
    label: Annotated[
        int | None, typer.Option(help="Class of all samples, -1 for none. Default: seed mod number of classes.")
    ] = None,
    classifier: options.Classifier = None,
    classifier_scale: options.ClassifierScale = None,
    solver: options.SolverName = None,
    corrector: options.CorrectorName = None,
    threshold: options.ThresholdName = None,
    steps: options.Steps = None,
    grid: options.GridName = None,
    batch_size: options.BatchSize = None,
    ema: options.Ema = None,
    step: options.Step = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the samples. Default: one in the run folder.", metavar="DIR")
    ] = None,
    format: Annotated[
        str, typer.Option(help="grid (one picture and samples.npz), png (a picture per seed), npz.")
    ] = "grid",
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw samples from a run. Sample 17 is the same whatever else is drawn with it, but for rounding.

    Stopped half-way, the same command goes on where it stopped. Under torchrun the seeds are shared out.

    \b
    Examples:
      undiffuse sample digits
      undiffuse sample digits --seeds 0-9 --label 3 --solver heun --steps 10
      undiffuse sample digits --solver reverse-diffusion --corrector langevin:snr=0.1 --steps 50
      undiffuse sample runs/cifar10-20260101-120000 --seeds 0-49999 --format npz --out samples
      undiffuse sample runs/plain --classifier classifier-digits --label 3
      undiffuse sample runs/plain --classifier mine --classifier-scale 7.5 --label 3 --threshold dynamic
      torchrun --nproc-per-node 8 -m undiffuse.cli sample cifar10 --seeds 0-49999 --format png
    """
    wanted = options.parse_seeds(seeds)
    _check_format(format, len(wanted), out)
    from undiffuse.cli.drawing import How, Model, draw
    from undiffuse.cli.guiding import guide_of, say_guide
    from undiffuse.recipes import load_run

    screen = Console(json, quiet)
    guide = guide_of(classifier, classifier_scale)
    how = How(solver, steps, grid, batch_size, label, ema, step, device, corrector, guide, threshold)
    model = Model.load(load_run(run), how)
    shape = model.sampler.facts.shape
    drawable = model.sampler.facts.image or shape == [2]
    if format != "npz" and not (model.sampler.facts.image or (format == "grid" and drawable)):
        raise ArgumentError(f"--format {format}: samples of shape {shape} are no pictures; use --format npz")
    folder = out or model.folder_for(wanted, format)
    screen.say(f"{len(wanted):,} samples of {model.run.folder} (step {model.step}, weights {model.ema}): {model.said}")
    say_guide(model.guide, model.note, screen)
    done = draw(model, wanted, folder, format, screen)
    if not is_lead():
        return
    files = [folder] if format == "png" else [folder / "samples.npz"]
    if format == "grid":
        files.insert(0, picture(model, folder))
    kept = f" ({done.total - done.new:,} were there)" if done.new < done.total and _alone() else ""
    screen.say(f"wrote {', '.join(str(file) for file in files)}{kept}")
    rate = done.new / done.seconds if done.seconds > 0 else None
    screen.result(
        {"run": str(model.run.folder), "out": str(folder), "format": format, "n": done.total, "new": done.new}
        | {"files": [str(file) for file in files], "nfe": model.nfe, "seconds": done.seconds}
        | {"samples_per_second": rate}
        | model.settings()
    )


def _alone() -> bool:
    import os

    return os.environ.get("WORLD_SIZE", "1") == "1"


def _check_format(format: str, n: int, out: Path | None) -> None:
    if format not in FORMATS:
        raise ArgumentError(f"--format {format}: expected {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    if format == "grid" and n > MOST_IN_GRID:
        raise ArgumentError(
            f"--format grid shows at most {MOST_IN_GRID:,} samples, {n:,} were asked for: use png or npz"
        )
    if out is not None and out.suffix in (".png", ".npz"):
        raise ArgumentError(f"--out {out}: expected a folder; the file in it is grid.png or samples.npz")


def picture(model: Model, folder: Path) -> Path:
    """`grid.png` (images) or `scatter.png` (points) from `samples.npz`."""
    from undiffuse.cli.drawing import read_samples

    x, _, labels = read_samples(folder)
    return draw_picture(x, labels, folder, model.sampler.facts.num_classes)


def draw_picture(x: Tensor, labels: Tensor | None, folder: Path, classes: int | None, stem: str = "") -> Path:
    """Samples as one picture in `folder`: a grid, with a column for each class where there are few, or a scatter."""
    from undiffuse.report.pictures import image_grid, png_bytes, scatter
    from undiffuse.training.files import disk_errors, replace_file

    if x.ndim == 2:
        file, image = folder / f"{stem or 'scatter'}.png", scatter(x, labels, background=(255, 255, 255))
    else:
        columns = classes if classes and classes <= MOST_COLUMNS and classes <= len(x) else None
        scale = max(1, SIDE // 10 // max(x.shape[2:]))
        file, image = folder / f"{stem or 'grid'}.png", image_grid(x, columns=columns, pad=2, scale=scale)
    with disk_errors(str(file), "The samples are intact"):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, png_bytes(image))
    return file
