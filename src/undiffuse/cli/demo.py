"""`undiffuse demo`: the main job, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console, exit_code_of, is_lead, signals
from undiffuse.core.errors import ArgumentError


def demo(
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's.")
    ] = None,
    run: Annotated[
        Path, typer.Option("--run", "--run-dir", metavar="DIR", help="Run folder; resumed if it exists.")
    ] = Path("runs/demo"),
    recipe: Annotated[str, typer.Option(help="Which recipe.")] = "digits",
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train on the digits, draw samples, measure them, write the page. Minutes on a CPU.

    \b
    Examples:
      undiffuse demo
      undiffuse demo training.steps=100 evaluation.n=1000
    """
    from undiffuse.cli.drawing import How, read_samples
    from undiffuse.cli.evaluate import evaluate_run
    from undiffuse.cli.measuring import Measuring
    from undiffuse.cli.report import report_run
    from undiffuse.cli.sample import draw_picture
    from undiffuse.cli.train import train_run
    from undiffuse.recipes import load_recipe

    if load_recipe(recipe, changes or []).kind == "classifier":
        raise ArgumentError(
            f"--recipe {recipe}: a classifier draws no samples to be shown; train and evaluate do for it"
        )
    screen = Console(json, quiet)
    part = Console(False, quiet or json)
    with signals() as last_signal:
        done = train_run(recipe, changes or [], run, device, part)
        arrived = last_signal()
    if done.result is not None and done.result.stopped:
        part.say(f"stopped at step {done.result.step:,}; the same command goes on")
        raise typer.Exit(exit_code_of(arrived))
    how = How(device=device)
    figures = evaluate_run(Measuring(done, how), part)
    if not is_lead():
        return
    settings = done.recipe.settings
    x, _, labels = read_samples(done.folder / figures[0].samples)
    shown = slice(None if x.ndim == 2 else settings.sampling.n)
    classes = settings.facts.num_classes if settings.facts else None
    files = []
    if settings.facts and (settings.facts.image or settings.facts.shape == [2]):
        files.append(draw_picture(x[shown], None if labels is None else labels[shown], done.folder, classes))
    files.append(report_run(done, how, part))
    screen.say("look at:\n" + "\n".join(f"  {file.resolve()}" for file in files))
    screen.result(
        {"run": str(done.folder), "files": [str(file) for file in files]}
        | {"step": done.result.step if done.result else None, "results": [figure.to_dict() for figure in figures]}
    )
