"""`undiffuse compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console, is_lead
from undiffuse.core.errors import ArgumentError

if TYPE_CHECKING:
    from undiffuse.cli.comparing import Job


def compare(
    run: options.RunName,
    solvers: Annotated[
        str | None, typer.Option(help="Solvers by comma, such as abm-4,heun. Default: nine choices of solver and grid.")
    ] = None,
    grids: Annotated[
        str | None, typer.Option(help="Grids by comma, each with every solver; own is the solver's. Default: own.")
    ] = None,
    calls: Annotated[str, typer.Option(help="Numbers of network calls, by comma.")] = "5,8,10,15,20,30",
    n: Annotated[int, typer.Option("--n", "--samples", help="Noises, each followed to its own exact end.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the first noise; the others' are the next.")] = 0,
    label: Annotated[
        int | None, typer.Option(help="Class of all samples, -1 for none. Default: seed mod number of classes.")
    ] = None,
    error: Annotated[
        float, typer.Option(help="Median error to recommend by, over the RMS of the samples.", metavar="LEVEL")
    ] = 0.01,
    metrics: Annotated[
        str | None,
        typer.Option(help="Measure samples of every cell too: metrics by comma, or recipe for the recipe's own."),
    ] = None,
    metrics_n: Annotated[int | None, typer.Option(help="Samples that are measured. Default: evaluation.n.")] = None,
    ema: options.Ema = None,
    step: options.Step = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for table and plot. Default: compare/ in the run.", metavar="DIR")
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure solvers on a run's own model: error and quality by solver, grid and number of calls; recommends one.

    Of each noise the exact end is computed first, and a solver's error is how far from it its sample is, in fp32.
    Solvers that draw noise have no such error, but --metrics measures them too: the samples of every cell, of the same
    seeds, as `undiffuse evaluate` does. Writes compare.json, compare.md, compare.png, and compare.jsonl (every number
    with its protocol).

    \b
    Examples:
      undiffuse compare digits
      undiffuse compare digits --solvers abm-4,dpmpp-2m,heun --grids own,karras --calls 6,8,12 --n 64
      undiffuse compare digits --metrics recipe --metrics-n 1000 --solvers dpmpp-2m,abm-4,ddpm --calls 10,20
      undiffuse compare runs/mnist-20260101-120000 --error 0.05 --label 3
    """
    screen = Console(json, quiet)
    columns = _numbers(calls)
    if n < 2:
        raise ArgumentError(f"--n {n}: expected at least 2 noises, better 32, for a median to mean something")
    options.check_seed(seed, n)
    if not 0 < error < float("inf"):
        raise ArgumentError(f"--error {error}: expected a number above 0, for example 0.01")
    if metrics is None and metrics_n is not None:
        raise ArgumentError(f"--metrics-n {metrics_n} goes with --metrics: say which, or --metrics recipe")
    from undiffuse.cli.comparing import Job
    from undiffuse.cli.quality import Asked

    asked = None if metrics is None else Asked(metrics, metrics_n)
    if is_lead():
        job = Job(run, _names(solvers), _names(grids), columns, n, seed, label, error, asked, ema, step, device)
        _report(job, out, screen)


def _report(job: Job, out: Path | None, screen: Console) -> None:
    from undiffuse.report.comparison import about, panels, table

    done = job.run_all(out, screen)
    heads = ["solver", "grid", *(str(calls) for calls in done.found.calls)]
    for number in panels(done.found):
        marked = any(done.found.best(calls, number) for calls in done.found.calls)
        words = about(done.found, number) + (" * marks the best." if marked else "")
        screen.table(words, heads, table(done.found, number=number))
    failed = [cell for cell in done.found.cells if cell.failure]
    if failed:
        first = failed[0]
        screen.say(f"{len(failed)} failed; the first, {first.solver} in {first.calls} calls: {first.failure}")
    screen.say(done.said)
    screen.say(f"wrote {', '.join(map(str, done.files))}")
    screen.result(done.record | {"files": [str(file) for file in done.files]})


def _names(text: str | None) -> list[str] | None:
    """Names by comma; a solver's settings (`edm:S_noise=1,S_churn=0`) stay with it."""
    if text is None:
        return None
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if names and "=" in part and ":" not in part:
            names[-1] += f",{part}"
        else:
            names.append(part)
    if not names:
        raise ArgumentError(f"'{text}' names nothing: expected names by comma, for example abm-4,heun")
    return names


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ArgumentError(f"--calls {text}: expected whole numbers of at least 1 by comma, for example 5,10,20")
    return numbers
