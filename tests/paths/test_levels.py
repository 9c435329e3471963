"""The choice of noise levels: published numbers, closed forms, bounded memory, and what is refused."""

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.paths import Tabulated
from undiffuse.paths.levels import (
    check_levels,
    count_levels,
    geometric_levels,
    largest_distance,
    level_ratio,
    levels_from_data,
    overlap,
)

F64 = torch.float64


def test_geometric_levels_have_one_ratio_and_exact_ends():
    levels = geometric_levels(0.01, 50.0, 232)
    assert levels.dtype == F64
    assert (len(levels), float(levels[0]), float(levels[-1])) == (232, 0.01, 50.0)
    assert torch.allclose(levels[1:] / levels[:-1], torch.full((231,), 5000 ** (1 / 231), dtype=F64), rtol=1e-12)
    # They are the levels of the chain: level i at t = i / n.
    path, t = Tabulated.from_sigmas(levels), torch.arange(1, 233, dtype=F64) / 232
    assert torch.allclose(path.sigma(t), levels, rtol=1e-12)


@pytest.mark.parametrize(
    ("largest", "dim", "levels"),
    [
        (50, 3 * 32**2, 232),  # CIFAR-10
        (90, 3 * 64**2, 500),  # CelebA
        (140, 3 * 96**2, 788),  # LSUN church
        (190, 3 * 128**2, 1086),  # LSUN bedroom
        (348, 3 * 256**2, 2311),  # FFHQ
    ],
)
def test_the_overlap_rule_gives_the_published_counts(largest, dim, levels):
    # Song and Ermon 2020, their settings; sigma_1 = 0.01 in all. 1 % of log gamma is 2 to 23 levels.
    assert count_levels(0.01, largest, dim) == levels


@pytest.mark.parametrize("dim", [64, 784, 3072])
@pytest.mark.parametrize("wanted", [0.3, 0.5])
def test_the_ratio_has_the_overlap_wanted_of_the_radii(dim, wanted):
    ratio = level_ratio(dim, wanted)
    assert overlap(ratio, dim) == pytest.approx(wanted, abs=1e-10)
    assert overlap(1.0, dim) == pytest.approx(0.997300203936740, abs=1e-9)  # three standard deviations either side
    # The radius of N(0, I) in D dimensions is nearly N(sqrt(D), 1/2): the share of the inner radii, drawn from that,
    # that fall within three standard deviations of the outer ones. 5 standard errors: a false alarm in 10^6 runs.
    n = 400_000
    radius = math.sqrt(dim) + math.sqrt(0.5) * torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(dim))
    inside = ((radius - ratio * math.sqrt(dim)).abs() < 3 * ratio * math.sqrt(0.5)).double().mean()
    assert float(inside) == pytest.approx(wanted, abs=5 * 0.5 / n**0.5)


def test_the_radius_of_real_noise_overlaps_so():
    # Not from the normal approximation: 200,000 vectors of N(0, I), D = 64. Its error is of order 1 / sqrt(D).
    ratio = level_ratio(64, 0.5)
    radius = torch.randn(200_000, 64, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    inside = ((radius - ratio * 8).abs() < 3 * ratio * math.sqrt(0.5)).double().mean()
    assert float(inside) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_largest_distance_is_that_of_all_pairs(block):
    x = torch.randn(131, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
    flat = x.flatten(1)
    pairs = (flat[:, None] - flat[None]).square().sum(-1).sqrt()
    assert largest_distance(x, block) == pytest.approx(float(pairs.max()), rel=1e-12)
    # Whichever blocks the farthest pair lies in.
    i, j = divmod(int(pairs.argmax()), len(x))
    order = [k for k in range(131) if k not in (i, j)]
    for place in ([i, *order, j], [i, j, *order], [*order, j, i]):
        assert largest_distance(x[place], block) == pytest.approx(float(pairs.max()), rel=1e-12)
    assert largest_distance(x.half(), block) == pytest.approx(float(pairs.max()), rel=1e-3)


def test_distances_are_taken_block_by_block(monkeypatch):
    sizes, plain = [], torch.cdist

    def watched(a, b):
        sizes.append((len(a), len(b)))
        return plain(a, b)

    monkeypatch.setattr(torch, "cdist", watched)
    largest_distance(torch.arange(100.0)[:, None], block=30)
    assert max(max(pair) for pair in sizes) == 30
    assert len(sizes) == 4 * 5 // 2  # each pair of blocks once


def test_levels_from_data_span_the_data():
    # Corners of a cube of side 2 in 12 dimensions: the farthest are 2 sqrt(12) apart.
    x = torch.randint(0, 2, (300, 3, 2, 2), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    x[0], x[1] = 1, -1
    levels = levels_from_data(x, 0.02)
    assert float(levels[0]) == 0.02
    assert float(levels[-1]) == pytest.approx(2 * math.sqrt(12))
    # As many as overlap no more than wanted: one level more would.
    assert float(levels[1] / levels[0]) >= level_ratio(12)
    assert (float(levels[-1]) / 0.02) ** (1 / len(levels)) < level_ratio(12)
    assert Tabulated.from_sigmas(levels).prior_std == pytest.approx(2 * math.sqrt(12))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometric_levels(1.0, 0.5, 4), "levels from 1 to 0.5: expected 0 < smallest < largest"),
        (lambda: geometric_levels(0.0, 0.5, 4), "levels from 0 to 0.5"),
        (lambda: geometric_levels(0.1, math.inf, 4), "finite"),
        (lambda: geometric_levels(0.1, 0.5, 1), "n is 1"),
        (lambda: check_levels(torch.tensor([0.1, 0.5, 0.4, 1.0])), "level 3 is 0.4 after 0.5$"),
        (lambda: check_levels(torch.tensor([0.1, 0.1])), "level 2 is 0.1 after 0.1"),
        (lambda: check_levels(torch.tensor([1.0, 0.5, 0.1])), r"level 2 is 0.5 after 1; .* levels.flip\(0\)"),
        (lambda: check_levels(torch.tensor([0.0, 0.5])), "from 0 to 0.5: expected finite numbers above 0"),
        (lambda: check_levels(torch.tensor([0.5])), r"shape \(1,\)"),
        (lambda: largest_distance(torch.zeros(0, 3)), r"shape \(0, 3\).*at least 2 rows"),
        (lambda: largest_distance(torch.zeros(1, 3)), "at least 2 rows"),
        (lambda: largest_distance(torch.zeros(5, 3)), "all 5 rows of the data are equal"),
        (lambda: largest_distance(torch.tensor([[0.0], [math.nan]])), "infinite or NaN"),
        (lambda: largest_distance(torch.zeros(5, 3, dtype=torch.uint8)), "uint8: expected floats"),
        (lambda: largest_distance(torch.randn(5, 3), block=0), "block is 0"),
        (lambda: levels_from_data(torch.eye(8), 2.0), "levels from 2 to 1.41421"),
        (lambda: levels_from_data(torch.eye(4)), r"says nothing in 4 dimensions.*geometric_levels"),
        (lambda: level_ratio(64, 1.5), "overlap is 1.5"),
    ],
)
def test_what_gives_no_levels_is_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
