"""Several processes are one run: same batch, same losses, same end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toys import fingerprint, records

from undiffuse.training import list_checkpoints, load_checkpoint

# Seconds after which a launch has hung, on a machine that is busy with other things too.
LIMIT = 900
WORKER = Path(__file__).with_name("process_worker.py")


def launch(folder, *scenarios, processes=2):
    """Run scenarios under the launcher (one process: without it); returns what each process told of each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(WORKER), str(folder), *scenarios]
    # gloo looks its own host name up unless it is told which interface to use.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = launcher.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # which it passes on; killed, it would leave its processes behind
        output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]
        for name in scenarios
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, launch(folder, "plain", "chains", processes=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(folder, "plain", "chains", "stop", "broken", "unused", "full_disk", "slow_samples")


def test_two_processes_have_the_losses_of_one(one, two):
    single, double = records(one[0] / "plain"), records(two[0] / "plain")
    assert [r["step"] for r in double] == list(range(1, 21))
    for a, b in zip(single, double, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss_by_noise"]["count"] == b["loss_by_noise"]["count"]
    # The comparison has something to compare: the loss moves by far more than the tolerance.
    assert abs(single[0]["loss"] - single[-1]["loss"]) > 1e-2


def test_processes_hold_the_same_weights_and_averages(two):
    first, second = two[1]["plain"]
    assert first["step"] == second["step"] == 20
    assert first["weights"] == second["weights"]


def test_checkpoints_of_two_processes_are_those_of_one(one, two):
    single, double = load_checkpoint(one[0] / "plain"), load_checkpoint(two[0] / "plain")
    for name in ("model", "ema", "optimizer"):
        a, b = single.tensors(name), double.tensors(name)
        assert a.keys() == b.keys()
        for key, value in a.items():
            if key != "net.calls":  # counts calls of one process: 6 micro-batches of 16 rows, or 3 of 8
                assert (value - b[key]).abs().max() < 1e-5, key


def test_processes_share_one_replay_buffer(one, two):
    """The chains of two processes are those of one, row by row, and so are the figures."""
    single, double = (load_checkpoint(place[0] / "chains").tensors("objective") for place in (one, two))
    assert int(single["start.age"].max()) > 1
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)
    last = [records(place[0] / "chains")[-1] for place in (one, two)]
    assert last[0]["energy_gap"] == pytest.approx(last[1]["energy_gap"], abs=1e-5)
    assert two[1]["chains"][0]["weights"] == two[1]["chains"][1]["weights"]


def test_one_process_asked_to_stop_stops_all_and_resuming_is_exact(two):
    told = two[1]["stop"]
    assert [(t["first"]["step"], t["first"]["stopped"]) for t in told] == [(13, True)] * 2
    assert [(t["second"]["step"], t["second"]["stopped"]) for t in told] == [(20, False)] * 2
    assert fingerprint(two[0] / "stop") == fingerprint(two[0] / "plain")
    assert told[0]["second"]["weights"] == two[1]["plain"][1]["weights"]


def test_non_finite_loss_in_one_process_stops_all(two):
    first, second = two[1]["broken"]
    assert first["error"] == second["error"] == "TrainingError"
    assert "step 5 is not finite in another process" in first["message"]
    assert "the loss of step 5 is not finite for 8 of 8 samples, at t = " in second["message"]
    assert (two[0] / "broken" / "failed-step-0000005-process-1.safetensors").exists()
    report = json.loads((two[0] / "broken" / "failed-step-0000005-process-1.json").read_text())
    assert report["first_row"] == 8
    assert len(report["t"]) == 8


def test_unused_parameter_is_named(two):
    for told in two[1]["unused"]:
        assert told["error"] == "ArgumentError"
        assert "model.net.spare.weight, model.net.spare.bias" in told["message"]


def test_failure_of_the_first_process_is_everyones(two):
    first, second = two[1]["full_disk"]
    assert first["error"] == "OSError"
    assert second["error"] == "RunError"
    assert "process 0 failed during the checkpoint of step 10: " in second["message"]
    assert "No space left on device" in second["message"]


def test_waiting_has_a_limit_and_a_name(two):
    told = two[1]["slow_samples"][1]
    assert told["error"] == "RunError"
    assert "process 1 of 2 lost the others while waiting for: the samples of step 5 (limit 6 s" in told["message"]
    assert list_checkpoints(two[0] / "slow_samples") == []
