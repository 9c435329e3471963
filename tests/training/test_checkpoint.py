"""Checkpoints that are whole or refused."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_toys import fingerprint, tiny_model, train

from undiffuse.core.errors import CheckpointError, RunError
from undiffuse.training import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from undiffuse.training import checkpoint as checkpoint_module
from undiffuse.training.state import restore_module, restore_optimizers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder, steps=8)
    return folder


@pytest.fixture
def run(tmp_path, trained):
    """A run with checkpoints of steps 4 and 8, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


OFFER = r"the newest whole checkpoint is step 4: use step=4"


def newest(run):
    return run / "checkpoints" / "step-0000008"


def refused(run, *words):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(run)
    assert str(caught.value).endswith(OFFER)
    for word in words:
        assert word in str(caught.value)
    assert load_checkpoint(run, 4).step == 4


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_every_truncation_is_noticed(run, name):
    path = newest(run) / name
    whole = path.read_bytes()
    for size in {0, 1, 8, 9, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:size])
        refused(run, str(path))
    path.unlink()
    refused(run, str(path), "is missing")


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_every_flipped_bit_is_noticed(run, name):
    path = newest(run) / name
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        place = int(torch.randint(len(whole), (), generator=generator))
        bit = int(torch.randint(8, (), generator=generator))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        path.write_bytes(flipped)
        if name == "state.json" and json_equal(flipped, whole):
            continue
        refused(run, str(path))


