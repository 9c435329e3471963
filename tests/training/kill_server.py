"""Kills training runs at chosen moments, resumes them, and prints what came of it as JSON.

    python kill_server.py FOLDER moments N     N random moments of the run
    python kill_server.py FOLDER calls         before and after every call that changes the disk

Each run is a fork of this process, which has imported everything and computed nothing, so that a run costs what its
steps cost.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch._dynamo  # an optimiser imports it when it is made: a second that no fork should pay
from training_toys import TinyLoader, fingerprint, records, train

from undiffuse.training import files, list_checkpoints, load_checkpoint

# Many saves, many deletions, a window of the log across most of them; and the same in short.
RUNS = {
    "moments": {"steps": 45, "checkpoint_every": 3, "log_every": 5, "snapshot_every": 9, "micro_batch": None},
    "calls": {"steps": 9, "checkpoint_every": 3, "log_every": 2, "snapshot_every": 4, "micro_batch": None},
}


def child(folder, mode, *, kill_at=None, count_to=None):
    """Run to the end in a fork; returns its process id. `kill_at`: end oneself at that call of `on_disk`."""
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        if kill_at is not None or count_to is not None:
            watch_disk(kill_at)
        warnings.simplefilter("error")
        train(folder, loader=TinyLoader(), **RUNS[mode])
        if count_to is not None:
            Path(count_to).write_text(str(watch_disk.calls))
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def watch_disk(kill_at):
    """Count the calls that change the disk; the process ends before call n (kill_at = 2n) or after it (2n + 1)."""
    watch_disk.calls = 0

    def watched(function):
        def wrapped(*args, **options):
            n = watch_disk.calls
            watch_disk.calls += 1
            if kill_at == 2 * n:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if kill_at == 2 * n + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    os.fsync, os.rename, os.replace = watched(os.fsync), watched(os.rename), watched(os.replace)
    files.save_file, files.shutil.rmtree = watched(files.save_file), watched(shutil.rmtree)
    Path.mkdir, Path.unlink = watched(Path.mkdir), watched(Path.unlink)


def finish(process):
    """The signal that ended a process, or minus its exit status."""
    _, status = os.waitpid(process, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def trial(folder, reference, mode, process):
    """After the kill: what is there is whole, and resuming ends where the uninterrupted run does."""
    ended = finish(process)
    rubbish = len(list(folder.rglob(".tmp-*")))
    steps = list_checkpoints(folder)
    for step in steps:
        load_checkpoint(folder, step)
    resumed = finish(child(folder, mode))
    same = resumed == 0 and fingerprint(folder) == fingerprint(reference) and records(folder) == records(reference)
    left = len(list(folder.rglob(".tmp-*")))
    shutil.rmtree(folder)
    return {"ended": ended, "at": steps[-1] if steps else 0, "rubbish": rubbish, "same": same, "left": left}


def moments(folder, n):
    """Kill at n random moments; runs that end before theirs are not counted, and shorten the guess of the length."""
    rng, length, results = random.Random(0), float("inf"), []
    while len(results) < n:
        began = time.monotonic()
        process = child(folder / "run", "moments")
        if length < float("inf"):
            time.sleep(rng.uniform(0, length))
            os.kill(process, signal.SIGKILL)
        result = trial(folder / "run", folder / "reference", "moments", process)
        if result["ended"] == signal.SIGKILL:
            results.append(result)
        else:
            # The run, and the one that found nothing to resume.
            length = min(length, time.monotonic() - began)
    return results


def calls(folder):
    """Kill before and after every call."""
    n = 2 * int((folder / "calls").read_text())
    reference = folder / "reference"
    return [trial(folder / "run", reference, "calls", child(folder / "run", "calls", kill_at=i)) for i in range(n)]


def main(folder, mode, *arguments):
    folder = Path(folder)
    finish(child(folder / "reference", mode, count_to=folder / "calls"))
    results = moments(folder, *map(int, arguments)) if mode == "moments" else calls(folder)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
