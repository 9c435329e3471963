"""What `load` was asked for, checked once, and handed to the source that answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from undiffuse.core.errors import ArgumentError, DataError, nearest

SPLITS = ("train", "held-out")
# Names under which published data sets keep the rows not trained on, the preferred one first.
HELD_OUT_NAMES = ("held-out", "test", "validation", "valid", "val")
ON_ERROR = ("stop", "skip")
CHANNELS = (1, 3, 4)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """The arguments of `load`; see there."""

    source: str
    split: str = "train"
    path: str | None = None
    data_files: Mapping[str, str | Sequence[str]] | None = None
    config: str | None = None
    revision: str | None = None
    size: int | Sequence[int] | None = None
    channels: int | None = None
    label: str | None = "label"
    image_column: str = "image"
    num_classes: int | None = None
    on_error: str = "stop"
    streaming: bool = False
    buffer: int = 2048
    limit: int | None = None
    held_out: float = 0.1
    n: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self):
        if self.on_error not in ON_ERROR:
            raise ArgumentError(
                f"data.on_error is '{self.on_error}': expected 'stop' or 'skip'.{nearest(self.on_error, ON_ERROR)}"
            )
        if self.channels is not None and self.channels not in CHANNELS:
            raise ArgumentError(f"data.channels is {self.channels}: expected 1 (grey), 3 (RGB) or 4 (RGBA)")
        if not 0.0 <= self.held_out < 1.0:
            raise ArgumentError(f"data.held_out is {self.held_out}: expected a share in [0, 1)")
        for name in ("limit", "n", "buffer", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"data.{name} is {value}: expected at least 1")
        _ = self.height_width  # raises where the size is none

    @property
    def height_width(self) -> tuple[int, int] | None:
        """`size` as (height, width); None where images keep the size they have."""
        if self.size is None:
            return None
        pair = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(pair) != 2 or not all(isinstance(one, int) and one >= 1 for one in pair):
            raise ArgumentError(f"data.size is {self.size}: expected pixels, one number or [height, width]")
        return pair[0], pair[1]

    @property
    def name(self) -> str:
        """What the data set is called in print-outs: the last part of where it is."""
        return Path(self.path).name or self.source if self.path else self.source

    def given(self) -> set[str]:
        """The options that differ from their defaults."""
        plain = [f for f in fields(self) if f.name not in ("source", "split", "progress")]
        return {f.name for f in plain if getattr(self, f.name) != f.default}

    def place(self) -> Path:
        """`path` as an existing file or folder.

        Raises:
            ArgumentError: no path was given.
            DataError: nothing is there.
        """
        if not self.path:
            raise ArgumentError(f"the source '{self.source}' needs data.path, a file or a folder")
        place = Path(self.path).expanduser()
        if not place.exists():
            beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            raise DataError(f"no file or folder '{place}'.{nearest(place.name, beside)}")
        return place


def check_split(split: str, known: Sequence[str] = SPLITS) -> str:
    """`split` itself.

    Raises:
        ArgumentError: it is none of `known`; offers the nearest, or "held-out" for its usual names.
    """
    if split in known:
        return split
    usual = split in HELD_OUT_NAMES and "held-out" in known
    hint = " Did you mean 'held-out'?" if usual else nearest(split, known)
    raise ArgumentError(f"unknown split '{split}'.{hint} Known: {', '.join(known)}.")


def find_split(split: str, present: Sequence[str]) -> str:
    """The name in `present` that serves `split`: itself, or for "held-out" its first usual name.

    Raises:
        ArgumentError: none does.
    """
    wanted = HELD_OUT_NAMES if split == "held-out" else (split,)
    for name in wanted:
        if name in present:
            return name
    return check_split(split, list(present))
