"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.core.errors import ArgumentError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from undiffuse.recipes.schema import Settings

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, or a recipe's name for its newest run under runs/.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.", metavar="DEVICE")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no text.")]
Ema = Annotated[
    str | None,
    typer.Option(help="Average of the weights: half-life-50 or 50, power-0.05, or none. Default: the recipe's."),
]
Step = Annotated[int | None, typer.Option(help="Checkpoint of that training step. Default: the newest.")]
SolverName = Annotated[
    str | None,
    typer.Option(
        help="Solver, for example heun or edm:S_churn=40, or one made for the run: tuned-8 of `undiffuse tune`, dpm-v3 "
        "of `undiffuse statistics`; of an energy, a kernel. "
        "Default: the recipe's. Another than that comes without the recipe's corrector, on its own grid."
    ),
]
CorrectorName = Annotated[
    str | None,
    typer.Option(
        help="Corrector, for example langevin:snr=0.16,steps=2, or none. Default: the recipe's, with its solver only."
    ),
]
ThresholdName = Annotated[
    str | None,
    typer.Option(help="Keep x_0 in its range: dynamic:quantile=0.995, clip, or none. Default: the recipe's."),
]
Steps = Annotated[int | None, typer.Option(help="Solver steps. Default: the recipe's.")]
GridName = Annotated[
    str | None,
    typer.Option(
        help="Grid of times; own, the solver's; or optimised-8 of `undiffuse tune --only grid`. Default: the recipe's "
        "with its solver, else the solver's."
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Samples at a time; changes a sample by rounding only.")]
Classifier = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Run of a classifier of noisy data: guides an unconditional model to --label."),
]
ClassifierScale = Annotated[float | None, typer.Option(help="Of the classifier's gradient. Default: 1, Bayes' rule.")]

MOST_SEEDS = 100_000_000
_PART = re.compile(r"(\d+)(?:-(\d+))?")


def parse_seeds(text: str) -> np.ndarray:
    """`"0-49999"`, `"17"`, `"3,8-10"` as int64, in the order written.

    Raises:
        ArgumentError: not of that form, a range that falls, a seed given twice, or too many.
    """
    import numpy as np

    parts = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ArgumentError(f"--seeds {text}: '{part}' is neither a number nor a range such as 0-63")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low or high >= 2**63:
            raise ArgumentError(f"--seeds {text}: the range {part} must rise and stay below 2^63")
        if high - low >= MOST_SEEDS:
            raise ArgumentError(f"--seeds {text}: {high - low + 1:,} seeds, at most {MOST_SEEDS:,} at once")
        parts.append(np.arange(low, high + 1, dtype=np.int64))
    seeds = np.concatenate(parts)
    if len(np.unique(seeds)) < len(seeds):
        raise ArgumentError(f"--seeds {text}: a seed is given twice")
    return seeds


def check_seed(seed: int, n: int) -> None:
    """Refuse the first of n seeds where one of them is none.

    Raises:
        ArgumentError: below 0, or beyond 63 bits.
    """
    if not 0 <= seed < 2**63 - max(n, 0):
        raise ArgumentError(f"--seed {seed}: expected at least 0, and {n} seeds below 2^63")


def write_seeds(seeds: np.ndarray) -> str:
    """The inverse of `parse_seeds`."""
    import numpy as np

    breaks = np.flatnonzero(np.diff(seeds) != 1) + 1
    parts = [(int(part[0]), int(part[-1])) for part in np.split(seeds, breaks)]
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def parse_solver(text: str | None, settings: Settings, folder: Path | None = None) -> dict | None:
    """`"edm:S_churn=40,S_noise=1.003"` as a choice of solver for a run of that recipe (of an energy: of kernel).

    `folder` is the run's, where "tuned-8" and "dpm-v3" are looked for.

    Raises:
        RecipeError: unknown solver or argument. ArgumentError: a solver of its own that the run does not have.
    """
    if text is None:
        return None
    from undiffuse.recipes.build import resolve_solver

    choice = _choice(text, "--solver", "edm:S_churn=40,S_noise=1.003")
    if folder is not None and settings.kind == "denoiser":
        from undiffuse.recipes.tuned import in_folder

        choice = in_folder(choice, folder)
    return resolve_solver(settings, choice, "--solver")


def parse_corrector(text: str | None) -> dict | None:
    """`"langevin:snr=0.16,steps=2"` as a choice of corrector; "none" takes the recipe's away.

    Raises:
        RecipeError: unknown corrector or argument, or a value out of range.
    """
    if text is None:
        return None
    from undiffuse.recipes.correctors import resolve_corrector

    return resolve_corrector(_choice(text, "--corrector", "langevin:snr=0.16,steps=2"), "--corrector")


def parse_threshold(text: str | None) -> dict | None:
    """`"dynamic:quantile=0.995,limit=1"` or `"clip:low=-1,high=1"`; "none" takes the recipe's away.

    Raises:
        ArgumentError: a setting without its value. RecipeError: unknown threshold or argument, or a value out of range.
    """
    if text is None:
        return None
    from undiffuse.recipes.thresholds import resolve_threshold

    return resolve_threshold(_choice(text, "--threshold", "dynamic:quantile=0.995"), "--threshold")


def _choice(text: str, option: str, example: str) -> dict:
    """`NAME:KEY=VALUE,KEY=VALUE` as a mapping of `name` and the settings.

    Raises:
        ArgumentError: a setting without its value; shows the example.
    """
    from undiffuse.recipes.text import parse_override

    name, _, rest = text.partition(":")
    choice = {"name": name}
    for part in filter(None, rest.split(",")):
        key, equals, _ = part.partition("=")
        if not equals or not key.strip() or "." in key:
            raise ArgumentError(
                f"{option} {text}: '{part}' is no setting. Expected NAME:KEY=VALUE,KEY=VALUE, for example "
                f"{option} {example}"
            )
        (key,), value = parse_override(part)
        choice[key] = value
    return choice
