"""The energy distance against closed forms, and its test against the rate of alarms that it states."""

from __future__ import annotations

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import normal_quantile
from undiffuse.metrics.energy_distance import energy_distance, energy_test

F64 = torch.float64


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mean_distance(mean, std):
    """`E|Z|` of a normal."""
    return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2)) + mean * math.erf(mean / (std * 2**0.5))


def test_by_hand():
    x, y = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[2.0], [3.0]])
    between = (2 + 3 + 1 + 2 + 2 + 1) / 6
    assert energy_distance(x, y) == pytest.approx(2 * between - (1 + 4 + 3) / 3 - 1)


def test_of_normals():
    # N(0, 1) and N(0.8, 1.5^2) by their quantiles: an error of order 1 / n.
    x = normal_quantile((torch.arange(2000, dtype=F64) + 0.5) / 2000)[:, None]
    y = 0.8 + 1.5 * x
    expected = 2 * mean_distance(0.8, math.hypot(1, 1.5)) - mean_distance(0, 2**0.5) - mean_distance(0, 1.5 * 2**0.5)
    assert energy_distance(x, y) == pytest.approx(expected, abs=0.002)


def test_it_does_not_see_a_common_shift_and_scales_with_the_data():
    x, y = numbers(50, 2, 3), 0.3 + numbers(60, 2, 3, seed=1)
    assert energy_distance(3 * x + 1e4, 3 * y + 1e4) == pytest.approx(3 * energy_distance(x, y), rel=1e-6)


def test_alarms_come_at_the_stated_rate():
    """Of 200 pairs of equal laws 20 are expected above the 90 % quantile; standard deviation 4.2."""
    alarms, ranks = 0, []
    for seed in range(200):
        result = energy_test(
            numbers(40, 2, seed=2 * seed), numbers(30, 2, seed=2 * seed + 1), level=0.9, permutations=100
        )
        alarms += result.distance > result.quantile
        ranks.append(result.p_value)
    assert 8 <= alarms <= 33
    assert sum(ranks) / 200 == pytest.approx(0.5, abs=0.08)


def test_a_shift_is_found():
    result = energy_test(numbers(400, 2), 0.25 + numbers(400, 2, seed=1))
    assert result.distance > result.quantile
    assert result.p_value == pytest.approx(1 / 501)


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": 0.99, "permutations": 50}])
def test_a_quantile_that_cannot_be_told_is_refused(options):
    with pytest.raises(ArgumentError, match="permutations"):
        energy_test(numbers(10, 1), numbers(10, 1), **options)
