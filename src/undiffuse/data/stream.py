"""Data that are read on the way: in an order that depends on (seed, epoch) only, resumed by skipping."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from undiffuse.core.errors import DataError
from undiffuse.core.random import hash_key
from undiffuse.data.dataset import Labelled, Labels, Skipped, digest, to_float
from undiffuse.data.images import Decoder, Unreadable
from undiffuse.data.records import Crew, Records, unreadable_message
from undiffuse.data.request import Request


class StreamRow(Protocol):
    """One encoded image of a stream."""

    row: int

    @property
    def where(self) -> str: ...
    @property
    def label(self) -> Tensor | None: ...
    def encoded(self) -> bytes | Unreadable: ...


class Shards(Protocol):
    """A stream in parts that can be read in any order; `n` rows in all, None where that is not known."""

    labels: Labels  # without values where these come with the rows

    @property
    def n(self) -> int | None: ...
    def __len__(self) -> int: ...
    def rows(self, shard: int) -> Iterator[StreamRow]: ...


class LocalRow:
    """A row of `Records`; nothing is read until `encoded` is called."""

    def __init__(self, records: Records, row: int):
        self.records, self.row = records, row

    @property
    def where(self) -> str:
        """Its place in words."""
        return self.records.where(self.row)

    @property
    def label(self) -> Tensor | None:
        """Its class () or vector (d,)."""
        values = self.records.labels.values
        return None if values is None else values[self.row]

    def encoded(self) -> bytes | Unreadable:
        """The image file's bytes."""
        return self.records.bytes_of(self.row)


class LocalRecords:
    """The rows in use of `Records`, in shards that end before the rows `ends` (row groups, or single files)."""

    def __init__(self, records: Records, ends: np.ndarray):
        self.records = records
        self.labels = records.labels.select(records.rows)
        shard_of = np.searchsorted(ends, records.rows.numpy(), side="right")
        cuts = np.flatnonzero(np.diff(shard_of)) + 1
        self.parts = np.split(records.rows.numpy(), cuts)

    @property
    def n(self) -> int | None:
        """How many rows are in use."""
        return len(self.records.rows)

    def __len__(self) -> int:
        return len(self.parts)

    def rows(self, shard: int) -> Iterator[StreamRow]:
        """The rows of a shard."""
        return (LocalRow(self.records, row) for row in self.parts[shard].tolist())


