"""The command `undiffuse`. Heavy rooms are imported when a command that needs them runs, so that help is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from undiffuse.cli import console
from undiffuse.cli.compare import compare
from undiffuse.cli.demo import demo
from undiffuse.cli.edit import edit
from undiffuse.cli.evaluate import evaluate
from undiffuse.cli.importing import import_
from undiffuse.cli.likelihood import likelihood
from undiffuse.cli.recipes import recipes
from undiffuse.cli.report import report
from undiffuse.cli.sample import sample
from undiffuse.cli.statistics import statistics
from undiffuse.cli.train import train
from undiffuse.cli.tune import tune

HELP = """Diffusion models: train, sample, evaluate, report.

\b
Examples:
  undiffuse demo                              train, measure and report on digits
  undiffuse train digits training.steps=400   train a recipe, with a change
  undiffuse sample digits --seeds 0-63        from the newest run of that recipe
  undiffuse edit digits inpaint 7.png --box 2,2,6,6 --label 7
  undiffuse evaluate digits                   figures with their protocol
  undiffuse likelihood digits                 bits per dimension of held-out data
  undiffuse compare digits                    which solver, in how many calls
  undiffuse tune digits --calls 8             a solver of 8 calls, fitted to the run
  undiffuse statistics digits                 of the model, for the solver dpm-v3
  undiffuse report digits                     one HTML page
  torchrun --nproc-per-node 2 -m undiffuse.cli train digits
"""

app = typer.Typer(
    name="undiffuse",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import undiffuse

        print(undiffuse.__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""
    console.DEBUG = debug


for command in (train, sample, edit, evaluate, likelihood, compare, tune, statistics, report, recipes, demo):
    app.command()(console.guarded(command))
app.command("import")(console.guarded(import_))


def main() -> None:
    """The entry point. `--debug` is understood anywhere on the line."""
    if "--debug" in sys.argv[2:]:
        sys.argv.remove("--debug")
        sys.argv.insert(1, "--debug")
    app()
