"""Runs to report on: real digits standing in for samples, a two-dimensional run, and one full of hostile text."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from undiffuse.report import Neighbours, ReportData

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&"
RECIPE = """name: digits
description: class-conditional digits
seed: 0
data:
  source: digits
  split: train
path:
  name: VP
  beta_min: 0.1
  beta_max: 20.0
model:
  net: {name: unet, channels: 64, blocks: 2}
  prediction: edm
objective:
  time: uniform
  weight: simple
training:
  steps: 830
  batch: 256
  lr: 0.001
  ema: [500, 2000]
sampling:
  solver: dpmpp-2m
  steps: 20
"""
PROTOCOL = {
    "n": 10_000, "reference": "digits", "split": "train", "reference_n": 1437, "reference_fingerprint": "9f31c0de77aa",
    "features": "pixels", "features_hash": "", "data_range": [-1.0, 1.0], "solver": "dpmpp-2m", "steps": 20, "nfe": 20,
    "grid": "karras", "guidance": None, "seeds": "0-9999", "ema": "0.1", "path": "VP", "model": None, "run": "digits",
    "step": 830,
}  # fmt: skip


def training_log(steps: int = 830, seed: int = 0) -> list[dict[str, Any]]:
    """A log shaped like a real one: a falling noisy loss, a histogram by half log-SNR with empty bins at the ends."""
    noise = torch.Generator().manual_seed(seed)
    edges = [-6 + 0.75 * i for i in range(17)]
    log = []
    for step in range(1, steps + 1):
        wobble = float(torch.randn((), generator=noise))
        level = 0.09 + 0.9 * math.exp(-step / 60)
        centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        means = [level * (0.05 + 1 / (1 + math.exp(-1.2 * (c - 0.4)))) for c in centres]
        log.append({
            "step": step, "loss": level * math.exp(0.12 * wobble),
            "grad_norm": 0.4 * level**0.5 * math.exp(0.3 * wobble),
            "lr": 1e-3 * min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / steps)),
            "images_per_second": 1750.0 + 30 * wobble, "seconds": 0.19 * step,
            "loss_by_noise": {"edges": edges, "mean": [None, *means[1:-1], None],
                              "count": [0, *[32 - abs(i - 7) for i in range(14)], 0]},
        })  # fmt: skip
    return log


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as images in [-1, 1], with labels."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(raw.target)


def vp_film(x_0: Tensor, frames: int) -> list[tuple[str, Tensor]]:
    """Interpolations from noise to x_0, as a sampler would show them."""
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    angles = [math.pi / 2 * (1 - i / (frames - 1)) for i in range(frames)]
    return [(f"t = {a / math.pi * 2:.2f}", math.cos(a) * x_0 + math.sin(a) * eps) for a in angles]


def digits_data() -> ReportData:
    """A labelled run on digits with every part of a report."""
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    distance = (x[200:212].flatten(1)[:, None] - x[300:].flatten(1)).norm(dim=2)
    return ReportData(
        title="digits",
        subtitle="Class-conditional 8 × 8 handwritten digits: the demo, trained in three minutes on two cores.",
        recipe_yaml=RECIPE,
        commands=[
            "undiffuse train digits seed=0 run=runs/digits-0",
            "undiffuse evaluate runs/digits-0 --n 10000 --steps 20 --metrics frechet,precision-recall",
            "undiffuse report runs/digits-0",
        ],
        samples=x[:200], labels=y[:200], class_names=[str(i) for i in range(10)], reference=x[900:930],
        film=vp_film(x[:4], 12), metrics_log=training_log(),
        results=[
            {"name": "frechet", "value": 0.0367, "std": 0.0012, "protocol": PROTOCOL,
             "references": {"resampled training": 0.016, "held-out": 0.14, "a Gaussian per class": 0.34}},
            {"name": "kernel", "value": 1.2e-4, "std": 3e-5, "protocol": PROTOCOL,
             "settings": {"subsets": 100, "subset_size": 1000, "seed": 0},
             "references": {"resampled training": -3e-6}},
            {"name": "precision", "value": 0.962, "protocol": PROTOCOL, "references": {"held-out": 0.947}},
            {"name": "recall", "value": 0.951, "protocol": PROTOCOL, "references": {"held-out": 0.96}},
            {"name": "class-accuracy", "value": 0.993, "settings": {"c": 10.0}, "protocol": {**PROTOCOL, "n": 1000},
             "warnings": ["n = 1,000 samples: compare only equal n"]},
        ],
        facts={"parameters": 1_312_449, "steps": 830, "seconds": 161.4, "images_per_second": 1316.5,
               "dataset": "digits, train", "n": 1437, "device": "cpu, 2 threads", "batch": 256},
        neighbours=Neighbours(x[200:212], x[300:][distance.argmin(1)], distance.amin(1),
                              {"median, samples": 2.11, "median, held-out images": 2.10}),
    )  # fmt: skip


def points_data() -> ReportData:
    """A labelled run on two moons."""
    from sklearn.datasets import make_moons

    x, y = make_moons(4000, noise=0.06, random_state=0)
    points, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return ReportData(
        title="moons", samples=points, labels=labels, class_names=["upper moon", "lower moon"], reference=points[::2],
        film=vp_film(points[:1500], 8), metrics_log=training_log(60), recipe_yaml="name: moons\n",
        results=[{"name": "sliced-wasserstein", "value": 0.021, "protocol": {"n": 4000, "split": "test"},
                  "references": {"resampled": 0.018}}],
        commands=["undiffuse train moons"], facts={"parameters": 50_000, "steps": 60, "seconds": 4.2},
    )  # fmt: skip


def hostile_data() -> ReportData:
    """Every string a user can give is an attack; a string too long to fit a phone besides."""
    x = torch.linspace(-1, 1, 3 * 16).reshape(3, 1, 4, 4)
    return ReportData(
        title=HOSTILE + "x" * 200, subtitle=HOSTILE, recipe_yaml=f"name: {HOSTILE}\n{HOSTILE}: 1\n# {'y' * 300}\n",
        commands=[HOSTILE, "undiffuse train " + "z" * 300], samples=x, labels=torch.tensor([0, 1, 1]),
        class_names=[HOSTILE, HOSTILE], film=[(HOSTILE, x), (HOSTILE, x)],
        results=[{"name": HOSTILE, "label": HOSTILE, "value": 1.0, "better": HOSTILE, "references": {HOSTILE: 2.0},
                  "protocol": {HOSTILE: HOSTILE, "list": [HOSTILE], "n": HOSTILE}}],
        facts={HOSTILE: HOSTILE, "device": HOSTILE, "seconds": HOSTILE, "steps": HOSTILE},
        neighbours=Neighbours(x, x, torch.zeros(3), {HOSTILE: 1.0}),
        metrics_log=[{"step": HOSTILE, "loss": HOSTILE}, {"step": 1, "loss": 1.0, "lr": HOSTILE, "seconds": HOSTILE}],
    )  # fmt: skip


@pytest.fixture(scope="session")
def digits_run() -> ReportData:
    return digits_data()


@pytest.fixture(scope="session")
def points_run() -> ReportData:
    return points_data()


@pytest.fixture(scope="session")
def hostile_run() -> ReportData:
    return hostile_data()
