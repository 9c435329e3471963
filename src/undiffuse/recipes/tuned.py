"""Solvers that were tuned to a run, `solvers/tuned-8.safetensors` in its folder, and the names they go by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.solvers import SOLVERS, Solver, Tuned
from undiffuse.training.files import digest

FOLDER = "solvers"
_NAME = re.compile(r"tuned-(\d+)")


def file_of(folder: Path, calls: int) -> Path:
    """Where the solver of that many calls is kept in a run folder."""
    return folder / FOLDER / f"tuned-{calls}.safetensors"


def tuned(file: str, sha256: str | None = None) -> Tuned:
    """The solver in a file.

    Args:
        file: of `Tuned.save`.
        sha256: the beginning of the file's checksum; what tells its samples from those of another file of that name.

    Raises:
        CheckpointError: no such file, one that is damaged, or another than that of the checksum.
    """
    if sha256 is not None and Path(file).is_file() and not digest(Path(file)).startswith(str(sha256)):
        raise CheckpointError(f"{file} was tuned anew: its sha256 does not begin with {sha256}")
    return Tuned.load(file)


# All that a choice of a solver may name on the command line.
TABLE: dict[str, Callable[..., Solver]] = {**SOLVERS, "tuned": tuned}


def is_tuned(name: str) -> bool:
    """Whether it is a name such as "tuned-8"."""
    return _NAME.fullmatch(name) is not None


def in_folder(choice: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A choice in which "tuned-8" is the file in a run folder; any other as it is.

    Raises:
        ArgumentError: the folder has no such file; says which it has, and how one is made.
    """
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
