"""Parquet files in the Hugging Face layout: `image` (struct of bytes and path) and `label`."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undiffuse.core.errors import DataError, require
from undiffuse.data import tables
from undiffuse.data.dataset import Dataset, Labels, digest
from undiffuse.data.images import Unreadable
from undiffuse.data.labels import make_labels
from undiffuse.data.lazy import read_images
from undiffuse.data.records import MEMORY_LIMIT, Records
from undiffuse.data.request import HELD_OUT_NAMES, SPLITS, Request, check_split, find_split
from undiffuse.data.splits import row_positions, split_rows
from undiffuse.data.stream import LocalRecords, StreamingDataset

SPLIT_WORD = re.compile(rf"(?:^|[-_.])({'|'.join(('train', *HELD_OUT_NAMES))})(?=[-_.]|$)")


@dataclass(frozen=True)
class Files:
    """Parquet files of one data set: all of them, those of the split asked for, and what the schema says."""

    every: list[Path]
    chosen: list[Path]
    split: str
    whole: bool  # the files hold no splits: one has to be made by hash of the row


def _split_of(file: Path) -> str | None:
    """The split that a file's name, or its folder's, speaks of."""
    found = SPLIT_WORD.search(file.stem) or SPLIT_WORD.fullmatch(file.parent.name)
    return found.group(1) if found else None


def _by_pattern(request: Request) -> dict[str, list[Path]]:
    """`data_files`, each split's patterns resolved below `path`."""
    root = Path(request.path).expanduser() if request.path else Path()
    groups: dict[str, list[Path]] = {}
    for split, patterns in (request.data_files or {}).items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            place = Path(pattern).expanduser()
            anchor = Path(place.anchor) if place.is_absolute() else root
            found = sorted(anchor.glob(str(place.relative_to(place.anchor)) if place.is_absolute() else pattern))
            if not found:
                raise DataError(f"data.data_files: nothing matches '{pattern}' of split '{split}' below '{anchor}'")
            groups.setdefault(split, []).extend(found)
    return groups


def find_files(request: Request) -> Files:
    """Which files hold the split.

    Raises:
        ArgumentError: an unknown split; the nearest is offered.
        DataError: no parquet files.
    """
    if request.data_files:
        groups = _by_pattern(request)
    else:
        place = request.place()
        if place.is_file():
            return Files([place], [place], check_split(request.split), whole=True)
        groups = {}
        files = sorted(place.rglob("*.parquet"))
        for file in files:
            groups.setdefault(_split_of(file) or "", []).append(file)
        if not files:
            raise DataError(f"no .parquet file in '{place}'")
    every = [file for group in groups.values() for file in group]
    if len(groups) == 1 and set(groups) <= {"", "train"} and request.split in SPLITS:
        return Files(every, every, request.split, whole=True)
    if "" in groups:
        raise DataError(
            f"'{groups[''][0]}' and {len(groups['']) - 1} other(s) name no split, unlike '{every[0].name}': "
            "say which is which in data.data_files={train: ..., held-out: ...}"
        )
    return Files(every, groups[find_split(request.split, list(groups))], request.split, whole=False)


def _open(file: Path) -> Any:
    pq = require("pyarrow.parquet", tables.EXTRA)
    try:
        return pq.ParquetFile(file)
    except (ValueError, OSError) as error:
        raise DataError(f"'{file}' cannot be read as parquet (truncated or altered?): {error}") from error


def _read(file: Path, columns: list[str]) -> Any:
    try:
        return _open(file).read(columns=columns)
    except (ValueError, OSError) as error:
        raise DataError(f"'{file}' is damaged: {error}") from error


