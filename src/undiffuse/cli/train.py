"""`undiffuse train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console, clock, exit_code_of, is_lead, signals

if TYPE_CHECKING:
    from undiffuse.recipes import Run, Sampler
    from undiffuse.recipes.chains import EnergySampler


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see: undiffuse recipes) or a YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "--run-dir",  # torchrun takes --run for an abbreviation of its own --run-path
            metavar="DIR",
            help="Run folder; one that exists is resumed. Default: runs/NAME-DATE-TIME.",
        ),
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a recipe. Stopped at any moment, the same command with --run goes on bit for bit.

    \b
    Examples:
      undiffuse train digits
      undiffuse train digits training.steps=400 model.net.width=48 --run runs/small
      undiffuse train mnist data.path=mnist/
      undiffuse train folder data.path=photos/ data.size=64 training.precision=bf16 --device cuda
      torchrun --nproc-per-node 2 -m undiffuse.cli train digits --run-dir runs/two

    Exit codes: 0 done, 2 a wrong argument or recipe, 3 the data, 4 the run folder, 5 a loss that is not finite,
    130 stopped by Ctrl-C and 143 by SIGTERM, with a checkpoint.
    """
    screen = Console(json, quiet)
    with signals() as last_signal:
        done = train_run(recipe, changes or [], run, device, screen)
        arrived = last_signal()
    result = done.result
    if result is None:  # `train` always gives one
        return
    if result.stopped:
        screen.say(
            f"stopped at step {result.step:,}, checkpoint written. To go on:\n  {resume_command(done, recipe, changes)}"
        )
    screen.result({"run": str(done.folder), "step": result.step, "seconds": result.seconds, "stopped": result.stopped})
    if result.stopped:
        raise typer.Exit(exit_code_of(arrived))
    draws = f"undiffuse sample {done.folder}", f"undiffuse evaluate {done.folder}", f"undiffuse report {done.folder}"
    reads = f"undiffuse evaluate {done.folder}", f"undiffuse sample RUN --classifier {done.folder} --label 0"
    screen.say("\n  ".join(["next:", *(reads if done.recipe.kind == "classifier" else draws)]))


def resume_command(run: Run, recipe: str, changes: list[str] | None) -> str:
    """The command that takes a run up again."""
    import shlex

    return shlex.join(["undiffuse", "train", recipe, *(changes or []), "--run", str(run.folder)])


def train_run(recipe: str, changes: list[str], run: Path | None, device: str, screen: Console) -> Run:
    """Load the recipe, train it with progress, say what was done."""
    from undiffuse.nets import keep_freed_memory
    from undiffuse.recipes import load_recipe
    from undiffuse.recipes import train as train_recipe

    keep_freed_memory()
    loaded = load_recipe(recipe, changes)
    with screen.progress("reading", "images") as bar:
        done = train_recipe(
            loaded,
            run,
            device=device,
            on_start=lambda started, model: _announce(started, model, screen),
            on_data=lambda read, total: bar.now("reading", "images").to(read, total),
            on_log=lambda record: bar.now("training", "steps").to(record["step"], record["steps"], note=_note(record)),
            on_sample=save_grid,
        )
    result = done.result
    if is_lead() and result is not None and not result.stopped:
        screen.say(f"trained {result.step:,} steps in {clock(result.seconds)}: {done.folder}")
    return done


def _announce(run: Run, model: Any, screen: Console) -> None:
    facts = run.recipe.settings.facts
    parameters = sum(p.numel() for p in model.parameters())
    steps = run.checkpoints()
    if facts is not None:
        rows = f"{facts.n:,} of " if facts.n else ""
        kind = f", {facts.num_classes} classes" if facts.num_classes else ""
        screen.say(f"{run.recipe.name}: {rows}{facts.data} {facts.shape}{kind}; {parameters:,} parameters")
    screen.say(f"run folder {run.folder}{f', resuming from step {steps[-1]:,}' if steps else ''}")


def _note(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.4g}  {record['images_per_second']:,.0f} samples/s"


def save_grid(run: Run, step: int, sampler: Sampler | EnergySampler) -> None:
    """The samples of training's schedule: `samples/step-NNNNNNN.png`; figures where they are no pictures."""
    from undiffuse.cli.sample import draw_picture
    from undiffuse.recipes.launch import save_samples

    facts = sampler.facts
    if not facts.image and facts.shape != [2]:
        save_samples(run, step, sampler)
        return
    seeds = range(run.recipe.settings.sampling.n)
    draw_picture(
        sampler(seeds), sampler.labels(seeds), run.folder / "samples", facts.num_classes, stem=f"step-{step:07d}"
    )
