"""`undiffuse statistics`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console
from undiffuse.core.errors import ArgumentError

if TYPE_CHECKING:
    from undiffuse.cli.drawing import Model
    from undiffuse.solvers import ModelStatistics


def statistics(
    run: options.RunName,
    n: Annotated[int, typer.Option("--n", "--samples", help="Samples of the run's own, of which noise is made.")] = 256,
    places: Annotated[int, typer.Option(help="Noise levels.")] = 64,
    shared: Annotated[bool, typer.Option("--shared", help="One number for all coordinates, not one for each.")] = False,
    seed: Annotated[int, typer.Option(help="Of the first sample; the others' are the next.")] = 0,
    label: Annotated[int | None, typer.Option(help="Class of all samples, -1 for none. Default: all in turn.")] = None,
    steps: options.Steps = None,
    classifier: options.Classifier = None,
    classifier_scale: options.ClassifierScale = None,
    threshold: options.ThresholdName = None,
    batch_size: options.BatchSize = None,
    ema: options.Ema = None,
    step: options.Step = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Estimate statistics of a run's model, by which the solver dpm-v3 goes (DPM-Solver-v3).

    Draws samples of the run, guided where a classifier is given, adds noise of all levels, and measures how the model
    answers there: about 5 calls a sample and level. Writes solvers/dpm-v3.safetensors in the run folder, used as:
    sample RUN --solver dpm-v3.

    \b
    Examples:
      undiffuse statistics digits
      undiffuse statistics digits --n 1024 --shared
      undiffuse sample digits --solver dpm-v3 --steps 8 --grid own
    """
    from undiffuse.cli.drawing import How, Model
    from undiffuse.cli.guiding import guide_of, say_guide
    from undiffuse.recipes import load_run
    from undiffuse.recipes.tuned import statistics_file
    from undiffuse.training.files import disk_errors

    screen, began = Console(json, quiet), time.monotonic()
    options.check_seed(seed, n)
    if n < 2 or places < 2:
        raise ArgumentError(f"--n {n} --places {places}: expected at least 2 of each")
    guide = guide_of(classifier, classifier_scale)
    found = load_run(run)
    found.expect("denoiser")
    how = How(None, steps, None, batch_size, label, ema, step, device, guide=guide, threshold=threshold)
    model = Model.load(found, how)
    say_guide(model.guide, model.note, screen)
    made = _estimated(model, screen, range(seed, seed + n), places, shared)
    made = made.with_about(weights=model.seal, ema=model.ema, step=model.step, label=label, classifier=model.guide)
    file = statistics_file(model.run.folder)
    with disk_errors(str(file), "The run is intact"):
        made.save(file)
    _report(made, model, str(file), screen, time.monotonic() - began)


def _estimated(model: Model, screen: Console, seeds: range, places: int, shared: bool) -> ModelStatistics:
    """Samples, and the statistics, with a bar each."""
    from undiffuse.recipes.generate import Sampler
    from undiffuse.solvers import model_statistics

    sampler = model.sampler
    assert isinstance(sampler, Sampler)
    with screen.progress("sampling", "samples") as bar:
        x_0 = sampler(seeds, on_batch=lambda done: bar.to(done, len(seeds)))
        return model_statistics(
            sampler.bounded,
            x_0.to(sampler.device),
            cond=sampler.cond(seeds),
            places=places,
            shared=shared,
            seed=seeds[0],
            batch=min(sampler.batch, 64),
            callback=lambda done, total: bar.now("estimating", "answers").to(done, total),
        )


def _report(made: ModelStatistics, model: Model, file: str, screen: Console, seconds: float) -> None:
    every = max(1, (len(made.half_log_snr) - 1) // 8)
    values = (made.half_log_snr, *(v.flatten(1).mean(1) for v in (made.linear, made.scaling, made.bias)))
    rows = [[f"{value:.3f}" for value in row] for row in list(zip(*(v.tolist() for v in values)))[::every]]
    title = f"means over the coordinates, of {made.about['n']} samples"
    screen.table(title, ["half log-SNR", "l", "s", "b"], rows)
    folder = model.run.folder
    screen.say(f"wrote {file}; use it: undiffuse sample {folder} --solver dpm-v3 --grid own")
    result = {"run": str(folder), "file": file, "places": len(made.half_log_snr), "seconds": seconds}
    result |= dict(zip(("half_log_snr", "l", "s", "b"), ([round(x, 6) for x in v.tolist()] for v in values)))
    screen.result(result | dict(made.about))
