"""Sliced Wasserstein distance: shifts and scales in closed form, unequal sizes against other routes."""

import math

import pytest
import scipy.stats
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics import sliced_wasserstein
from undiffuse.metrics.sliced import directions, quantile_coupling

F64 = torch.float64


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("d", [2, 3, 17])
def test_a_shift_has_the_closed_form_of_its_dimension(d):
    """Over 20,000 directions the standard error is 0.3 to 0.5 %, twice or thrice within the tolerance."""
    x, delta = normals(3, d), normals(d, seed=1)
    length = float(delta.norm())
    first = sliced_wasserstein(x + delta, x, p=1.0, projections=20_000)
    second = sliced_wasserstein(x + delta, x, p=2.0, projections=20_000)
    mean_cosine = math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    assert first == pytest.approx(length * mean_cosine, rel=0.01)
    assert second == pytest.approx(length / math.sqrt(d), rel=0.01)


def test_a_shift_is_exact_for_the_directions_taken():
    x, delta = normals(40, 5), normals(5, seed=1)
    cosines = (directions(100, 5, seed=7) @ delta).abs()
    assert sliced_wasserstein(x + delta, x, p=1.0, projections=100, seed=7) == pytest.approx(
        float(cosines.mean()), rel=1e-12
    )
    assert sliced_wasserstein(x + delta, x, p=3.0, projections=100, seed=7) == pytest.approx(
        float(cosines.pow(3).mean()) ** (1 / 3), rel=1e-12
    )


def test_a_scale_leaves_the_order_of_points_and_so_is_exact():
    x = normals(40, 5)
    projected = x @ directions(100, 5).T
    expected = math.sqrt(float((0.3 * projected).square().mean()))
    assert sliced_wasserstein(1.3 * x, x, projections=100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (6, 4), (50, 75), (64, 63), (997, 1000)])
def test_unequal_sizes_on_a_line_equal_scipys_distance(n, m):
    x, y = normals(n, 1), normals(m, 1, seed=1) * 2 + 0.3
    expected = scipy.stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert sliced_wasserstein(x, y, p=1.0, projections=3) == pytest.approx(expected, rel=1e-10)


def test_unequal_sizes_equal_the_sets_repeated_to_a_common_size():
    x, y = normals(6, 3), normals(4, 3, seed=1) * 2
    common = sliced_wasserstein(x.repeat(2, 1), y.repeat(3, 1), projections=20)
    assert sliced_wasserstein(x, y, projections=20) == pytest.approx(common, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 5), (4, 6), (50_000, 1_437)])
def test_the_coupling_has_both_marginals(n, m):
    one, other, mass = quantile_coupling(n, m)
    for index, size in ((one, n), (other, m)):
        marginal = torch.zeros(size, dtype=F64).index_add_(0, index, mass)
        torch.testing.assert_close(marginal, torch.full((size,), 1 / size, dtype=F64), rtol=1e-9, atol=0)
        assert (index.diff() >= 0).all()


def test_directions_are_unit_isotropic_and_owned_by_their_index():
    u = directions(20_000, 4, seed=3)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(20_000, dtype=F64), rtol=1e-12, atol=0)
    # Entries of the mean outer product have standard error below 0.0016: 5 of them.
    torch.testing.assert_close(u.T @ u / 20_000, torch.eye(4, dtype=F64) / 4, rtol=0, atol=0.008)
    assert torch.equal(directions(10, 4, seed=3), u[:10])
    assert not torch.equal(directions(10, 4, seed=4), u[:10])


def test_settings_without_meaning_are_refused():
    x = normals(5, 2)
    for settings in ({"projections": 0}, {"p": 0.5}, {"p": math.inf}, {"p": math.nan}):
        with pytest.raises(ArgumentError, match="expected projections >= 1 and finite p >= 1"):
            sliced_wasserstein(x, x, **settings)
