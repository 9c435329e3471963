"""The benchmarks of score matching, run for a short while: training finds the score, SURE needs no clean picture."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


def benchmark(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def test_an_objective_trained_shortly_finds_the_ring_s_score():
    """1,500 steps of the variance-reduced sliced objective, about 15 s: an error of a few per cent, from 100 %."""
    ring = benchmark("score_matching")
    options = ring.arguments(["--steps", "1500", "--quiet"])
    assert ring.train("sliced-vr", ring.cases()["sliced-vr"], options) < 0.05


def test_sure_reaches_the_error_of_clean_targets():
    """Noisy digits only, the noise anew for every batch: within 5 % of the mean squared error of clean targets."""
    digits = benchmark("sure")
    found = digits.compare(digits.arguments(["--noise", "anew"]))
    assert found["SURE"] < 1.05 * found["clean targets"]
