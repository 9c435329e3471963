"""Solvers that were made for a run, `solvers/tuned-8.safetensors` and `solvers/dpm-v3.safetensors` in its folder, and
the names they go by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.solvers import DPM_V3, SOLVERS, DPMv3, ModelStatistics, Solver, Tuned
from undiffuse.training.files import digest

FOLDER = "solvers"
STATISTICS = DPM_V3
_NAME = re.compile(r"tuned-(\d+)")


def file_of(folder: Path, calls: int) -> Path:
    """Where the solver of that many calls is kept in a run folder."""
    return folder / FOLDER / f"tuned-{calls}.safetensors"


def statistics_file(folder: Path) -> Path:
    """Where the statistics of a run's model are kept."""
    return folder / FOLDER / f"{STATISTICS}.safetensors"


def tuned(file: str, sha256: str | None = None) -> Tuned:
    """The solver in a file.

    Args:
        file: of `Tuned.save`.
        sha256: the beginning of the file's checksum; what tells its samples from those of another file of that name.

    Raises:
        CheckpointError: no such file, one that is damaged, or another than that of the checksum.
    """
    _expect(file, sha256)
    return Tuned.load(file)


def dpm_v3(
    file: str,
    sha256: str | None = None,
    points: int = DPMv3.points,
    corrector: bool | Literal["half"] = DPMv3.corrector,
    variable: str = DPMv3.variable,
    pseudo: bool = DPMv3.pseudo,
) -> DPMv3:
    """DPM-Solver-v3 by the statistics in a file.

    Args:
        file: of `ModelStatistics.save`.
        sha256: as of `tuned`.
        points, corrector, variable, pseudo: of `DPMv3`.

    Raises:
        CheckpointError: as of `tuned`.
    """
    _expect(file, sha256)
    return DPMv3(ModelStatistics.load(file), points, corrector, variable, pseudo)


def _expect(file: str, sha256: str | None) -> None:
    if sha256 is not None and Path(file).is_file() and not digest(Path(file)).startswith(str(sha256)):
        raise CheckpointError(f"{file} was made anew: its sha256 does not begin with {sha256}")


# Solvers that are files in a run's folder, and all that a choice of a solver may name on the command line.
IN_FOLDER: dict[str, Callable[..., Tuned | DPMv3]] = {"tuned": tuned, STATISTICS: dpm_v3}
TABLE: dict[str, Callable[..., Solver]] = {**SOLVERS, **IN_FOLDER}


def in_folder(choice: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A choice in which "tuned-8" and "dpm-v3" are the files in a run folder; any other as it is.

    Raises:
        ArgumentError: the folder has no such file; says which it has, and how one is made.
    """
    if choice["name"] == STATISTICS and "file" not in choice:
        return {**choice, **_statistics(folder)}
    wanted = _NAME.fullmatch(choice["name"])
    if wanted is None:
        return dict(choice)
    if len(choice) > 1:
        raise ArgumentError(f"{choice['name']} has no settings: its numbers are all in its file")
    file = file_of(folder, int(wanted[1]))
    if not file.is_file():
        names = sorted((f.stem for f in (folder / FOLDER).glob("tuned-*.safetensors")), key=lambda n: (len(n), n))
        there = f"It has {', '.join(names)}." if names else "It has none."
        how = f"Make it with: undiffuse tune {folder} --calls {wanted[1]}"
        raise ArgumentError(f"{folder} has no solver {choice['name']}. {there} {how}")
    if Tuned.load(file).calls != int(wanted[1]):
        raise ArgumentError(f"{file} is of {Tuned.load(file).calls} calls, its name says {wanted[1]}: tune it again")
    return {"name": "tuned", "file": str(file), "sha256": digest(file)[:16]}


def _statistics(folder: Path) -> dict[str, str]:
    file = statistics_file(folder)
    if not file.is_file():
        raise ArgumentError(
            f"{folder} has no statistics of its model, by which {STATISTICS} goes. Make them with: "
            f"undiffuse statistics {folder}"
        )
    return {"file": str(file), "sha256": digest(file)[:16]}
