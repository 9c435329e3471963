"""Two trained runs, made once: images by class with dropout and labels, and points in the plane."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import undiffuse as ud
from recipes.tiny import overrides
from undiffuse.cli import app


@pytest.fixture(scope="session")
def image_run(tmp_path_factory) -> ud.Run:
    """A tiny class-conditional U-Net, trained far enough that labels and noise levels matter to it."""
    folder = tmp_path_factory.mktemp("runs") / "digits-20260101-000000"
    more = ["training.steps=12", "training.lr=0.02", "training.ema=[1]", "training.ema_ramp=10"]
    more.append("sampling.precision=fp32")  # for comparisons to rounding
    return ud.train(ud.load_recipe("digits", [*overrides("digits"), *more]), folder)


@pytest.fixture(scope="session")
def plane_run(tmp_path_factory) -> ud.Run:
    folder = tmp_path_factory.mktemp("runs") / "gaussians-20260101-000000"
    return ud.train(ud.load_recipe("gaussians", [*overrides("gaussians"), "training.steps=12"]), folder)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `undiffuse ...` inside an empty folder; the result has `exit_code`, `stdout`, `stderr`, `json()`."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object):
        result = CliRunner().invoke(app, [str(word) for word in words])
        result.json = lambda: json.loads(result.stdout)
        return result

    return call


@pytest.fixture
def process(tmp_path):
    """Runs `python -m undiffuse.cli ...` in a process of its own, or several under torchrun."""

    def start(*words: object, processes: int = 1, **options):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher = torchrun if processes > 1 else []
        line = [sys.executable, *launcher, "-m", "undiffuse.cli", *map(str, words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            line,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    return start


def npz(folder: Path):
    """The arrays of `samples.npz`."""
    import numpy as np

    with np.load(folder / "samples.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}
