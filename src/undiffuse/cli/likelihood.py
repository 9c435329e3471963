"""`undiffuse likelihood`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console, is_lead
from undiffuse.core.errors import ArgumentError

if TYPE_CHECKING:
    from undiffuse.cli.measuring_likelihood import Job


def likelihood(
    run: options.RunName,
    data: Annotated[
        str,
        typer.Argument(
            metavar="[DATA]", help="A split of the run's data, or a folder or file of that kind (its training split)."
        ),
    ] = "held-out",
    n: Annotated[int | None, typer.Option("--n", "--samples", help="The first so many rows. Default: all.")] = None,
    divergence: Annotated[str, typer.Option(help="exact, hutchinson or hutch++.")] = "hutchinson",
    probes: Annotated[int, typer.Option(help="Random directions per sample, of the last two.")] = 1,
    tolerance: Annotated[float, typer.Option("--tolerance", help="rtol and atol of the flow.")] = 1e-5,
    dequantise: Annotated[str, typer.Option(help="Of images: uniform, variational, or none.")] = "uniform",
    seed: Annotated[int, typer.Option(help="Of the dequantisation and the random directions.")] = 0,
    batch_size: options.BatchSize = None,
    ema: options.Ema = None,
    step: options.Step = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Log-likelihood of data under a run, exactly, along the probability flow: nats, and bits per dimension of images.

    Row by row into the run's folder `likelihood/`; stopped half-way, the same command goes on where it stopped. Under
    torchrun the rows are shared out. Appends the mean and its standard error to likelihood.jsonl.

    \b
    Examples:
      undiffuse likelihood digits
      undiffuse likelihood mnist held-out --samples 1000 --probes 4
      undiffuse likelihood digits train --divergence exact --n 100
      torchrun --nproc-per-node 8 -m undiffuse.cli likelihood cifar10 /data/cifar10
    """
    from undiffuse.cli.measuring_likelihood import NOISES, Job, rule_of

    if dequantise not in NOISES:
        raise ArgumentError(f"--dequantise {dequantise}: expected {', '.join(NOISES)}")
    if n is not None and n < 1:
        raise ArgumentError(f"--n {n}: expected at least one row")
    if batch_size is not None and batch_size < 1:
        raise ArgumentError(f"--batch-size {batch_size}: expected at least one")
    screen = Console(json, quiet)
    job = Job(
        run=Path(run),
        data=data,
        n=n,
        rule=rule_of(divergence, probes),
        tolerance=tolerance,
        noise=dequantise,
        seed=seed,
        batch=64 if batch_size is None else batch_size,
        ema=ema,
        step=step,
        device=device,
    )
    _report(job, screen)


def _report(job: Job, screen: Console) -> None:
    record = job.run_all(screen)
    if not is_lead() or record is None:
        return
    rows = [["log-likelihood, nats", _figure(record, "nats")]]
    if "bits_per_dim" in record:
        rows.append(["bits per dimension", _figure(record, "bits_per_dim")])
    rows.append(["evaluations per sample", f"{record['nfe']:.1f}"])
    screen.table(
        f"{record['n']:,} of {record['data']} ({record['split']}), {record['divergence']}, tolerance "
        f"{record['tolerance']:g}, dequantisation {record['dequantisation']}",
        ["", "mean ± standard error"],
        rows,
    )
    screen.say(f"rows in {record['rows']}")
    screen.result(record)


def _figure(record: dict[str, Any], name: str) -> str:
    error = record[f"{name}_error"]
    return f"{record[name]:.4f}" + ("" if error is None else f" ± {error:.2g}")
