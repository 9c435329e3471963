"""Nearest neighbours on configurations worked out by hand, and against all distances at once."""

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics import density_coverage, nearest, nearest_neighbour, precision_recall
from undiffuse.metrics.neighbours import squared_radii
from undiffuse.metrics.rows import BLOCK, Rows

F64 = torch.float64

# On a line. k = 1: radii of the reference 1, 1, 2, 4, so the balls [-1, 1], [0, 2], [1, 5], [3, 11]; radii of the
# samples 0.5, 0.5, 0.5, 0.5, 6, so the balls [-1.5, -0.5], [-1, 0], [5, 6], [5.5, 6.5], [6, 18].
# k = 2: reference balls [-3, 3], [-1, 3], [0, 6], [1, 13].
REFERENCE = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=F64)
SAMPLES = torch.tensor([-1.0, -0.5, 5.5, 6.0, 12.0], dtype=F64)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def as_images(x):
    """The line laid through a space of 3 x 4 x 5 images, far from the origin: distances stay, up to rounding."""
    direction = normals(1, 3, 4, 5, seed=9)
    return 100.0 + x.reshape(-1, 1, 1, 1) * direction / direction.norm()


@pytest.mark.parametrize("place", [lambda x: x[:, None], as_images], ids=["line", "images"])
def test_by_hand(place):
    samples, reference = place(SAMPLES), place(REFERENCE)
    assert precision_recall(samples, reference, k=1) == (4 / 5, 2 / 4)
    assert density_coverage(samples, reference, k=1) == (4 / 5, 2 / 4)
    # k = 2: the samples lie in 2, 2, 2, 2 and 1 balls; one of them (6) on the rim of one.
    assert precision_recall(samples, reference, k=2).precision == 1.0
    assert density_coverage(samples, reference, k=2) == (9 / (2 * 5), 1.0)


def test_the_other_way_round_exchanges_precision_and_recall():
    x, y = normals(80, 2), normals(60, 2, seed=1) * 1.5
    assert precision_recall(x, y) == precision_recall(y, x)[::-1]
    assert precision_recall(x, y).precision > precision_recall(x, y).recall


def test_copies_of_the_reference_are_within_it_and_cover_it():
    x = normals(200, 3)
    assert precision_recall(x, x.clone()) == (1.0, 1.0)
    # Each closed ball holds its centre and its k nearest: density (k + 1) / k, whichever way the rim rounds.
    density, coverage = density_coverage(x, x.clone(), k=5)
    assert density == pytest.approx(6 / 5, rel=1e-12)
    assert coverage == 1.0


def test_far_away_samples_score_nothing():
    x = normals(50, 3)
    assert precision_recall(x + 1000, x) == (0.0, 0.0)
    assert density_coverage(x + 1000, x) == (0.0, 0.0)


def test_equal_laws_have_mean_density_one_and_the_known_coverage():
    """Naeem et al. 2020, section 3.2. Over 300 pairs, 4 standard errors: false-alarm rate 1e-4."""
    n, m, k, runs = 90, 70, 5, 300
    found = torch.tensor(
        [density_coverage(normals(n, 2, seed=2 * s), normals(m, 2, seed=2 * s + 1), k=k) for s in range(runs)],
        dtype=F64,
    )
    missed = math.prod((m - j) / (n + m - j) for j in range(1, k + 1))
    error = found.std(dim=0) / math.sqrt(runs)
    assert (error < 0.005).all()
    assert abs(float(found[:, 0].mean()) - 1.0) < 4 * error[0]
    assert abs(float(found[:, 1].mean()) - (1 - missed)) < 4 * error[1]


def test_blocks_see_what_all_distances_at_once_show():
    x, y = normals(2 * BLOCK + 30, 4), normals(BLOCK + 45, 4, seed=1) * 1.2
    far = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    within_x = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    within_y = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    for k in (1, 3, 5):
        radius_x, radius_y = within_x.kthvalue(k, dim=1).values, within_y.kthvalue(k, dim=1).values
        torch.testing.assert_close(squared_radii(Rows(x, "x"), k).sqrt(), radius_x, rtol=1e-10, atol=0)
        in_y, in_x = far <= radius_y, (far <= radius_x[:, None]).T
        assert precision_recall(x, y, k=k) == (
            float(in_y.any(dim=1).double().mean()),
            float(in_x.any(dim=1).double().mean()),
        )
        density, coverage = density_coverage(x, y, k=k)
        assert density == pytest.approx(float(in_y.sum()) / (k * len(x)), rel=1e-12)
        assert coverage == float(in_y.any(dim=0).double().mean())
    distance, index = nearest(x, y)
    assert torch.equal(index, far.argmin(dim=1))
    torch.testing.assert_close(distance, far.amin(dim=1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("k", [0, -1, 4, 50])
def test_more_neighbours_than_there_are_is_refused(k):
    with pytest.raises(ArgumentError, match=f"k = {k} neighbours among 4 reference images"):
        density_coverage(SAMPLES[:, None], REFERENCE[:, None], k=k)
    with pytest.raises(ArgumentError, match=f"k = {k} neighbours"):
        precision_recall(REFERENCE[:, None], SAMPLES[:, None].repeat(20, 1), k=k)


def grid(side=6, d=2):
    """Points a distance 1 apart."""
    axis = torch.arange(side, dtype=F64)
    return torch.stack(torch.meshgrid(*[axis] * d, indexing="ij"), dim=-1).reshape(-1, d)


def test_medians_ratio_and_indices_of_known_offsets():
    train = grid()
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    samples = train[order] + torch.tensor([0.06, 0.08], dtype=F64)
    held_out = train[:21] - torch.tensor([0.0, 0.2], dtype=F64)
    found = nearest_neighbour(samples, train, held_out)
    assert torch.equal(found.index, order)
    assert found.median == pytest.approx(0.1, rel=1e-12)
    assert found.held_out_median == pytest.approx(0.2, rel=1e-12)
    assert found.ratio == pytest.approx(0.5, rel=1e-12)
    assert found.duplicates == 0


def test_exact_copies_are_counted_and_shown_first_even_far_from_the_origin():
    """At 1e4 the Gram matrix cannot tell 0 from 1e-4 in float32; the distance comes from the difference."""
    train = (normals(700, 1, 6, 6) + 1e4).float()
    samples = train[100:140].clone()
    samples[5:] += 1.0
    samples[7, 0, 0, 0] = train[107, 0, 0, 0]
    found = nearest_neighbour(samples, train, train[:50] + 2.0)
    assert found.duplicates == 5
    assert sorted(found.closest(5).tolist()) == [0, 1, 2, 3, 4]
    assert (found.distance[:5] == 0.0).all()
    assert found.index[:5].tolist() == [100, 101, 102, 103, 104]
    assert (found.distance[5:] > 0.5).all()


def test_the_median_of_an_even_count_is_the_middle():
    train = torch.tensor([[0.0], [100.0]])
    samples = torch.tensor([[1.0], [2.0], [4.0], [90.0]])
    found = nearest_neighbour(samples, train, torch.tensor([[1.0], [98.0]]))
    assert (found.median, found.held_out_median) == (3.0, 1.5)


def test_held_out_images_that_were_trained_on_are_refused():
    train = grid()
    with pytest.raises(ArgumentError, match="exact copies of training images"):
        nearest_neighbour(train + 0.1, train, train[:10])
