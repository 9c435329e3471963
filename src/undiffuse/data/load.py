"""`load`: a data set by name, by path, or from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from undiffuse.core.errors import ArgumentError, nearest
from undiffuse.data.arrays import ARRAY_SUFFIXES, load_arrays
from undiffuse.data.dataset import ArrayDataset, Dataset
from undiffuse.data.digits import digits_dataset
from undiffuse.data.folder import load_folder
from undiffuse.data.hub import load_hub
from undiffuse.data.parquet import load_parquet
from undiffuse.data.plane import DEFAULT_POINTS, PLANE, plane_dataset
from undiffuse.data.request import Progress, Request, check_split
from undiffuse.data.splits import subset
from undiffuse.data.stream import StreamingDataset

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """How a kind of data is read, and which options of `load` mean something to it."""

    read: Callable[[Request], Dataset | StreamingDataset]
    options: frozenset[str]


def _limited(dataset: ArrayDataset, limit: int | None) -> ArrayDataset:
    return dataset if limit is None else dataset.at(subset(len(dataset), limit))


def _digits(request: Request) -> ArrayDataset:
    return _limited(digits_dataset(check_split(request.split)), request.limit)


def _plane(request: Request) -> ArrayDataset:
    split, n = check_split(request.split), request.n or DEFAULT_POINTS
    return _limited(plane_dataset(request.source, split, n, request.seed), request.limit)


_ANY = frozenset({"limit"})
_FILES = _ANY | {"path", "label", "num_classes", "on_error", "held_out"}
_IMAGES = _FILES | {"size", "channels", "streaming", "buffer"}

SOURCES: dict[str, Source] = {
    "digits": Source(_digits, _ANY),
    **{name: Source(_plane, _ANY | {"n", "seed"}) for name in PLANE},
    "folder": Source(load_folder, _IMAGES),
    "parquet": Source(load_parquet, _IMAGES | {"image_column", "data_files"}),
    "array": Source(load_arrays, _FILES | {"image_column"}),
    "hub": Source(load_hub, _IMAGES | {"image_column", "config", "revision"}),
}


def _kind_of_path(place: Path) -> str:
    """Which source reads what lies at `place`."""
    if place.is_dir():
        return "parquet" if any(place.rglob("*.parquet")) else "folder"
    if place.suffix.lower() in ARRAY_SUFFIXES:
        return "array"
    if place.suffix.lower() == ".parquet":
        return "parquet"
    raise ArgumentError(
        f"'{place}' is no data this can read: expected a folder, .parquet, {' or '.join(sorted(ARRAY_SUFFIXES))}"
    )


def _resolve(request: Request) -> Request:
    """Name the source: a known name stays; a path or a hub name becomes `path` of the source that reads it."""
    if request.source in SOURCES:
        return request
    if request.path is not None:
        raise ArgumentError(
            f"unknown data source '{request.source}'.{nearest(request.source, SOURCES)} Known: {', '.join(SOURCES)}."
        )
    place = Path(request.source).expanduser()
    if place.exists():
        return replace(request, source=_kind_of_path(place), path=request.source)
    if HUB_NAME.fullmatch(request.source) and not place.suffix:
        return replace(request, source="hub", path=request.source)
    if place.suffix or len(place.parts) > 1:
        replace(request, source="path", path=request.source).place()  # raises: nothing is there
    raise ArgumentError(
        f"unknown data source '{request.source}'.{nearest(request.source, SOURCES)} Known: {', '.join(SOURCES)}; "
        "or a folder of images, a .parquet, .npz or .npy file, or a Hugging Face name (owner/name)."
    )


def load(
    source: str,
    split: str = "train",
    *,
    path: str | None = None,
    data_files: Mapping[str, str | Sequence[str]] | None = None,
    config: str | None = None,
    revision: str | None = None,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
    label: str | None = "label",
    image_column: str = "image",
    num_classes: int | None = None,
    on_error: str = "stop",
    streaming: bool = False,
    buffer: int = 2048,
    limit: int | None = None,
    held_out: float = 0.1,
    n: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset | StreamingDataset:
    """One split of a data set; images become float32 in [-1, 1], shape (C, H, W).

    Args:
        source: "digits", "gaussians", "moons", "checkerboard", "spiral"; "folder", "parquet", "array" or "hub" with
            `path`; or, instead of those four, the path or the hub name (owner/name) itself.
        split: "train" or "held-out"; on parquet and the hub also a split's own name. Where the data come in one
            piece, a fixed `held_out` share is set apart by hash of file name or row (but not of a hub stream, which
            is trained on whole).
        path: the file, the folder, or the hub name.
        data_files: parquet files by split, as paths or patterns relative to `path`.
        config: configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.
        size: images are scaled to cover (height, width) and cropped about their centre (Lanczos); None: as they
            are, all of one size.
        channels: 1 (grey, ITU-R 601 luma), 3 (RGB; transparency over white) or 4 (RGBA); None: as in the data.
        label: column, or array in an .npz, that holds the labels (without a "label" there are none); None: no labels.
        image_column: column of the images; in an .npz the array of the data.
        num_classes: how many classes, where the data do not say.
        on_error: an image that cannot be read is named and the load "stop"s, or it is left out: "skip".
        streaming: read on the way, never all at once.
        buffer: rows among which a stream is shuffled.
        limit: at most so many rows, a fixed random choice (the first ones of a hub stream).
        held_out: see `split`.
        n: number of points of a 2-D source.
        seed: of the points of a 2-D source.
        progress: called with (images read, images in all) now and then.

    Raises:
        ArgumentError: an unknown source or split, an option out of range, or one the source does not use.
        DataError: data that are missing, unreadable, of mixed sizes, or wrongly labelled.
        MissingExtraError: parquet or the hub without `undiffuse[data]`.
    """
    request = _resolve(Request(**locals()))  # the arguments, by name
    chosen = SOURCES[request.source]
    stray = sorted(request.given() - chosen.options)
    if stray:
        raise ArgumentError(
            f"the data source '{request.source}' does not use {', '.join(f'data.{s}' for s in stray)}; "
            f"it takes {', '.join(sorted(chosen.options))}."
        )
    return chosen.read(request)
