"""SIGKILL at any moment loses nothing that was saved, and resuming ends in the same bits."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def kill(folder, *arguments, timeout):
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_server.py"), str(folder), *arguments],
        capture_output=True, text=True, timeout=timeout, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_random_moments(tmp_path):
    trials = kill(tmp_path, "moments", "6", timeout=900)
    assert len(trials) == 6
    assert all(t["same"] and t["left"] == 0 for t in trials), trials
    assert len({t["at"] for t in trials}) >= 3


@pytest.mark.slow
def test_fifty_random_moments(tmp_path):
    trials = kill(tmp_path, "moments", "50", timeout=1800)
    assert len(trials) == 50
    assert all(t["same"] and t["left"] == 0 for t in trials), trials
    # The moments are spread over the run, and some fall into a save.
    assert len({t["at"] for t in trials}) >= 8
    assert any(t["rubbish"] for t in trials)


@pytest.mark.slow
def test_every_call_that_changes_the_disk(tmp_path):
    """Before and after each sync, rename, removal and write of tensors of the whole run."""
    trials = kill(tmp_path, "calls", timeout=3600)
    assert Counter(t["ended"] for t in trials) == {signal.SIGKILL: len(trials)}
    assert len(trials) > 120
    assert [t for t in trials if not t["same"] or t["left"]] == []
    assert sum(t["rubbish"] > 0 for t in trials) > 40