def json_equal(a, b):
    """White space may change: it says nothing."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def payloads(target, path):
    """A bare pickle, and one in an archive as torch.save makes it."""
    path.write_bytes(pickle.dumps(Payload(target)))
    yield
    torch.save(Payload(target), path)
    yield


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_pickle_in_the_place_of_a_file_does_not_run(run, tmp_path, name):
    for _ in payloads(tmp_path / "executed", newest(run) / name):
        refused(run, name)
        with pytest.warns(UserWarning, match=name):
            train(run, steps=8)
        assert not (tmp_path / "executed").exists()
        shutil.rmtree(run)
        train(run, steps=8)


def test_pickle_that_the_seal_vouches_for_does_not_run(run, tmp_path):
    """Whoever writes the file may write its hash as well: what protects is that no pickle is ever opened."""
    for _ in payloads(tmp_path / "executed", newest(run) / "model.safetensors"):
        reseal(newest(run))
        refused(run, "model.safetensors", "refused, since opening it could run code")
        assert not (tmp_path / "executed").exists()


def reseal(folder):
    state = json.loads((folder / "state.json").read_text())
    del state["seal"]
    for name, facts in state["files"].items():
        facts["sha256"] = checkpoint_module.digest(folder / name)
        facts["bytes"] = (folder / name).stat().st_size
    (folder / "state.json").write_bytes(checkpoint_module._sealed(state))


@pytest.mark.parametrize("name", ["extra.pt", "model.pkl", "code.py", "pytorch_model.bin"])
def test_unlisted_file_that_could_run_is_refused(run, name):
    (newest(run) / name).write_bytes(b"anything")
    refused(run, name, "can run code")


def test_renamed_directory_is_refused(run):
    newest(run).rename(newest(run).with_name("step-0000009"))
    refused(run, "step-0000009 holds step 8")


def test_file_outside_is_refused(run):
    state = json.loads((newest(run) / "state.json").read_text())
    del state["seal"]
    state["files"]["../step-0000004/model.safetensors"] = state["files"].pop("model.safetensors")
    (newest(run) / "state.json").write_bytes(checkpoint_module._sealed(state))
    refused(run, "names '../step-0000004/model.safetensors'")


def test_absent(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 5: it has \[4, 8\]"):
        load_checkpoint(run, 5)
    with pytest.raises(CheckpointError, match="has no checkpoint: train first"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no average 'ema': it has half-life-5, half-life-50, power-0\.1"):
        load_checkpoint(run).average("ema")


def test_weights_with_an_average_are_a_whole_state(run):
    checkpoint = load_checkpoint(run)
    model = tiny_model()
    model.load_state_dict(checkpoint.weights("power-0.1"))
    assert torch.equal(model.net.last.bias, checkpoint.average("power-0.1")["net.last.bias"])
    assert not torch.equal(model.net.last.bias, checkpoint.weights()["net.last.bias"])
    assert int(model.net.calls) == 8 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("net.last.bias"), "has no tensor 'net.last.bias'"),
        (lambda t: t.update({"net.more": torch.zeros(1)}), "has a tensor 'net.more' that the model has not"),
        (lambda t: t.update({"net.last.bias": torch.zeros(3)}), r"'net.last.bias' of shape \(3,\)"),
        (lambda t: t.update({"net.last.bias": torch.zeros(2).double()}), "torch.float64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(run, change, message):
    path = newest(run) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    reseal(newest(run))
    with pytest.raises(CheckpointError, match=f"model.safetensors has .*{message}|model.safetensors {message}"):
        train(run, steps=9)


def test_optimizer_state_that_does_not_fit_is_named():
    model = tiny_model()
    names = {p: n for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters())
    for key, shape in (("net.nothing/exp_avg", (2,)), ("net.last.bias/exp_avg", (3,))):
        with pytest.raises(CheckpointError, match="fits no parameter"):
            restore_optimizers([optimizer], names, {key: torch.zeros(shape)}, Path("optimizer.safetensors"))


def test_failed_restore_says_so_before_anything_is_copied():
    model = tiny_model()
    before = model.net.first.weight.clone()
    with pytest.raises(CheckpointError):
        restore_module(model, {"net.first.weight": torch.ones_like(before)}, Path("model.safetensors"))
    assert torch.equal(model.net.first.weight, before)


@pytest.mark.parametrize("call", range(12))
def test_full_disk_leaves_the_old_checkpoint(run, monkeypatch, call):
    """The n-th sync or rename of the save fails, for every n."""
    before = fingerprint(run, 8)
    count = 0

    def failing(function):
        def wrapped(*args, **options):
            nonlocal count
            count += 1
            if count - 1 == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **options)

        return wrapped

    checkpoint = load_checkpoint(run)
    tensors = {name: checkpoint.tensors(name) for name in ("model", "ema", "optimizer")}
    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "rename", failing(os.rename))
    monkeypatch.setattr(checkpoint_module, "write_tensors", failing(checkpoint_module.write_tensors))
    state = {k: v for k, v in checkpoint.state.items() if k not in ("step", "files", "format", "version")}
    try:
        save_checkpoint(run, 12, tensors, state, keep=9)
        failed = False
    except RunError as error:
        failed = True
        assert "step-0000012: No space left on device. The checkpoint of step 8 is intact" in str(error)  # noqa: PT017
    monkeypatch.undo()
    # write + sync for each of three files, state.json, the directory, the rename, the parent: ten calls
    assert failed == (call < 10)
    assert fingerprint(run, 8) == before
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert set(list_checkpoints(run)) - {12} == {4, 8}
    for step in list_checkpoints(run):
        assert load_checkpoint(run, step).step == step


FULL = """
import resource, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {toys!r})
from training_toys import train
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
train({run!r}, log_every=100)
"""


def test_real_failed_write(run):
    """The kernel refuses to write beyond 2,000 bytes: not a simulation of an error but an error."""
    before = fingerprint(run)
    script = FULL.format(toys=str(Path(__file__).parent), run=str(run))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0
    assert "RunError: could not write" in done.stderr, done.stderr
    assert "The checkpoint of step 8 is intact: free some space" in done.stderr
    assert fingerprint(run) == before
    assert not list(run.rglob(".tmp-*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000
    train(run, steps=9)
    assert list_checkpoints(run)[-1] == 9


def test_rubbish_is_cleaned_at_the_start(run):
    for name in ("checkpoints/.tmp-step-0000012", "snapshots/.tmp-old-step-0000006"):
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").write_bytes(b"half")
    (run / ".tmp-metrics.jsonl").write_bytes(b"half")
    assert list_checkpoints(run) == [4, 8]
    train(run, steps=8)
    assert not list(run.rglob(".tmp-*"))


def test_views_and_tensors_of_a_device_are_saved_plain(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base[:, :2], "b": base[1:], "c": base.t(), "d": base}
    save_checkpoint(tmp_path, 1, {"model": tensors}, {}, keep=1)
    loaded = load_checkpoint(tmp_path).tensors("model")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert isinstance(load_checkpoint(tmp_path), Checkpoint)
    assert (tmp_path / "checkpoints/step-0000001/model.safetensors").stat().st_size < 1000