def _labels(files: Files, request: Request) -> tuple[Labels, int]:
    """Labels of the rows of the chosen files, classes counted over all splits; and how many rows these are."""
    pa = require("pyarrow", tables.EXTRA)
    schemas = {file: _open(file).schema_arrow for file in files.every}
    rows = {file: _open(file).metadata.num_rows for file in files.every}
    n = sum(rows[file] for file in files.chosen)
    found = {tables.check_columns(s, request.image_column, request.label, f"'{f}'") for f, s in schemas.items()}
    if len(found) > 1:
        raise DataError(f"some files of {request.name} have the label column '{request.label}' and some have not")
    label = found.pop()
    if label is None:
        return Labels(None, None, None), n
    columns = [_read(file, [label]).column(label) for file in files.every]
    values = tables.label_values(pa.chunked_array([c for one in columns for c in one.chunks]), request.name)
    names = tables.class_names(schemas[files.chosen[0]], label)
    labels = make_labels(values, source=request.name, names=names, num_classes=request.num_classes)
    starts = dict(zip(files.every, np.cumsum([0, *rows.values()]).tolist()))
    chosen = [torch.arange(starts[file], starts[file] + rows[file]) for file in files.chosen]
    return labels.select(torch.cat(chosen)), n


def _image_column(files: Files, request: Request) -> Any:
    """The encoded images: in memory while small, else memory-mapped from the cache of `datasets`."""
    pa = require("pyarrow", tables.EXTRA)
    if sum(file.stat().st_size for file in files.chosen) <= MEMORY_LIMIT:
        parts = [_read(file, [request.image_column]) for file in files.chosen]
        return pa.chunked_array([c for part in parts for c in part.column(0).chunks])
    datasets = require("datasets", tables.EXTRA)
    names = [str(file) for file in files.chosen]
    mapped = datasets.load_dataset("parquet", data_files={"rows": names}, split="rows")
    return mapped.data.table.column(request.image_column)


def _where(files: Files) -> Callable[[int], str]:
    ends = np.cumsum([_open(file).metadata.num_rows for file in files.chosen])

    def where(row: int) -> str:
        part, inside = tables.locate(row, ends)
        return f"row {row} ({files.chosen[part].name}, its row {inside})"

    return where


class RowGroups:
    """Rows of parquet files read a row group at a time; the last few groups stay in memory."""

    def __init__(self, files: list[Path], column: str, keep_rows: int):
        self.files, self.column = [_open(file) for file in files], column
        self.folders = [file.parent for file in files]
        self.groups = [(f, g) for f, one in enumerate(self.files) for g in range(one.num_row_groups)]
        sizes = [self.files[f].metadata.row_group(g).num_rows for f, g in self.groups]
        self.ends = np.cumsum(sizes)
        # So many consecutive rows touch at most this many groups.
        self.keep = keep_rows // max(min(sizes, default=1), 1) + 2
        self._readers: OrderedDict[int, Callable[[int], bytes | Path | Unreadable]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, row: int) -> bytes | Path | Unreadable:
        """The encoded image of a row."""
        group, inside = tables.locate(row, self.ends)
        with self._lock:
            if group not in self._readers:
                self._readers[group] = self._load(group)
                while len(self._readers) > self.keep:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(group)
            reader = self._readers[group]
        return reader(inside)

    def _load(self, group: int) -> Callable[[int], bytes | Path | Unreadable]:
        file, inside = self.groups[group]
        try:
            table = self.files[file].read_row_group(inside, columns=[self.column])
        except (ValueError, OSError) as error:
            raise DataError(
                f"'{self.folders[file]}', row group {inside} of file {file}, is damaged: {error}"
            ) from error
        return tables.image_reader(table.column(0), self.folders[file])


def load_parquet(request: Request) -> Dataset | StreamingDataset:
    """Images of parquet files; see `load`."""
    files = find_files(request)
    labels, n = _labels(files, request)
    if n == 0:
        raise DataError(f"{request.name} ({files.split}) has no rows")
    rows = torch.arange(n)
    if files.whole:
        rows = split_rows(row_positions(n), files.split, request.held_out)
    if request.streaming:
        groups = RowGroups(files.chosen, request.image_column, request.buffer)
        records = Records(groups, _where(files), labels, rows).limited(request.limit)
        content = digest(files.split, [file.stat().st_size for file in files.chosen], records.rows, labels.values)
        return StreamingDataset(LocalRecords(records, groups.ends), request, files.split, content)
    read = tables.image_reader(_image_column(files, request), files.chosen[0].parent)
    return read_images(Records(read, _where(files), labels, rows), request, files.split)
