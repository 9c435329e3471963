"""Undecoded images with their labels, and the pass that reads every one of them before training starts."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int
from torch import Tensor

from undiffuse.core.errors import DataError
from undiffuse.data.dataset import Labels, Skipped
from undiffuse.data.images import Decoder, Unreadable
from undiffuse.data.request import Request
from undiffuse.data.splits import subset

S = TypeVar("S")
T = TypeVar("T")

# Up to here the decoded images are kept in memory; above, each batch decodes its own.
MEMORY_LIMIT = 2 * 1024**3
CHUNK = 64  # images per task of a thread
SMALL = 8192  # bytes of an encoded image below which threads do not pay
AHEAD = 4  # tasks per thread that may wait for the reader
NAMED = 10  # unreadable images that an error lists
SIZES_NAMED = 5  # sizes that an error lists
DIGEST_SIZE = 8
SAMPLED = 8  # images by which the size of all is judged


class Crew:
    """Decodes in threads where images are large, at once where they are small.

    Pillow lets go of the interpreter's lock while it decodes; below `SMALL` bytes an image takes less time than the
    threads' dispute over that lock (28 x 28 PNG: 70 us in one thread, 150 us in two).

    Args:
        size: bytes of a typical encoded image.
    """

    def __init__(self, size: int):
        self.threads = 1 if size < SMALL else os.cpu_count() or 1

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="undiffuse-decode")

    def map(self, work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """`work` of each item, in order; a few items ahead of the reader, so that little waits in memory."""
        if self.threads == 1:
            yield from map(work, items)
            return
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) > AHEAD * self.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class Records:
    """Encoded images by row.

    Attributes:
        read: the bytes of the file of a row, or its path; `Unreadable` says why there is neither.
        where: a row's place in words, for errors.
        labels: of all rows that `read` knows.
        rows: the rows in use, ascending.
    """

    read: Callable[[int], bytes | Path | Unreadable]
    where: Callable[[int], str]
    labels: Labels
    rows: Int[Tensor, " n"]

    def select(self, positions: Tensor) -> Records:
        """Some of the rows in use, by their place among them."""
        return Records(self.read, self.where, self.labels, self.rows[positions])

    def limited(self, limit: int | None) -> Records:
        """At most `limit` rows, a fixed random choice."""
        return self.select(subset(len(self.rows), limit))

    def bytes_of(self, row: int) -> bytes | Unreadable:
        """The encoded image itself."""
        found = self.read(row)
        if not isinstance(found, Path):
            return found
        try:
            return found.read_bytes()
        except OSError as error:
            return Unreadable(error.strerror or str(error))

    def crew(self) -> Crew:
        """Who decodes these images, judged by the first few of them."""
        first = [self.bytes_of(row) for row in self.rows[:SAMPLED].tolist()]
        return Crew(max((len(one) for one in first if isinstance(one, bytes)), default=0))

    def decode(self, row: int, decoder: Decoder) -> tuple[np.ndarray | Unreadable, bytes]:
        """Pixels (C, H, W) of a row, or why there are none; and the digest of what was read."""
        encoded = self.bytes_of(row)
        if isinstance(encoded, Unreadable):
            return encoded, b""
        return decoder(encoded), hashlib.blake2b(encoded, digest_size=DIGEST_SIZE).digest()


@dataclass
class Survey:
    """What reading every row found. `pixels` (n, C, H, W) is None where it would not fit in memory."""

    pixels: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    good: list[int] = field(default_factory=list)  # places among the rows in use
    skipped: list[Skipped] = field(default_factory=list)
    shapes: Counter = field(default_factory=Counter)
    examples: dict[tuple[int, ...], str] = field(default_factory=dict)
    content: Any = field(default_factory=hashlib.sha256)

    def note(self, place: int, row: int, image: np.ndarray | Unreadable, records: Records) -> None:
        """Book one row, rows coming in order."""
        if isinstance(image, Unreadable):
            self.skipped.append(Skipped(row, records.where(row), image.reason))
            return
        if not self.shape:
            self.shape = image.shape
            if len(records.rows) * image.size <= MEMORY_LIMIT:
                self.pixels = np.empty((len(records.rows), *image.shape), np.uint8)
        if image.shape == self.shape and self.pixels is not None:
            self.pixels[len(self.good)] = image
        self.good.append(place)
        self.shapes[image.shape] += 1
        self.examples.setdefault(image.shape, records.where(row))


def survey(records: Records, request: Request) -> Survey:
    """Decode every row once, in threads and in order of rows.

    Raises:
        DataError: an image that cannot be read and on_error is "stop"; none that can; mixed sizes or channels.
    """
    rows, found = records.rows.tolist(), Survey()
    decoder = Decoder(request.height_width, request.channels)

    def decode_chunk(first: int) -> list[tuple[np.ndarray | Unreadable, bytes]]:
        return [records.decode(row, decoder) for row in rows[first : first + CHUNK]]

    firsts = range(0, len(rows), CHUNK)
    for first, chunk in zip(firsts, records.crew().map(decode_chunk, firsts)):
        for place, (image, mark) in enumerate(chunk, start=first):
            found.note(place, rows[place], image, records)
            found.content.update(mark)
        if request.progress is not None:
            request.progress(first + len(chunk), len(rows))
    _check(found, request)
    return found


def _check(found: Survey, request: Request) -> None:
    announce(found.skipped, len(found.skipped) + len(found.good), request)
    if len(found.shapes) > 1:
        raise DataError(_mixed_message(found, request.name))


def announce(skipped: list[Skipped], n: int, request: Request) -> None:
    """Say which of `n` rows cannot be used: an error, or one warning where `on_error` is "skip".

    Raises:
        DataError: on_error is "stop", or no row is left.
    """
    if not skipped:
        return
    if request.on_error == "stop":
        raise DataError(unreadable_message(skipped, request.name))
    if len(skipped) == n:
        raise DataError(f"none of the {n} rows of {request.name} can be read; the first: {skipped[0]}")
    warnings.warn(
        f"{len(skipped)} of {n} rows of {request.name} cannot be read and are left out; the first: {skipped[0]}",
        stacklevel=2,
    )


def unreadable_message(skipped: list[Skipped], name: str) -> str:
    """Which images cannot be read, and what to do."""
    lines = [f"\n  {one}" for one in skipped[:NAMED]]
    if len(skipped) > NAMED:
        lines.append(f"\n  and {len(skipped) - NAMED} more")
    return (
        f"{len(skipped)} row(s) of {name} cannot be read:{''.join(lines)}\n"
        "Repair or remove them, or set data.on_error=skip to leave them out."
    )


def _mixed_message(found: Survey, name: str) -> str:
    sizes = Counter()
    for shape, count in found.shapes.items():
        sizes[shape[1:]] += count
    which, cure = ("sizes", "data.size=PIXELS to scale and crop them to one size")
    if len(sizes) == 1:
        which, cure = ("channels", "data.channels=1, 3 or 4 to convert them to one kind")
    lines = [
        f"\n  {shape[1]} x {shape[2]} (height x width), {shape[0]} channel(s): {count} images, "
        f"such as {found.examples[shape]}"
        for shape, count in found.shapes.most_common(SIZES_NAMED)
    ]
    if len(found.shapes) > SIZES_NAMED:
        lines.append(f"\n  and {len(found.shapes) - SIZES_NAMED} more kinds")
    return f"the images of {name} are of mixed {which}:{''.join(lines)}\nGive {cure}."
