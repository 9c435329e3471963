"""What the command prints: text, progress, results, errors; and the exit codes.

Results go to standard output, progress and errors to standard error. With `--json` standard output holds one JSON
object and nothing else. Of several processes only the first prints.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import typer

from undiffuse.core.errors import UndiffuseError

F = TypeVar("F", bound=Callable[..., Any])

BUG = 70  # sysexits.h: an error inside the program
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
# Where progress is not a terminal's: seconds between two lines, so that a log stays readable.
PLAIN_EVERY = 10.0

DEBUG = False


class Stopped(BaseException):
    """SIGTERM, as an exception: whatever runs is left as an interruption leaves it."""


def is_lead() -> bool:
    """Whether this process prints: the first of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


class Console:
    """Where a command's words go.

    Args:
        as_json: keep standard output for one JSON object.
        quiet: no progress and no text; errors and results stay.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False):
        self.as_json = as_json
        self.quiet = quiet

    def say(self, text: str = "") -> None:
        """A line for people."""
        if is_lead() and not self.quiet:
            print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people; the first column is text, the others figures."""
        if not is_lead() or self.quiet or self.as_json:
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console as Screen
        from rich.table import Table

        self.say(title)
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        # Wide enough that a log file shows what a terminal does.
        Screen(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)

    def result(self, record: dict[str, Any]) -> None:
        """The outcome for a program, with `--json`."""
        if self.as_json and is_lead():
            print(json.dumps(record, allow_nan=False), flush=True)

    def progress(self, what: str, unit: str) -> Progress:
        """A progress display; use it as a context."""
        silent = self.quiet or not is_lead()
        return Silent(what, unit) if silent else Bar(what, unit) if sys.stderr.isatty() else Lines(what, unit)


class Progress:
    """How much is done, how fast, and how long it will take. `to(done, total)` is all it needs to know."""

    def __init__(self, what: str, unit: str):
        self.what, self.unit = what, unit
        self.first: tuple[float, float] | None = None  # when `to` was first called, and how much was done then

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def now(self, what: str, unit: str) -> Progress:
        """From here on another thing is counted; nothing happens where it is the same."""
        if (what, unit) != (self.what, self.unit):
            self.what, self.unit, self.first = what, unit, None
        return self

    def to(self, done: int, total: int, note: str = "") -> None:
        """Now `done` of `total` are done; `note` is shown beside."""
        now = time.monotonic()
        if self.first is None:
            self.first = (now, done)
        self.show(done, total, note, self._rate(now, done))

    def _rate(self, now: float, done: int) -> float | None:
        """Units per second of this session."""
        if self.first is None or now <= self.first[0] or done <= self.first[1]:
            return None
        return (done - self.first[1]) / (now - self.first[0])

    def show(self, done: int, total: int, note: str, rate: float | None) -> None:
        """Display it."""


class Silent(Progress):
    """Shows nothing."""


class Lines(Progress):
    """A plain line now and then, for logs."""

    _last = 0.0

    def show(self, done: int, total: int, note: str, rate: float | None) -> None:
        now = time.monotonic()
        if self.first is not None and self._last == 0.0:
            self._last = self.first[0]
        if done < total and now - self._last < PLAIN_EVERY:
            return
        self._last = now
        print(
            f"{self.what}: {describe(done, total, rate, self.unit)}{note and '  ' + note}", file=sys.stderr, flush=True
        )


class Bar(Progress):
    """A bar at the bottom of a terminal."""

    def __enter__(self) -> Progress:
        from rich.console import Console as Screen
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Rich

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
        self.rich = Rich(*columns, console=Screen(stderr=True), transient=False)
        self.rich.start()
        self.task = self.rich.add_task(self.what, total=None, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rich.stop()

    def show(self, done: int, total: int, note: str, rate: float | None) -> None:
        state = f"{describe(done, total, rate, self.unit)}{note and '  ' + note}"
        self.rich.update(self.task, description=self.what, completed=done, total=total, state=state)


def describe(done: int, total: int, rate: float | None, unit: str) -> str:
    """`"120/800  9.3 steps/s  1:13 left"`."""
    parts = [f"{done:,}/{total:,}"]
    if rate:
        parts.append(f"{rate:.3g} {unit}/s" if rate < 1000 else f"{rate:,.0f} {unit}/s")
        if done < total:
            parts.append(f"{clock((total - done) / rate)} left")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """`"1:13"`, `"2:05:09"`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def signals() -> Iterator[Callable[[], int | None]]:
    """Turns SIGTERM into `Stopped`, and tells which signal arrived last, even where other code has taken it over.

    Only the main thread can; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    old_wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    old_handler = signal.signal(signal.SIGTERM, _stop)

    def last() -> int | None:
        try:
            arrived = [number for number in os.read(reading, 4096) if number in (signal.SIGTERM, signal.SIGINT)]
        except BlockingIOError:
            return None
        return arrived[-1] if arrived else None

    try:
        yield last
    finally:
        signal.signal(signal.SIGTERM, old_handler if old_handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(old_wakeup)
        os.close(reading)
        os.close(writing)


def _stop(number: int, frame: Any) -> None:
    raise Stopped


def exit_code_of(number: int | None) -> int:
    """The exit code of a run that stopped cleanly on a signal."""
    return TERMINATED if number == signal.SIGTERM else INTERRUPTED


def guarded(command: F) -> F:
    """`command` with its errors printed as one paragraph and turned into exit codes."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            with signals():
                return command(*args, **options)
        except UndiffuseError as error:
            raise typer.Exit(_report(error, error.exit_code)) from None
        except KeyboardInterrupt:
            complain("stopped by Ctrl-C. The same command goes on where it stopped.")
            raise typer.Exit(INTERRUPTED) from None
        except Stopped:
            complain("stopped by SIGTERM. The same command goes on where it stopped.")
            raise typer.Exit(TERMINATED) from None
        except BrokenPipeError:
            # Whoever read the output has left; what remains of it goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except typer.Exit:
            raise
        except Exception as error:
            message = f"inside undiffuse: {type(error).__name__}: {error}. Run again with --debug for the trace."
            raise typer.Exit(_report(error, BUG, message)) from None

    return run  # pyright: ignore[reportReturnType]


def _report(error: Exception, code: int, message: str | None = None) -> int:
    if DEBUG:
        traceback.print_exception(error)
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    complain(f"error: {message or error}{notes}")
    return code


def complain(text: str) -> None:
    """A paragraph on standard error, from whichever process has something to say."""
    who = "" if is_lead() else f"[process {os.environ.get('RANK')}] "
    print(f"{who}{text}", file=sys.stderr, flush=True)
