"""Plain arrays: `.npy`, or `.npz` with x and perhaps y. Nothing pickled is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from undiffuse.core.errors import ArgumentError, DataError, nearest
from undiffuse.data.dataset import ArrayDataset, Skipped
from undiffuse.data.labels import make_labels
from undiffuse.data.records import announce
from undiffuse.data.request import CHANNELS, Request, check_split
from undiffuse.data.splits import row_positions, split_rows, subset

ARRAY_SUFFIXES = frozenset({".npz", ".npy"})
# Names looked for when none is given, the first that is there.
X_NAMES = ("image", "x", "images", "data", "arr_0")
Y_NAMES = ("label", "y", "labels", "arr_1")


def _load(place: Path) -> dict[str, np.ndarray]:
    """Arrays by name; an .npy is called "x"."""
    try:
        loaded = np.load(place, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        if "pickle" in reason.lower():
            reason = "it holds Python objects (a pickle), which could run code; save plain arrays"
        raise DataError(f"'{place}' cannot be read: {reason}") from error


def _pick(arrays: dict[str, np.ndarray], wanted: str | None, usual: tuple[str, ...], place: Path) -> str | None:
    """The name of an array: the one asked for, or the first usual one there is."""
    if wanted is None:
        return None
    if wanted == usual[0]:
        return next((name for name in usual if name in arrays), None)
    if wanted not in arrays:
        raise DataError(f"'{place}' has no array '{wanted}'.{nearest(wanted, arrays)} It has: {', '.join(arrays)}.")
    return wanted


def channels_first(x: np.ndarray) -> np.ndarray:
    """(N, H, W) and (N, H, W, C) as (N, C, H, W); other shapes as they are.

    Four sizes are channels last only where the last is 1, 3 or 4 and the second is not.
    """
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] not in CHANNELS and x.shape[3] in CHANNELS:
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def _checked(x: np.ndarray, name: str, place: Path) -> np.ndarray:
    """uint8 as it is, floats as float32, channels first."""
    if x.ndim < 2:
        raise DataError(f"'{name}' of '{place}' has shape {x.shape}: expected (N, d), (N, H, W[, C]) or (N, C, H, W)")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(
            f"'{name}' of '{place}' has type {x.dtype}: expected uint8 (images, 0 to 255 read as -1 to 1) or floats"
        )
    return channels_first(x if x.dtype == np.uint8 else x.astype(np.float32))


def load_arrays(request: Request) -> ArrayDataset:
    """Arrays of a file; bytes are scaled to [-1, 1] as they leave, floats are kept. See `load`."""
    place, split = request.place(), check_split(request.split)
    if place.suffix.lower() not in ARRAY_SUFFIXES:
        raise ArgumentError(f"'{place}': the source 'array' reads {' and '.join(sorted(ARRAY_SUFFIXES))}")
    arrays = _load(place)
    x_name = _pick(arrays, request.image_column, X_NAMES, place)
    if x_name is None:
        raise DataError(
            f"'{place}' has no array '{' or '.join(X_NAMES)}'; it has: {', '.join(arrays) or 'nothing'}. "
            "Give data.image_column=NAME."
        )
    x = _checked(arrays[x_name], x_name, place)
    y_name = _pick(arrays, request.label, Y_NAMES, place)
    y = None if y_name is None else arrays[y_name]
    if y is not None and len(y) != len(x):
        raise DataError(f"'{place}': '{x_name}' has {len(x)} rows and '{y_name}' {len(y)}")
    labels = make_labels(y, source=request.name, num_classes=request.num_classes)
    rows = split_rows(row_positions(len(x)), split, request.held_out)
    rows = rows[subset(len(rows), request.limit)]
    rows, skipped = _finite_rows(x, rows, request)
    return ArrayDataset(torch.from_numpy(x)[rows], labels.select(rows), request.name, split, skipped)


def _finite_rows(x: np.ndarray, rows: torch.Tensor, request: Request) -> tuple[torch.Tensor, list[Skipped]]:
    """The rows all of whose numbers are finite; the others are booked like unreadable images."""
    if x.dtype == np.uint8:
        return rows, []
    finite = torch.from_numpy(np.isfinite(x.reshape(len(x), -1)).all(axis=1))[rows]
    skipped = [Skipped(row, f"row {row}", "holds NaN or infinity") for row in rows[~finite].tolist()]
    announce(skipped, len(rows), request)
    return rows[finite], skipped
