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
    from undiffuse.solvers import OptimisedGrid, Tuned

GRID = "grid"
WORDS = {"reference": ("true ends", "noises"), "fit": ("fitting", "grids"), "measure": ("measuring", "runs")}


def tune(
    run: options.RunName,
    calls: Annotated[
        int, typer.Option(help="Network calls of the solver, 1 to 64; with --only grid the steps of the grid.")
    ] = 8,
    only: Annotated[
        str | None, typer.Option(help="grid: fit only the times of --start, for sample RUN --grid optimised-8.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", help="Noises: half fitted, a quarter to choose by, a quarter measured. Default: 512; of a grid 96."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noises.")] = 0,
    label: Annotated[
        int | None, typer.Option(help="Class of all trajectories, -1 for none. Default: all classes in turn.")
    ] = None,
    start: Annotated[str, typer.Option(help="The solver whose numbers are changed, or only its times.")] = "abm-4",
    grids: Annotated[
        str | None,
        typer.Option(help="Its times to begin with, one fit from each, the best is kept. Default: own,angle."),
    ] = None,
    reference: Annotated[int, typer.Option(help="Steps of abm-4 that make the true ends.")] = 100,
    most_steps: Annotated[
        int | None, typer.Option(help="Grids tried of each fit at most. Default: 126; rounds with --only grid: 30.")
    ] = None,
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
    stops falling, a third of the noises it is taken of not fitted, and prints it before and after on noise that was
    never seen. With --only grid the
    solver stays as it is and solvers/optimised-STEPS.safetensors is written, used as: sample RUN --grid optimised-8.

    \b
    Examples:
      undiffuse tune digits
      undiffuse tune digits --only grid --start dpmpp-2m --calls 8
      undiffuse sample digits --solver dpmpp-2m --grid optimised-8
      undiffuse tune digits --calls 5 --n 1024
      undiffuse sample digits --solver tuned-5
    """
    from undiffuse.cli.drawing import How, Model
    from undiffuse.cli.guiding import guide_of, say_guide
    from undiffuse.recipes import load_run
    from undiffuse.recipes.tuned import file_of, grid_file_of
    from undiffuse.training.files import disk_errors

    screen, began = Console(json, quiet), time.monotonic()
    if only not in (None, GRID):
        raise ArgumentError(f"--only {only}: expected grid, or leave it out to fit times and coefficients")
    if only is not None and grids is not None:
        raise ArgumentError(f"--grids {grids}: with --only grid the fit begins on the best named grid; leave it out")
    n = n if n is not None else 512 if only is None else 96
    most_steps = most_steps if most_steps is not None else 126 if only is None else 30
    options.check_seed(seed, n)
    guide = guide_of(classifier, classifier_scale)
    found = load_run(run)
    found.expect("denoiser")
    model = Model.load(found, How(None, None, None, batch_size, label, ema, step, device, guide=guide))
    say_guide(model.guide, model.note, screen)
    fit, file = (
        (_tuned, file_of(found.folder, calls)) if only is None else (_optimised, grid_file_of(found.folder, calls))
    )
    how: dict[str, Any] = {"n": n, "seed": seed, "start": start, "reference": reference, "most_steps": most_steps}
    if grids is not None:
        how["grids"] = [name.strip() for name in grids.split(",")]
    made = fit(model, screen, calls, **how)
    about = {"weights": model.seal, "ema": model.ema, "step": model.step, "label": label, "classifier": model.guide}
    made = made.with_about(**about, threshold=getattr(model.sampler, "threshold", None))
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
            note = f"error {now.error:.3g} of the start's" if now.stage == "fit" else ""
            bar.now(*WORDS[now.stage]).to(now.done, now.total, note=note)

        return fit(
            sampler.bounded,
            tuple(sampler.facts.shape),
            calls,
            cond=cond,
            batch=sampler.batch,
            callback=show,
            **how,
        )


def _optimised(
    model: Model, screen: Console, steps: int, *, n: int, seed: int, start: str, reference: int, most_steps: int
) -> OptimisedGrid:
    """The fit of times alone, with a bar."""
    from undiffuse.recipes import build
    from undiffuse.solvers import fit_grid

    sampler: Any = model.sampler
    solver: Any = options.parse_solver(start, model.run.recipe.settings, model.run.folder)
    with screen.progress("fitting a grid", "rounds") as bar:
        found = fit_grid(
            sampler.bounded,
            tuple(sampler.facts.shape),
            steps,
            solver=build.solver(solver),
            n=n,
            seed=seed,
            cond=sampler.cond(range(seed, seed + n)),
            reference=reference,
            batch=sampler.batch,
            most_rounds=most_steps,
            callback=lambda done, total, error: bar.to(
                done, total, note=f"held-out error {error:.3g} of the best named grid's"
            ),
        )
    return found.with_about(solver=start)


def _report(made: Tuned | OptimisedGrid, model: Model, file: str, screen: Console, seconds: float) -> None:
    from undiffuse.solvers import Tuned

    about, folder = made.about, model.run.folder
    if isinstance(made, Tuned):
        what, count = f"{made.calls} calls", {"calls": made.calls}
        heads, use = [f"{about['start']}", "tuned"], f"--solver tuned-{made.calls}"
    else:
        what, count = f"{made.steps} steps of {about['solver']}", {"steps": made.steps}
        heads = [f"grid {about['start']}, the best named", "optimised"]
        use = f"--solver {about['solver']} --grid optimised-{made.steps}"
    rows = [
        [name, f"{before:.3g}", f"{after:.3g}", f"{after / before:.2f}"]
        for name, before, after in (
            (name, about["before"][key], about["after"][key]) for name, key in (("RMS", "rms"), ("median", "median"))
        )
    ]
    measured = about["n"] - 3 * about["n"] // 4
    title = f"error of x_0 at {what}, {measured} noises never seen, relative to the RMS length of x_0"
    screen.table(title, ["", *heads, "ratio"], rows)
    screen.say(f"wrote {file}; use it: undiffuse sample {folder} {use}")
    screen.result({"run": str(folder), "file": file} | count | {"seconds": seconds} | dict(about))
