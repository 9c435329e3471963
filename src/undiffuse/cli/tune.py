"""`undiffuse tune`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console
from undiffuse.core.errors import ArgumentError

if TYPE_CHECKING:
    from undiffuse.cli.drawing import Model
    from undiffuse.solvers import Tuned

WORDS = {"reference": ("true ends", "noises"), "fit": ("fitting", "steps"), "measure": ("measuring", "runs")}


def tune(
    run: options.RunName,
    calls: Annotated[int, typer.Option(help="Network calls of the solver, 1 to 64.")] = 8,
    n: Annotated[int, typer.Option("--n", help="Noises: half fitted, a quarter to stop by, a quarter measured.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the noises.")] = 0,
    label: Annotated[
        int | None, typer.Option(help="Class of all trajectories, -1 for none. Default: all classes in turn.")
    ] = None,
    start: Annotated[str, typer.Option(help="The solver whose numbers are changed.")] = "abm-4",
    reference: Annotated[int, typer.Option(help="Steps of abm-4 that make the true ends.")] = 100,
    most_steps: Annotated[int, typer.Option(help="Steps of the fit at most.")] = 300,
    classifier: options.Classifier = None,
    classifier_scale: options.ClassifierScale = None,
    batch_size: options.BatchSize = None,
    ema: options.Ema = None,
    step: options.Step = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit a solver of few calls to a run: its grid and coefficients, from the run's own trajectories.

    Writes solvers/tuned-CALLS.safetensors in the run folder, used as: sample RUN --solver tuned-8. Stops when the error
    on held-out noise stops falling, and prints it before and after on noise that was never seen.

    \b
    Examples:
      undiffuse tune digits
      undiffuse tune digits --calls 5 --n 1024
      undiffuse sample digits --solver tuned-5
    """
    from undiffuse.cli.drawing import How, Model
    from undiffuse.cli.guiding import guide_of, say_guide
    from undiffuse.recipes import load_run
    from undiffuse.recipes.tuned import file_of
    from undiffuse.training.files import disk_errors

    screen, began = Console(json, quiet), time.monotonic()
    if not 0 <= seed < 2**63 - n:
        raise ArgumentError(f"--seed {seed}: expected at least 0")
    guide = guide_of(classifier, classifier_scale)
    found = load_run(run)
    found.expect("denoiser")
    model = Model.load(found, How(None, None, None, batch_size, label, ema, step, device, guide=guide))
    say_guide(model.guide, model.note, screen)
    made = _tuned(model, screen, calls, n=n, seed=seed, start=start, reference=reference, most_steps=most_steps)
    made = made.with_about(weights=model.seal, ema=model.ema, step=model.step, label=label, classifier=model.guide)
    file = file_of(model.run.folder, calls)
    with disk_errors(str(file), "The run is intact"):
        made.save(file)
    _report(made, model, str(file), screen, time.monotonic() - began)


def _tuned(model: Model, screen: Console, calls: int, **how: Any) -> Tuned:
    """The fit, with a bar."""
    from undiffuse.solvers.tuning import Progress
    from undiffuse.solvers.tuning import tune as fit

    sampler: Any = model.sampler
    cond = sampler.cond(range(how["seed"], how["seed"] + how["n"]))
    with screen.progress("true ends", "noises") as bar:

        def show(now: Progress) -> None:
            note = f"held-out error {now.error:.3g} of the start's" if now.stage == "fit" else ""
            bar.now(*WORDS[now.stage]).to(now.done, now.total, note=note)

        return fit(
            sampler.denoiser,
            tuple(sampler.facts.shape),
            calls,
            cond=cond,
            batch=sampler.batch,
            callback=show,
            **how,
        )


def _report(made: Tuned, model: Model, file: str, screen: Console, seconds: float) -> None:
    before, after = made.about["before"], made.about["after"]
    rows = [
        [name, f"{before[key]:.3g}", f"{after[key]:.3g}", f"{after[key] / before[key]:.2f}"]
        for name, key in (("RMS", "rms"), ("median", "median"))
    ]
    measured = made.about["n"] - 3 * made.about["n"] // 4
    title = f"error of x_0 at {made.calls} calls, {measured} noises never seen, relative to the RMS length of x_0"
    screen.table(title, ["", f"{made.about['start']}", "tuned", "ratio"], rows)
    folder = model.run.folder
    screen.say(f"wrote {file}; use it: undiffuse sample {folder} --solver tuned-{made.calls}")
    result = {"run": str(folder), "file": file, "calls": made.calls, "seconds": seconds}
    screen.result(result | dict(made.about))
