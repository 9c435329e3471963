"""Data sets of the Hugging Face hub, through `datasets`; no code of a data set is ever run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError, DataError, require
from undiffuse.data import tables
from undiffuse.data.dataset import Dataset, Labels, digest
from undiffuse.data.images import Unreadable
from undiffuse.data.labels import make_labels
from undiffuse.data.lazy import read_images
from undiffuse.data.records import Records
from undiffuse.data.request import SPLITS, Request, find_split
from undiffuse.data.splits import row_positions, split_rows
from undiffuse.data.stream import StreamingDataset, StreamRow


def _ask(request: Request, call: Any, **given: Any) -> Any:
    """One call of `datasets`; whatever it raises becomes an error that names the data set."""
    try:
        return call(request.path, request.config, revision=request.revision, **given)
    except Exception as error:  # network, permissions, a missing name: `datasets` raises dozens of kinds
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"the Hugging Face data set '{request.path}' cannot be read: {type(error).__name__}: {reason}"
        ) from error


def _names(features: Any, label: str | None) -> list[str] | None:
    """Names of the classes of a `ClassLabel` column."""
    feature = (features or {}).get(label)
    names = getattr(feature, "names", None)
    return list(names) if names else None


def load_hub(request: Request) -> Dataset | StreamingDataset:
    """A data set of the hub; see `load`."""
    datasets = require("datasets", tables.EXTRA)
    if not request.path:
        raise ArgumentError("the source 'hub' needs data.path, a name such as 'ylecun/mnist'")
    present = _ask(request, datasets.get_dataset_split_names)
    whole = list(present) == ["train"] and request.split in SPLITS
    if whole and request.streaming and request.split == "held-out":
        raise DataError(
            f"'{request.path}' has one split, 'train', and a stream cannot be split: "
            "load it without streaming, or name another data set"
        )
    name = "train" if whole else find_split(request.split, present)
    found = _ask(request, datasets.load_dataset, split=name, streaming=request.streaming)
    read = _stream if request.streaming else _table
    return read(found, request, request.split if whole else name, whole)


def _table(found: Any, request: Request, split: str, whole: bool) -> Dataset:
    """A data set on disk, memory-mapped by `datasets`."""
    table = found.data.table
    label = tables.check_columns(table.schema, request.image_column, request.label, f"'{request.path}'")
    values = None if label is None else tables.label_values(table.column(label), request.name)
    names = _names(found.features, label)
    labels = make_labels(values, source=request.name, names=names, num_classes=request.num_classes)
    read = tables.image_reader(table.column(request.image_column), Path())
    rows = torch.arange(len(found))
    if whole:
        rows = split_rows(row_positions(len(found)), split, request.held_out)
    return read_images(Records(read, lambda row: f"row {row} of '{split}'", labels, rows), request, split)


class HubRow:
    """A row that has arrived, its image still encoded."""

    def __init__(self, row: int, where: str, image: Any, label: Tensor | None):
        self.row, self.where, self.image, self.label = row, where, image, label

    def encoded(self) -> bytes | Unreadable:
        """The image file's bytes."""
        if isinstance(self.image, dict) and self.image.get("bytes") is not None:
            return self.image["bytes"]
        return Unreadable("no image (null)" if self.image is None else f"no bytes: {self.image!r:.80}")


class HubShards:
    """An `IterableDataset` by shards; row r of shard s is numbered s + r * (number of shards)."""

    def __init__(self, found: Any, request: Request, label: str | None, labels: Labels):
        self.found, self.request, self.label, self.labels = found, request, label, labels
        # The first `limit` rows of a stream are no longer in shards.
        self.count = 1 if request.limit is not None else max(found.num_shards, 1)

    @property
    def n(self) -> int | None:
        """Not known: only reading to the end tells."""
        return None

    def __len__(self) -> int:
        return self.count

    def rows(self, shard: int) -> Iterator[StreamRow]:
        """The rows of a shard, in order."""
        if self.request.limit is not None:
            part = self.found.take(self.request.limit)
        else:
            part = self.found if self.count == 1 else self.found.shard(self.count, shard)
        for row, item in enumerate(part):
            where = f"row {row}" if self.count == 1 else f"row {row} of shard {shard}"
            label = self._label(item, where)
            yield HubRow(shard + row * self.count, where, item[self.request.image_column], label)

    def _label(self, item: dict, where: str) -> Tensor | None:
        if self.label is None:
            return None
        given = item[self.label]
        values = np.array([-1 if given is None else given])
        classes = self.labels.num_classes
        checked = make_labels(
            values, source=f"{self.request.name} ({where})", names=self.labels.names, num_classes=classes
        )
        return torch.tensor(-1) if checked.values is None else checked.values[0]


def _stream(found: Any, request: Request, split: str, whole: bool) -> StreamingDataset:
    """A data set read over the network as it is needed."""
    datasets = require("datasets", tables.EXTRA)
    features = found.features or {}
    if request.image_column not in features:
        columns = ", ".join(features)
        raise DataError(f"'{request.path}' has no column '{request.image_column}'; its columns: {columns}")
    label = request.label if request.label in features else None
    if label is None and request.label not in (None, "label"):
        raise DataError(f"'{request.path}' has no column '{request.label}'; its columns: {', '.join(features)}")
    names = _names(features, label)
    classes = len(names) if names else request.num_classes
    if label is not None and classes is None:
        raise DataError(
            f"how many classes '{request.path}' has is not stated and a stream cannot be counted: "
            "give data.num_classes, or data.label=null to do without labels"
        )
    kind = str(getattr(features.get(label), "dtype", ""))
    if label is not None and not names and "int" not in kind:
        raise DataError(
            f"the labels of '{request.path}' are of type '{kind}': a stream takes whole numbers or named classes; "
            "load it without streaming, or give data.label=null"
        )
    found = found.cast_column(request.image_column, datasets.Image(decode=False))
    shards = HubShards(found, request, label, Labels(None, names, classes if label else None))
    content = digest("hub", request.path, request.config, request.revision, whole, request.limit)
    return StreamingDataset(shards, request, split, content)
