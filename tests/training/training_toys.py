"""A model, data and a run so small that a test can afford to repeat them."""

import json
from pathlib import Path

import torch
from torch import nn

from undiffuse.core.random import Streams
from undiffuse.fields import NetworkDenoiser
from undiffuse.objectives import Denoising
from undiffuse.paths import VP
from undiffuse.training import TrainConfig, fit, load_checkpoint


class TinyNet(nn.Module):
    """Two-dimensional, class-conditional, with everything that resuming must carry: dropout and a buffer that moves."""

    def __init__(self, width=16, classes=3, dropout=0.1):
        super().__init__()
        self.labels = nn.Embedding(classes + 1, width)
        self.first = nn.Linear(3, width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, c_noise, cond=None):
        if self.training:
            self.calls += 1
        hidden = self.first(torch.cat([x, c_noise.to(x.dtype)[:, None]], dim=1))
        label = torch.full((len(x),), -1) if cond is None else cond
        return self.last(self.dropout(torch.tanh(hidden + self.labels(label + 1))))


def tiny_model(**options):
    torch.manual_seed(0)
    return NetworkDenoiser(TinyNet(**options), VP())


class TinyLoader:
    """Three labelled clusters; row j of the endless data is a function of j."""

    def __init__(self, batch_size=16, rank=0, world=1):
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def batch(self, step):
        share = self.batch_size // self.world
        streams = Streams.of(5, share, first=step * self.batch_size + self.rank * share)
        labels = streams.integers(3, (share,))
        x = 0.3 * streams.normal((share, 2)) + torch.stack([labels - 1.0, labels * 0.5], dim=1)
        return x, labels


SETTINGS = {
    "steps": 24,
    "batch": 16,
    "micro_batch": 6,
    "lr": 0.01,
    "warmup": 5,
    "schedule": "cosine",
    "ema": (5.0, 50.0),
    "ema_power": (0.1,),
    "cond_dropout": 0.2,
    "checkpoint_every": 4,
    "snapshot_every": 6,
    "log_every": 3,
    "seed": 3,
}


def settings(**changes):
    return TrainConfig(**(SETTINGS | changes))


def train(folder, *, model=None, objective=None, loader=None, on_sample=None, on_log=None, **changes):
    """A run, from where `folder` has come to."""
    return fit(
        model or tiny_model(),
        objective or Denoising(),
        loader or TinyLoader(changes.get("batch", SETTINGS["batch"])),
        settings(**changes),
        folder,
        on_sample=on_sample,
        on_log=on_log,
    )


def fingerprint(folder, step=None):
    """What must be equal for two runs to be the same: the hash of every tensor file, and the sums of the window."""
    state = load_checkpoint(folder, step).state
    return {name: facts["sha256"] for name, facts in state["files"].items()} | {"sums": state["sums"]}


def records(folder):
    """The lines of `metrics.jsonl` without what the clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "images_per_second", "eta_seconds"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


# A single tensor, for trajectories that are known in closed form.
class Point(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([float(value)], dtype=torch.float64))
