"""Samples on disk, a shard at a time, so that an interrupted job goes on where it stopped.

A folder of samples says in `sampling.json` how they were made; samples made otherwise are never mixed with them.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from undiffuse.core.errors import RunError
from undiffuse.recipes.generate import write_arrays
from undiffuse.report.pictures import image_grid, png_bytes
from undiffuse.training.files import disk_errors, replace_file, sync

SETTINGS = "sampling.json"
SHARD_BYTES = 1 << 26  # the most samples held in memory at once, as float32
ALIVE = "What was there before is intact: free some space, then run the same command again"


class Store(Protocol):
    """A folder that takes samples by shard, of at least `rows` samples where there are so many."""

    rows: int

    def missing(self, index: int, seeds: np.ndarray) -> np.ndarray:
        """The seeds of shard `index` that are not there yet, whole."""
        ...

    def write(self, index: int, seeds: np.ndarray, x: Tensor, labels: Tensor | None) -> None:
        """Put samples there."""
        ...


def shards(seeds: np.ndarray, event_size: int, batch: int, processes: int, at_least: int = 1) -> list[np.ndarray]:
    """The seeds cut into shards: whole batches, bounded in bytes, at least one for each process."""
    rows = batch * -(-at_least // batch)
    rows = min(rows, max(1, SHARD_BYTES // (4 * event_size)), -(-len(seeds) // processes))
    return [seeds[start : start + rows] for start in range(0, len(seeds), rows)]


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create the folder, or make sure that what it holds was made in the same way.

    Raises:
        RunError: it holds samples made otherwise (says what differs), or files that are not samples.
    """
    file = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise RunError(f"'{folder}' is a file: give another folder with --out")
    if file.is_file():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            before = {}
        changed = [
            f"{key} was {before.get(key)!r}, is {settings.get(key)!r}"
            for key in sorted(before.keys() | settings.keys())
            if before.get(key) != settings.get(key)
        ]
        if changed:
            raise RunError(
                f"{folder} holds samples made otherwise: {'; '.join(changed)}. Give another folder with --out"
            )
        return
    if folder.is_dir() and any(not one.name.startswith(".") for one in folder.iterdir()):
        raise RunError(f"{folder} holds other files and no {SETTINGS}: give another folder with --out")
    with disk_errors(str(folder), "Nothing was changed"):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(settings, indent=1).encode())


class PngFolder:
    """One PNG per seed, `000017.png`; what is drawn is written with its batch."""

    rows = 1

    def __init__(self, folder: Path, shape: Sequence[int]):
        self.folder, self.shape = folder, tuple(shape)

    def file(self, seed: int) -> Path:
        """Where a seed's picture lies."""
        return self.folder / f"{seed:06d}.png"

    def missing(self, index: int, seeds: np.ndarray) -> np.ndarray:
        return np.asarray([seed for seed in seeds if not self._whole(self.file(int(seed)))], dtype=np.int64)

    def _whole(self, file: Path) -> bool:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as picture:
                picture.load()
                return picture.size == (self.shape[2], self.shape[1])
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
            return False

    def write(self, index: int, seeds: np.ndarray, x: Tensor, labels: Tensor | None) -> None:
        with disk_errors(str(self.folder), ALIVE):
            for seed, one in zip(seeds, x):
                file = self.file(int(seed))
                # Renamed but not synced: a picture that a power cut spoils is found by `missing` and made again.
                temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                temporary.write_bytes(png_bytes(image_grid(one[None])))
                os.replace(temporary, file)


class NpzShards:
    """`shard-0000.npz`, ..., merged into `samples.npz` at the end: samples, seeds, and labels where there are some."""

    rows = 256  # enough that a shard's file costs little beside its samples

    def __init__(self, folder: Path, shape: Sequence[int], labelled: bool):
        self.folder, self.shape, self.labelled = folder, tuple(shape), labelled

    @property
    def merged(self) -> Path:
        """The file of all samples."""
        return self.folder / "samples.npz"

    def file(self, index: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"shard-{index:04d}.npz"

    def missing(self, index: int, seeds: np.ndarray) -> np.ndarray:
        return seeds[:0] if self._holds(self.file(index), seeds) else seeds

    def complete(self, seeds: np.ndarray) -> bool:
        """Whether `samples.npz` holds exactly these seeds."""
        return self._holds(self.merged, seeds, deep=False)

    def _holds(self, file: Path, seeds: np.ndarray, deep: bool = True) -> bool:
        if not file.is_file():
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                if deep and archive.testzip() is not None:
                    return False
            with np.load(file, allow_pickle=False) as arrays:
                same = np.array_equal(arrays["seeds"], seeds)
                return same and (not deep or arrays["samples"].shape == (len(seeds), *self.shape))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return False

    def write(self, index: int, seeds: np.ndarray, x: Tensor, labels: Tensor | None) -> None:
        buffer = io.BytesIO()
        write_arrays(buffer, x, seeds, labels)
        with disk_errors(str(self.file(index)), ALIVE):
            replace_file(self.file(index), buffer.getvalue())

    def merge(self, parts: Sequence[np.ndarray]) -> Path:
        """Write `samples.npz` from the shards, one in memory at a time, then delete them."""
        n = sum(len(part) for part in parts)
        heads = {"samples": ("<f4", (n, *self.shape)), "seeds": ("<i8", (n,))}
        heads |= {"labels": ("<i8", (n,))} if self.labelled else {}
        temporary = self.folder / ".tmp-samples.npz"
        with disk_errors(str(self.merged), ALIVE):
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name, (kind, shape) in heads.items():
                    self._copy(archive, name, kind, shape, len(parts))
            sync(temporary)
            os.replace(temporary, self.merged)
            for file in self.folder.glob("shard-*.npz"):
                file.unlink()
        return self.merged

    def _copy(self, archive: zipfile.ZipFile, name: str, kind: str, shape: tuple[int, ...], parts: int) -> None:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
            head = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(out, head)  # pyright: ignore[reportArgumentType]
            for index in range(parts):
                with np.load(self.file(index), allow_pickle=False) as arrays:
                    out.write(np.ascontiguousarray(arrays[name], dtype=kind).tobytes())


def mine(parts: Sequence[np.ndarray], rank: int, processes: int) -> Iterator[tuple[int, np.ndarray]]:
    """The shards of one process: every `processes`-th."""
    for index in range(rank, len(parts), processes):
        yield index, parts[index]
