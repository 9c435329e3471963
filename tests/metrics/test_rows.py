"""What every metric refuses, and distances by blocks against distances by differences."""

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    mmd,
    nearest_neighbour,
    precision_recall,
    sliced_wasserstein,
)
from undiffuse.metrics.rows import BLOCK, Rows, gram_rounding, pair, squared_distances

F64 = torch.float64
DISTANCES = {
    "frechet": frechet_distance,
    "kernel": kernel_distance,
    "mmd": mmd,
    "precision-recall": precision_recall,
    "density-coverage": density_coverage,
    "sliced": sliced_wasserstein,
    "nearest": lambda a, b: nearest_neighbour(a, b, b + 1.0),
}
every_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())


def points(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@every_distance
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_row(distance, bad):
    broken = points(BLOCK + 20, 4)
    broken[BLOCK + 7, 2] = bad
    with pytest.raises(ArgumentError, match=f"row {BLOCK + 7}"):
        distance(broken, points(30, 4, seed=1))
    with pytest.raises(ArgumentError, match=f"row {BLOCK + 7}"):
        distance(points(30, 4, seed=1), broken)


@every_distance
def test_empty_sets_are_refused(distance):
    with pytest.raises(ArgumentError, match="at least"):
        distance(torch.zeros(0, 4), points(30, 4))
    with pytest.raises(ArgumentError, match="at least"):
        distance(points(30, 4), torch.zeros(0, 4))
    with pytest.raises(ArgumentError, match="at least one value in a row"):
        distance(torch.zeros(30, 0), torch.zeros(30, 0))


@every_distance
def test_unlike_event_shapes_are_refused_also_where_their_sizes_agree(distance):
    with pytest.raises(ArgumentError, match="event shape"):
        distance(points(30, 5), points(30, 4))
    with pytest.raises(ArgumentError, match="event shape"):
        distance(points(30, 8, 8, 3), points(30, 3, 8, 8))


@every_distance
def test_bytes_are_refused_because_their_scale_is_another(distance):
    with pytest.raises(ArgumentError, match=r"uint8.*127\.5"):
        distance(torch.zeros(30, 4, dtype=torch.uint8), points(30, 4))


@every_distance
def test_images_and_their_flat_rows_are_the_same_points(distance):
    a, b = points(40, 2, 3, 4), points(50, 2, 3, 4, seed=1)
    assert str(distance(a, b)) == str(distance(a.flatten(1), b))


@every_distance
def test_arguments_are_left_as_they_were(distance):
    a, b = points(40, 3), points(50, 3, seed=1)
    a_before, b_before = a.clone(), b.clone()
    distance(a, b)
    assert torch.equal(a, a_before)
    assert torch.equal(b, b_before)


def test_squared_distances_stay_within_their_stated_rounding():
    a, b = pair(points(200, 300, dtype=F64) * 1e3 + 1e5, points(150, 300, dtype=F64, seed=1) + 1e5)
    x, y = a.block(slice(0, 200)), b.block(slice(0, 150))
    by_difference = (x[:, None] - y).square().sum(dim=2)
    error = (squared_distances(x, y) - by_difference).abs().max()
    assert 0 < error < gram_rounding(a, b)
    # A bound that is far too wide would make every ball too large.
    assert gram_rounding(a, b) < 1e-11 * by_difference.median()


def test_centring_keeps_distances_exact_under_a_common_offset():
    a, b = points(60, 5, dtype=F64), points(70, 5, dtype=F64, seed=1)
    offset = 2.0**20  # exact in float64, so that only the method could lose digits
    plain, moved = mmd(a, b, bandwidths=[1.0]), mmd(a + offset, b + offset, bandwidths=[1.0])
    assert moved == pytest.approx(plain, abs=1e-9)


def test_one_dimensional_arrays_are_points_on_a_line():
    rows = Rows(torch.tensor([1.0, 2.0, 4.0]), "samples")
    assert (rows.n, rows.d) == (3, 1)
    assert rows.mean().item() == pytest.approx(7 / 3, rel=1e-15)
