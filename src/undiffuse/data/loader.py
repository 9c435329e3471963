"""Batches as a pure function of (seed, step), the same for any number of processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams, hash_key

POLL_SECONDS = 0.05  # between looks at whether the reader has left
LEAVE_SECONDS = 10.0

Batch = tuple[Tensor, Tensor | None]


class Feed(Protocol):
    """Where a loader's rows come from: this process's share of global batch `step`."""

    def batch(self, step: int) -> Batch: ...


class MapFeed:
    """Rows of an indexable data set, every epoch in a permutation of its own.

    Global position j = step * batch + row is item `permutation(j // n)[j % n]`.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, rank: int, world: int):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.share = batch_size // world
        self.offset = rank * self.share
        self._orders: dict[int, Tensor] = {}

    def order(self, epoch: int) -> Int[Tensor, " n"]:
        """The permutation of an epoch, drawn from (seed, epoch) alone."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(hash_key(self.seed, "epoch", epoch))
            order = torch.randperm(len(self.dataset), generator=generator)
            # A batch spans few epochs in a row: keep those near this one.
            near = {e: kept for e, kept in self._orders.items() if abs(e - epoch) <= 1}
            self._orders = near | {epoch: order}
        return self._orders[epoch]

    def rows(self, step: int) -> Int[Tensor, " b"]:
        """Which rows of the data set this process's share of batch `step` holds."""
        n, first = len(self.dataset), step * self.batch_size + self.offset
        last, parts = first + self.share, []
        for epoch in range(first // n, (last - 1) // n + 1):
            start, stop = max(first - epoch * n, 0), min(last - epoch * n, n)
            parts.append(self.order(epoch)[start:stop])
        return torch.cat(parts)

    def batch(self, step: int) -> Batch:
        """The rows themselves."""
        return self.dataset.batch(self.rows(step))


class StreamFeed:
    """Rows of a streamed data set: reads on from the last step, or starts again and skips."""

    def __init__(self, dataset: Any, batch_size: int, seed: int, rank: int, world: int):
        self.dataset, self.batch_size = dataset, batch_size
        self.order = {"seed": seed, "rank": rank, "world": world}
        self._next, self._batches = -1, iter(())

    def batch(self, step: int) -> Batch:
        """This process's share of batch `step`."""
        if step != self._next:
            self._batches = self.dataset.batches(self.batch_size, step, **self.order)
        self._next = step + 1
        return next(self._batches)


def _check(batch_size: int, rank: int, world: int) -> None:
    if batch_size < 1:
        raise ArgumentError(f"batch is {batch_size}: expected at least 1")
    if world < 1 or not 0 <= rank < world:
        raise ArgumentError(f"rank {rank} of {world} processes: expected 0 <= rank < world")
    if batch_size % world:
        raise ArgumentError(
            f"a global batch of {batch_size} does not divide among {world} processes: "
            f"give a multiple of {world}, for example {-(-batch_size // world) * world}"
        )


class Loader:
    """This process's share of each global batch: rows [rank B / world, (rank + 1) B / world).

    The global batch depends on (seed, step) only: not on the number of processes, and not on where a run was
    resumed. `flip` mirrors each image left to right with probability 1/2, decided by (seed, position), as are the
    random numbers of `change`.

    Args:
        dataset: a `Dataset`, or a `StreamingDataset` (which has `batches` and not `batch`).
        batch_size: size B of the global batch.
        seed: of the order and of the flips.
        rank: which process this is.
        world: how many there are.
        flip: mirror images at random.
        change: what becomes of x last, with random numbers of each sample: `change(x, streams)`; None: nothing.

    Raises:
        ArgumentError: B does not divide by `world`, or `flip` is asked of what is not an image.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        flip: bool = False,
        change: Callable[[Tensor, Streams], Tensor] | None = None,
    ):
        _check(batch_size, rank, world)
        if flip and not dataset.is_image:
            raise ArgumentError(
                f"flip=True needs images, shape (1, 3 or 4, H, W); {dataset.name} has shape {dataset.shape}"
            )
        kind = MapFeed if hasattr(dataset, "batch") else StreamFeed
        self.feed: Feed = kind(dataset, batch_size, seed, rank, world)
        self.dataset, self.batch_size, self.flip, self.change = dataset, batch_size, flip, change
        self.seed, self.rank, self.world = seed, rank, world

    def batch(self, step: int) -> Batch:
        """x (B / world, *event) and labels or None of global batch `step` >= 0.

        On a streamed data set a step that does not follow the last one reads the stream again from its start.
        """
        if step < 0:
            raise ArgumentError(f"step is {step}: expected 0 or more")
        x, cond = self.feed.batch(step)
        if self.flip:
            coin = self._streams("flip", x, step).uniform((len(x),)) < 0.5
            x = torch.where(coin.reshape(-1, 1, 1, 1), x.flip(-1), x)
        if self.change is not None:
            x = self.change(x, self._streams("change", x, step))
        return x, cond

    def _streams(self, purpose: str, x: Tensor, step: int) -> Streams:
        """Random numbers of this share's samples, by their places in the run."""
        first = step * self.batch_size + self.rank * len(x)
        return Streams.of(hash_key(self.seed, purpose), len(x), first=first)

    def prefetch(self, start: int = 0, stop: int | None = None, depth: int = 2) -> Iterator[Batch]:
        """Batches of steps start, start + 1, ..., stop - 1 (None: no end), made ahead in a thread.

        At most `depth` batches wait. An error in the thread is raised here, at the step it belongs to; leaving
        the loop ends the thread.
        """
        if depth < 1:
            raise ArgumentError(f"depth is {depth}: expected at least 1")
        waiting: queue.Queue = queue.Queue(depth)
        leaving = threading.Event()
        thread = threading.Thread(
            target=self._fill, args=(waiting, leaving, start, stop), name="undiffuse-loader", daemon=True
        )
        thread.start()
        try:
            while (item := waiting.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            leaving.set()
            # A thread that waits for a network may not hold up the program's end.
            thread.join(LEAVE_SECONDS)

    def _fill(self, waiting: queue.Queue, leaving: threading.Event, start: int, stop: int | None) -> None:
        """Body of the thread: batches, then None; an error in the place of the batch that met it."""

        def put(item: Any) -> None:
            while not leaving.is_set():
                try:
                    waiting.put(item, timeout=POLL_SECONDS)
                except queue.Full:
                    continue
                return

        step = start
        try:
            while not leaving.is_set() and (stop is None or step < stop):
                put(self.batch(step))
                step += 1
            put(None)
        except BaseException as error:
            put(error)
