"""Times of a solver that were fitted to a model, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.paths import Path
from undiffuse.solvers.grids import Grid
from undiffuse.solvers.table_file import Kind, unpacked, usable, written
from undiffuse.solvers.tuned import same_path

_KIND = Kind("undiffuse-grid-1", "fitted grid", "make one with: undiffuse tune RUN --only grid")


@dataclass(frozen=True)
class OptimisedGrid:
    """Times that were fitted, what they are for, and how they were made.

    Args:
        times: strictly decreasing, from the path's t_max to its t_min.
        profile, path: of the path, see `Tuned`.
        about: `solver`, `start` (the named grid that was changed), `n`, `seed`, `reference`, `rounds`; `before` (of
            that grid) and `after`, each `rms` and `median` error relative to the RMS of the true ends, on noises that
            neither fitted nor chose.
    """

    times: tuple[float, ...]
    profile: tuple[tuple[float, float], ...]
    path: str
    about: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps(self) -> int:
        """One less than there are times."""
        return len(self.times) - 1

    def grid(self, path: Path) -> Grid:
        """The times, for `ud.sample(..., grid=...)`.

        Raises:
            ArgumentError: another path than they were fitted on.
        """
        if not same_path(self.profile, path):
            raise ArgumentError(f"this grid was fitted on the path {self.path}, not on {path}: fit another")
        return torch.tensor(self.times, dtype=torch.float64)

    def save(self, file: str | File) -> File:
        """Write it as safetensors, whole or not at all."""
        words = {"path": self.path, "about": dict(self.about)}
        return written(file, {"times": self.times, "profile": self.profile}, words, _KIND)

    @classmethod
    def load(cls, file: str | File) -> OptimisedGrid:
        """What `save` wrote.

        Raises:
            CheckpointError: it is not there, or not whole, or no such file.
        """
        tensors, words = unpacked(File(file), _KIND)
        with usable(file, "grid", "Fit it again"):
            times, profile = tensors["times"].tolist(), tensors["profile"].tolist()
            return cls(tuple(times), tuple((a, b) for a, b in profile), str(words["path"]), words["about"])

    def with_about(self, **more: Any) -> OptimisedGrid:
        """With more said of how it was made."""
        return replace(self, about={**self.about, **more})
