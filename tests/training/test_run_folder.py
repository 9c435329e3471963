"""One run per folder, the same recipe on resuming, and what is written beside `metrics.jsonl`."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from training_toys import TinyLoader, records, train

from undiffuse.core.errors import ArgumentError, MissingExtraError, RunError
from undiffuse.training import locked
from undiffuse.training.records import EDGES, Meter, means, scalars
from undiffuse.training.run_folder import flat, plain, refuse_changes


def test_lock_names_the_process(tmp_path):
    script = (
        "import sys; from undiffuse.training import locked\nwith locked(__import__('pathlib').Path(sys.argv[1])):\n"
    )
    script += "  print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"{tmp_path} is in use by process {holder.pid}"):
            train(tmp_path, steps=1)
        assert not (tmp_path / "metrics.jsonl").exists()
    finally:
        holder.kill()
        holder.communicate()
    train(tmp_path, steps=1)  # the lock went with the process


def test_lock_is_let_go(tmp_path):
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(RunError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_changes_are_named():
    old = {"name": "a", "training": {"steps": 5, "lr": 0.1}, "model": {"net": {"width": [1, 2]}}, "data": {}}
    new = {"name": "b", "training": {"steps": 9, "lr": 0.1}, "model": {"net": {"width": [1, 2]}}, "data": {}}
    refuse_changes(old, new, Path("run"))
    new = {"training": {"lr": 0.2}, "model": {"net": {"width": [1, 3], "depth": 2}}, "data": {}}
    with pytest.raises(RunError) as caught:
        refuse_changes(old, new, Path("run"))
    message = str(caught.value)
    assert (
        "model.net.depth was absent, is 2; model.net.width was [1, 2], is [1, 3]; training.lr was 0.1, is 0.2"
        in message
    )
    assert "name" not in message.split(":")[1]
    # Only whole keys are free: neither a longer nor a shorter name slips through.
    for key in ("training.steps_more", "training.step", "name.x"):
        section, leaf = key.split(".")
        with pytest.raises(RunError, match=key):
            refuse_changes({}, {section: {leaf: 1}}, Path("run"))


def test_fingerprint_is_json():
    assert plain({"a": (1, 2), "b": {"c": None}}) == {"a": [1, 2], "b": {"c": None}}
    assert flat({"a": {"b": {"c": 1}, "d": {}}}) == {"a.b.c": 1, "a.d": {}}
    for bad in (object(), float("nan")):
        with pytest.raises(ArgumentError, match="fingerprint"):
            plain({"a": bad})


def test_loss_by_noise_level():
    """Each sample in its bin of half log-SNR, those beyond in the outermost."""
    meter = Meter(torch.device("cpu"))
    levels = torch.tensor([-100.0, -7.5, -0.5, 0.0, 0.5, 7.99, 8.0, float("inf")])
    meter.add(torch.arange(8.0), levels, torch.tensor(2.0))
    meter.add(torch.arange(8.0), levels, torch.tensor(4.0))
    record = means(meter.sums)
    assert record["loss"] == 3.5
    assert record["grad_norm"] == 3.0
    table = record["loss_by_noise"]
    assert table["edges"] == list(EDGES) == list(range(-8, 9))
    filled = {low: (m, n) for low, m, n in zip(table["edges"], table["mean"], table["count"]) if n}
    assert filled == {-8.0: (0.5, 4), -1.0: (2.0, 2), 0.0: (3.5, 4), 7.0: (6.0, 6)}
    assert scalars({"step": 3, **record})["loss_by_noise/-0.5"] == 2.0
    meter.reset()
    meter.add(torch.ones(3), None, torch.tensor(1.0))
    assert means(meter.sums) == {"loss": 1.0, "grad_norm": 1.0}


def test_tensorboard(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class Fails(TinyLoader):
        def batch(self, step):
            if step == 7:
                raise KeyError
            return super().batch(step)

    with pytest.raises(KeyError):
        train(tmp_path, loader=Fails(), trackers=("tensorboard",))
    train(tmp_path, trackers=("tensorboard",))
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = [(e.step, e.value) for e in events.Scalars("loss")]
    assert [step for step, _ in written] == list(range(3, 25, 3))
    assert [value for _, value in written] == pytest.approx([r["loss"] for r in records(tmp_path)], rel=1e-6)


def test_wandb(tmp_path, monkeypatch):
    """A stand-in for the package: what it is told."""
    told = []

    class Run:
        def log(self, values, step):
            told.append((step, values["loss"]))

        def finish(self):
            told.append("finished")

    fake = ModuleType("wandb")
    fake.init = lambda **options: told.append((options["id"], options["resume"])) or Run()  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tmp_path / "a", trackers=("wandb",), steps=6)
    train(tmp_path / "a", trackers=("wandb",), steps=9)
    assert told[1:3] == [(r["step"], r["loss"]) for r in records(tmp_path / "a")[:2]]
    assert told[0] == told[4] == (told[0][0], "allow")
    assert told[-1] == "finished"
    train(tmp_path / "b" / "a", trackers=("wandb",), steps=1)
    assert told[-3][0] != told[0][0]


def test_absent_tracker_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"undiffuse\[wandb\]"):
        train(tmp_path, trackers=("wandb",))
