"""`undiffuse report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console, is_lead

if TYPE_CHECKING:
    from undiffuse.cli.drawing import How
    from undiffuse.recipes import Run


def report(
    run: options.RunName,
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values of data and sampling: data.path=...")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page. Default: report.html in the run folder.", metavar="FILE")
    ] = None,
    ema: options.Ema = None,
    step: options.Step = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one HTML page about a run: samples, film strip, curves, figures, recipe, commands.

    The page is one file that loads nothing. Evaluate first, and its figures are on it.

    \b
    Examples:
      undiffuse report digits
      undiffuse report runs/mnist-20260101-120000 data.path=mnist/ --out mnist.html
    """
    from undiffuse.cli.drawing import How
    from undiffuse.cli.measuring import load_changed

    screen = Console(json, quiet)
    loaded = load_changed(run, changes or [], ("data.", "sampling."))
    if is_lead():
        file = report_run(loaded, How(ema=ema, step=step, device=device), screen, out)
        screen.result({"run": str(loaded.folder), "file": str(file)})


def report_run(loaded: Run, how: How, screen: Console, out: Path | None = None) -> Path:
    """Write the page of a run; where it is."""
    from undiffuse.cli.page import make_page
    from undiffuse.report import write_report
    from undiffuse.training.files import disk_errors

    file = out or loaded.folder / "report.html"
    page = make_page(loaded, how, screen)
    with disk_errors(str(file), "An older page is intact"):
        write_report(page, file)
    screen.say(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return file
