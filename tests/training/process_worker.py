"""What each process of `test_processes.py` does, one scenario after another; writes what it saw as JSON.

python -m torch.distributed.run --nproc-per-node 2 process_worker.py FOLDER SCENARIO ...
"""

import errno
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from training_toys import TinyLoader, settings, tiny_model

from undiffuse.objectives import Denoising
from undiffuse.training import fit, rank_and_size
from undiffuse.training import session as session_module

RANK, SIZE = rank_and_size()
PLAIN = {"steps": 20, "log_every": 1, "checkpoint_every": 10, "batch": 16, "micro_batch": 3}


def run(folder, *, model=None, loader=None, objective=None, on_sample=None, **changes):
    """A run, told as the result or the error of this process, with the hash of its weights and averages."""
    model = model or tiny_model(dropout=0.0)
    loader = loader or TinyLoader(16, RANK, SIZE)
    config = settings(**(PLAIN | changes))
    averages = {}
    init = session_module.Session.__init__

    def remember(session, learner, *rest):
        averages["all"] = learner.averages
        init(session, learner, *rest)

    session_module.Session.__init__ = remember
    try:
        result = fit(model, objective or Denoising(), loader, config, folder, on_sample=on_sample)
        told = {"step": result.step, "stopped": result.stopped}
    except Exception as error:
        told = {"error": type(error).__name__, "message": str(error)}
    finally:
        session_module.Session.__init__ = init
    values = [*model.parameters(), *averages["all"].tensors().values()] if averages else []
    digest = hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in values)).hexdigest()
    return told | {"weights": digest}


def plain(folder):
    model = tiny_model(dropout=0.0)
    with torch.no_grad():
        model.net.first.bias += RANK  # the first process's weights are everyone's
    return run(folder, model=model)


def chains(folder):
    """An energy with a replay buffer, whose rows all processes must agree on."""
    from test_train_energies import Points, energy, persistent

    model = energy()
    model.net.net[2].p = 0.0
    return run(folder, model=model, objective=persistent(), loader=Points(16, RANK, SIZE), cond_dropout=0.0)


class Stops(TinyLoader):
    """Sends SIGTERM to one process only, at one step."""

    def batch(self, step):
        if step == 12 and self.rank == self.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step)


def stop(folder):
    first = run(folder, loader=Stops(16, RANK, SIZE))
    return {"first": first, "second": run(folder)}


class Broken:
    """Not finite in the last process only; the slope stays finite."""

    def __init__(self):
        self.calls = 0

    def losses(self, model, x, cond=None, generator=None):
        record = Denoising().losses(model, x, cond, generator)
        self.calls += 1
        bad = torch.inf if self.calls > 3 * 4 and RANK == SIZE - 1 else 0.0
        return type(record)(record.loss + bad, record.t, record.half_log_snr)


def broken(folder):
    return run(folder, objective=Broken())


def unused(folder):
    model = tiny_model(dropout=0.0)
    model.net.spare = torch.nn.Linear(1, 1)
    return run(folder, model=model)


def full_disk(folder):
    real = session_module.save_checkpoint

    def failing(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    session_module.save_checkpoint = failing
    try:
        return run(folder)
    finally:
        session_module.save_checkpoint = real


def slow_samples(folder):
    """The first process is busy for longer than the others wait."""
    return run(folder, on_sample=lambda step, model: time.sleep(15), sample_every=5, timeout=6.0)


SCENARIOS = {f.__name__: f for f in (plain, chains, stop, broken, unused, full_disk, slow_samples)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for name in sys.argv[2:]:
        told = SCENARIOS[name](place / name)
        (place / f"{name}-{RANK}.json").write_text(json.dumps(told))
