"""Solvers and grids that were fitted to a run, in its folder, and the names they go by.

`solvers/tuned-8.safetensors` is a solver of 8 calls, `solvers/optimised-8.safetensors` a grid of 8 steps,
`solvers/dpm-v3.safetensors` the statistics that DPM-Solver-v3 goes by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.solvers import DPM_V3, SOLVERS, DPMv3, ModelStatistics, OptimisedGrid, Solver, Tuned
from undiffuse.training.files import digest

FOLDER = "solvers"
STATISTICS = DPM_V3
_NAME = re.compile(r"tuned-(\d+)")
_GRID = re.compile(r"optimised-(\d+)")


def file_of(folder: Path, calls: int) -> Path:
    """Where the solver of that many calls is kept in a run folder."""
    return folder / FOLDER / f"tuned-{calls}.safetensors"


def statistics_file(folder: Path) -> Path:
    """Where the statistics of a run's model are kept."""
    return folder / FOLDER / f"{STATISTICS}.safetensors"


def grid_file_of(folder: Path, steps: int) -> Path:
    """Where the grid of that many steps is kept in a run folder."""
    return folder / FOLDER / f"optimised-{steps}.safetensors"


def is_optimised(name: str) -> bool:
    """Whether it is a name such as "optimised-8"."""
    return _GRID.fullmatch(name) is not None


def grid_in_folder(name: str, folder: Path) -> tuple[OptimisedGrid, str]:
    """The grid that "optimised-8" names in a run folder, and the beginning of its file's checksum.

    Raises:
        ArgumentError: the folder has no such grid; says which it has, and how one is made. CheckpointError: damaged.
    """
    wanted = _GRID.fullmatch(name)
    if wanted is None:
        raise ArgumentError(f"'{name}' is no grid fitted to this run: those are called optimised-STEPS")
    steps = int(wanted[1])
    file = grid_file_of(folder, steps)
    if not file.is_file():
        raise ArgumentError(
            f"{folder} has no grid {name}. {_there(folder, 'optimised')} Make it with: undiffuse tune {folder} "
            f"--only grid --calls {steps}"
        )
    found = OptimisedGrid.load(file)
    if found.steps != steps:
        raise ArgumentError(f"{file} is of {found.steps} steps, its name says {steps}: fit it again")
    return found, digest(file)[:16]


def _there(folder: Path, kind: str) -> str:
    found = (f.stem for f in (folder / FOLDER).glob(f"{kind}-*.safetensors"))
    names = sorted(found, key=lambda name: (len(name), name))
    return f"It has {', '.join(names)}." if names else "It has none."


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


def is_tuned(name: str) -> bool:
    """Whether it is a name such as "tuned-8"."""
    return _NAME.fullmatch(name) is not None


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
        how = f"Make it with: undiffuse tune {folder} --calls {wanted[1]}"
        raise ArgumentError(f"{folder} has no solver {choice['name']}. {_there(folder, 'tuned')} {how}")
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