class StreamingDataset(Labelled):
    """Images read on the way. There is no `batch(indices)`: only `batches`, in the stream's own order.

    In each epoch the shards come in a random order, and the rows of every `buffer` in a row are shuffled among
    themselves. A row that cannot be read stops the stream, or (on_error "skip") its place in the batch is taken by the
    next row that can, so that what a batch holds does not depend on who reads it or from where. Skipping costs nothing
    where the number of rows is known (files); a hub stream reads past what it skips.

    Args:
        shards: where the rows are.
        request: what `load` was asked for.
        split: the split's name.
        content: what identifies the data without reading them.

    Raises:
        DataError: not one of the first rows can be read.
    """

    def __init__(self, shards: Shards, request: Request, split: str, content: str):
        self.shards, self.request, self.name, self.split = shards, request, request.name, split
        self.labels = shards.labels
        self.decoder = Decoder(request.height_width, request.channels)
        self.skipped: list[Skipped] = []
        self._skipped_rows: set[int] = set()
        self._content = content
        self._shape, self._crew = self._first_image()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one image: that of the first."""
        return self._shape

    @property
    def n(self) -> int | None:
        """Rows in an epoch, unreadable ones included; None where only reading can tell."""
        return self.shards.n

    @property
    def fingerprint(self) -> str:
        """Digest of names and sizes of the files, not of what is in them."""
        size = self.request.height_width
        return digest(self._content, self.split, self._shape, size, self.num_classes, self.n, self.request.buffer)

    def __len__(self) -> int:
        if self.n is None:
            raise DataError(f"{self.name} is a stream: how many rows it has is not known")
        return self.n

    def summary(self) -> dict[str, Any]:
        """As of other data sets; "n" may be None, "skipped" holds what this process has met so far."""
        found = {"n": self.n, "classes": self.labels.counts(), "skipped": [str(one) for one in self.skipped]}
        return self.described() | found

    def _first_image(self) -> tuple[tuple[int, ...], Crew]:
        """Shape of the first image that can be read, and who decodes images of its size."""
        rows = itertools.chain.from_iterable(self.shards.rows(k) for k in range(len(self.shards)))
        for row in itertools.islice(rows, self.request.buffer):
            encoded = row.encoded()
            image = encoded if isinstance(encoded, Unreadable) else self.decoder(encoded)
            if isinstance(image, Unreadable):
                self._book(row, image)
            else:
                return image.shape, Crew(len(encoded) if isinstance(encoded, bytes) else 0)
        if self.skipped:
            raise DataError(f"none of the first {len(self.skipped)} rows can be read; the first: {self.skipped[0]}")
        raise DataError(f"{self.name} ({self.split}) has no rows")

    def _epoch(self, seed: int, epoch: int, skip: int = 0) -> Iterator[StreamRow]:
        """The rows of an epoch in order, but for the first `skip`."""
        generator = torch.Generator().manual_seed(hash_key(seed, "shards", epoch))
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        rows = itertools.chain.from_iterable(self.shards.rows(shard) for shard in order)
        for window in itertools.count():
            held = list(itertools.islice(rows, self.request.buffer))
            if not held:
                return
            if skip >= len(held):
                skip -= len(held)
                continue
            generator.manual_seed(hash_key(seed, "window", epoch, window))
            places = torch.randperm(len(held), generator=generator).tolist()
            yield from (held[place] for place in places[skip:])
            skip = 0

    def _endless(self, seed: int, first: int) -> Iterator[StreamRow]:
        """Epoch after epoch, from global position `first` on."""
        if self.n is not None:
            epoch, skip = divmod(first, self.n)
            yield from self._epoch(seed, epoch, skip)
            for later in itertools.count(epoch + 1):
                yield from self._epoch(seed, later)
        everything = itertools.chain.from_iterable(self._epoch(seed, epoch) for epoch in itertools.count())
        yield from itertools.islice(everything, first, None)

    def batches(
        self, batch_size: int, start: int = 0, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's share of global batches start, start + 1, ... without end.

        Args:
            batch_size: size B of the global batch.
            start: the first batch; those before are skipped without being decoded.
            seed: of the order.
            rank: which process this is: it gets rows [rank B / world, (rank + 1) B / world).
            world: how many processes there are.

        Raises:
            DataError: an image that cannot be read (on_error "stop"), or of another size than the first.
        """
        rows, ahead = self._endless(seed, start * batch_size), []
        share = batch_size // world
        while True:
            ahead += itertools.islice(rows, batch_size - len(ahead))
            mine = range(rank * share, (rank + 1) * share)
            images = list(self._crew.map(self._decode, [ahead[place] for place in mine]))
            pairs = [self._readable(image, place, ahead, rows) for place, image in zip(mine, images)]
            x = to_float(torch.from_numpy(np.stack([image for image, _ in pairs])))
            labels = [label for _, label in pairs if label is not None]
            yield x, torch.stack(labels) if labels else None
            del ahead[:batch_size]

    def _decode(self, row: StreamRow) -> np.ndarray | Unreadable:
        encoded = row.encoded()
        return encoded if isinstance(encoded, Unreadable) else self.decoder(encoded)

    def _readable(
        self, image: np.ndarray | Unreadable, place: int, ahead: list[StreamRow], rows: Iterator[StreamRow]
    ) -> tuple[np.ndarray, Tensor | None]:
        """Image and label at a place of the batch, or of the next row after it that can be read."""
        for tried in range(self.request.buffer):
            row = ahead[place + tried]
            if not isinstance(image, Unreadable):
                if image.shape != self._shape:
                    raise DataError(
                        f"{row.where} of {self.name} has shape {image.shape} (channels, height, width), the first "
                        f"image {self._shape}: give data.size and data.channels to convert all to one"
                    )
                return image, row.label
            self._book(row, image)
            if place + tried + 1 == len(ahead):
                ahead.append(next(rows))
            image = self._decode(ahead[place + tried + 1])
        raise DataError(
            f"{self.request.buffer} rows of {self.name} in a row cannot be read; the last: {ahead[-1].where}"
        )

    def _book(self, row: StreamRow, image: Unreadable) -> None:
        """Name a row that cannot be read: stop, or note it once."""
        bad = Skipped(row.row, row.where, image.reason)
        if self.request.on_error == "stop":
            raise DataError(unreadable_message([bad], self.name))
        if row.row not in self._skipped_rows:
            if not self.skipped:
                warnings.warn(f"left out of the stream of {self.name}, as all like it: {bad}", stacklevel=2)
            self._skipped_rows.add(row.row)
            self.skipped.append(bad)
