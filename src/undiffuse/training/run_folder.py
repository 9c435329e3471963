"""A run folder is used by one run at a time, and a run that is asked to stop does so between two steps."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from undiffuse.core.errors import ArgumentError, RunError

# Keys of a recipe that may differ on resuming: they do not change what a step does. Sections end with a dot.
MAY_CHANGE = (
    "name",
    "description",
    "sampling.",
    "evaluation.",
    "training.steps",
    "training.micro_batch",
    "training.compile",
    "training.checkpoint_every",
    "training.keep",
    "training.snapshot_every",
    "training.sample_every",
    "training.log_every",
    "training.trackers",
    "training.timeout",
)

# A launcher passes the terminal's Ctrl-C on, so that one press arrives twice: seconds within which they are one.
_SAME_PRESS = 1.0


class InUseError(RunError):
    """A run folder that another process holds."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder. The operating system lets go of it when the process ends, however it ends.

    Raises:
        InUseError: another process holds it; says which.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InUseError(
                f"run folder {folder} is in use by process {file.read().strip() or 'unknown'}: "
                "wait for it, stop it, or give another folder"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class StopRequest:
    """Whether the run has been asked to stop by SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0

    def __bool__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received is not None and now - self._when > _SAME_PRESS:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._when = signal.Signals(number).name, now


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn SIGTERM and Ctrl-C into a request inside the block; a second Ctrl-C aborts at once.

    Only the main thread may install handlers: elsewhere nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, request._handle) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint as JSON gives it back (tuples become lists).

    Raises:
        ArgumentError: it holds something that JSON has not.
    """
    try:
        return json.loads(json.dumps(fingerprint, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"fingerprint: expected numbers, strings, lists and dicts only: {error}") from error


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"section.key": value}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Resuming needs the recipe that the run began with, but for `MAY_CHANGE`.

    Raises:
        RunError: names each key that changed, with both values.
    """
    before, after = flat(dict(old)), flat(dict(new))
    changed = [
        f"{key} was {_shown(before, key)}, is {_shown(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if _shown(before, key) != _shown(after, key) and not _may_change(key)
    ]
    if changed:
        raise RunError(
            f"the recipe has changed since run folder {folder} was begun: {'; '.join(changed)}. "
            "Put it back to resume, or give another folder to start anew"
        )


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "absent"


def _may_change(key: str) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in MAY_CHANGE)
