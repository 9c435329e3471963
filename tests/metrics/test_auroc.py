"""The area under the ROC, against counting all pairs."""

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics.auroc import auroc


def by_pairs(inside, outside):
    a, b = inside[:, None].double(), outside[None].double()
    return float(((a < b).double() + 0.5 * (a == b)).mean())


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (40, 60)])
def test_equals_the_count_of_all_pairs(levels, sizes):
    rng = torch.Generator().manual_seed(levels)
    inside = torch.randint(levels, sizes[:1], generator=rng).float()
    outside = torch.randint(levels, sizes[1:], generator=rng).float() + levels // 5
    assert auroc(inside, outside) == pytest.approx(by_pairs(inside, outside), rel=1e-14)


def test_ends_and_symmetry():
    low, high = torch.arange(5.0), torch.arange(5.0) + 10
    assert auroc(low, high) == 1.0
    assert auroc(high, low) == 0.0
    assert auroc(low, low) == 0.5
    a, b = torch.randn(31, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, float("inf"), -0.2])
    assert auroc(a, b) + auroc(b, a) == pytest.approx(1.0, rel=1e-14)


def test_types_are_not_rounded():
    """In float32 the two would tie."""
    assert auroc(torch.tensor([1.0]), torch.tensor([1.0 + 1e-12], dtype=torch.float64)) == 1.0


def test_two_gaussians():
    """P(a < b) for b - a ~ N(d, 2) is Phi(d / sqrt 2); standard error below 0.0021, 3.3 of them (false alarm 0.1 %)."""
    rng, d = torch.Generator().manual_seed(1), 1.5
    got = auroc(torch.randn(30_000, generator=rng), d + torch.randn(30_000, generator=rng))
    assert got == pytest.approx(float(torch.special.ndtr(torch.tensor(d / 2**0.5))), abs=0.007)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([float("nan")]), torch.zeros(2, 2)])
def test_what_cannot_be_ranked(bad):
    with pytest.raises(ArgumentError, match="outside"):
        auroc(torch.zeros(3), bad)
