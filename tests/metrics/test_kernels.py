"""Kernel distances against double loops, closed forms over moments, and closed forms of Gaussians."""

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics import kernel_distance, median_distance, mmd
from undiffuse.metrics.kernels import RBF, Polynomial, unbiased_mmd
from undiffuse.metrics.rows import BLOCK, Rows

F64 = torch.float64


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def by_double_loop(kernel, x, y):
    """Mean over all pairs of different points, one pair at a time."""
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    return float(xx + yy - 2 * xy)


def cubic(x, y):
    return (float(x @ y) / len(x) + 1) ** 3


def test_kid_of_all_rows_equals_the_double_loop():
    x, y = normals(9, 5) + 0.4, normals(9, 5, seed=1) * 1.2
    found = kernel_distance(x, y, subsets=1, subset_size=9)
    assert found.mean == pytest.approx(by_double_loop(cubic, x, y), rel=1e-12)
    assert (found.std, found.subset_size) == (0.0, 9)


def test_kid_is_not_centred():
    """The polynomial kernel sees the origin: a common shift changes the value."""
    x, y = normals(9, 5) + 0.4, normals(9, 5, seed=1)
    plain = kernel_distance(x, y, subsets=1, subset_size=9).mean
    moved = kernel_distance(x + 2, y + 2, subsets=1, subset_size=9).mean
    assert moved == pytest.approx(by_double_loop(cubic, x + 2, y + 2), rel=1e-11)
    assert abs(moved - plain) > 0.5 * abs(plain)


def test_polynomial_mmd_on_a_line_is_a_sum_over_moments_across_blocks_and_sizes():
    """k(x, y) = sum_r C(3, r) (x y)^r, and sum_{i != j} (x_i x_j)^r = (sum x^r)^2 - sum x^2r."""
    x, y = normals(2 * BLOCK + 13, 1) + 0.5, normals(BLOCK + 7, 1, seed=1) * 1.3

    def same(z, r):
        n = len(z)
        return float(((z**r).sum() ** 2 - (z ** (2 * r)).sum()) / (n * (n - 1)))

    def mixed(r):
        return float((x**r).mean() * (y**r).mean())

    expected = sum(math.comb(3, r) * (same(x, r) + same(y, r) - 2 * mixed(r)) for r in range(4))
    found = unbiased_mmd(Polynomial(), Rows(x, "x"), Rows(y, "y"))
    assert found == pytest.approx(expected, rel=1e-10)


def test_kid_of_two_gaussians_on_a_line_has_the_population_value():
    """Sum of C(3, r) (E x^r - E y^r)^2. False-alarm rate 3e-7 (5 standard errors, fixed seed)."""
    mean, std = 0.8, 1.3
    x = [mean, mean**2 + std**2, mean**3 + 3 * mean * std**2]
    expected = sum(math.comb(3, r) * (x[r - 1] - gauss) ** 2 for r, gauss in ((1, 0.0), (2, 1.0), (3, 0.0)))
    values = torch.tensor(
        [
            kernel_distance(normals(400, 1, seed=2 * s) * std + mean, normals(400, 1, seed=2 * s + 1), subsets=1).mean
            for s in range(60)
        ]
    )
    error = float(values.std()) / math.sqrt(60)
    assert abs(float(values.mean()) - expected) < 5 * error
    assert error < 0.1 * expected


@pytest.mark.parametrize(
    ("distance", "gap"),
    [
        (lambda x, y: kernel_distance(x, y, subsets=1).mean, 1 + 3 + 5 + 105 / 27 - 2),
        (lambda x, y: mmd(x, y, bandwidths=[1.0]), 1 - 3**-1.5),
    ],
    ids=["kernel", "mmd"],
)
def test_unbiased_for_equal_laws(distance, gap):
    """Mean over 200 pairs of sets within 4 standard errors of 0: false-alarm rate 6e-5.

    With the diagonal left in, it would be 2 / 20 of `gap` = E k(x, x) - E k(x, x'): far outside.
    """
    values = torch.tensor([distance(normals(20, 3, seed=s), normals(20, 3, seed=1000 + s)) for s in range(200)])
    error = float(values.std()) / math.sqrt(200)
    assert abs(float(values.mean())) < 4 * error < 0.5 * (2 / 20) * gap
    assert (values < 0).any()


def test_subsets_are_drawn_without_replacement_and_their_spread_is_reported():
    x, y = normals(40, 2), normals(30, 2, seed=1)
    found = kernel_distance(x, y, subsets=50, subset_size=10, seed=3)
    assert found == kernel_distance(x, y, subsets=50, subset_size=10, seed=3)
    assert found.mean != kernel_distance(x, y, subsets=50, subset_size=10, seed=4).mean
    assert kernel_distance(x, y, subsets=400, subset_size=10).std == pytest.approx(found.std, rel=0.5)
    # All 30 of 30: each subset is the whole set, so on the reference's side nothing varies.
    whole = kernel_distance(y, y + 1, subsets=5, subset_size=30)
    assert whole.std < 1e-12 * whole.mean


def test_subsets_that_cannot_be_drawn_are_refused():
    x, y = normals(40, 2), normals(30, 2, seed=1)
    for subsets, size in ((0, 10), (5, 31), (5, 1)):
        with pytest.raises(ArgumentError, match=f"{subsets} subsets of {size} rows"):
            kernel_distance(x, y, subsets=subsets, subset_size=size)
    assert kernel_distance(x, y, subsets=2).subset_size == 30
    assert kernel_distance(normals(1100, 1), normals(1200, 1), subsets=1).subset_size == 1000


def test_rbf_mmd_equals_the_double_loop():
    x, y = normals(7, 3), normals(11, 3, seed=1) + 0.5
    widths = (0.5, 2.0)

    def kernel(a, b):
        square = float((a - b).square().sum())
        return sum(math.exp(-square / (2 * h**2)) for h in widths) / 2

    assert mmd(x, y, bandwidths=widths) == pytest.approx(by_double_loop(kernel, x, y), rel=1e-11)


def test_rbf_mmd_is_the_same_in_blocks():
    x, y = normals(2 * BLOCK + 3, 3), normals(BLOCK + 11, 3, seed=1) + 0.5

    def mean_kernel(a, b, within):
        k = torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * 1.7**2))
        return float((k.sum() - k.trace()) / (len(a) * (len(a) - 1))) if within else float(k.mean())

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)
    assert mmd(x, y, bandwidths=[1.7]) == pytest.approx(expected, rel=1e-10)


def test_rbf_mmd_of_two_gaussians_has_the_population_value():
    """E k = (h^2 / (h^2 + s^2))^(d/2) exp(-|delta|^2 / (2 (h^2 + s^2))), s^2 the variance of x - y.

    5 standard errors: false-alarm rate 6e-7; the standard error is below 1 % of the value.
    """
    d, h, std, delta = 2, 1.5, 1.6, 3.0

    def expected_kernel(variance, shift):
        return (h**2 / (h**2 + variance)) ** (d / 2) * math.exp(-(shift**2) / (2 * (h**2 + variance)))

    population = expected_kernel(2 * std**2, 0) + expected_kernel(2.0, 0) - 2 * expected_kernel(1 + std**2, delta)
    shift = torch.tensor([delta, 0.0], dtype=F64)
    values = torch.tensor(
        [
            mmd(normals(400, d, seed=2 * s) * std + shift, normals(400, d, seed=2 * s + 1), bandwidths=[h])
            for s in range(60)
        ]
    )
    error = float(values.std()) / math.sqrt(60)
    assert error < 0.01 * population
    assert abs(float(values.mean()) - population) < 5 * error


def test_the_median_rule():
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    # The median of |x - y| for normals of d = 1 is sqrt(2) times the 3/4 quantile; 1,000 of 5,000 rows are read.
    assert median_distance(normals(5000, 1)) == pytest.approx(math.sqrt(2) * 0.67449, rel=0.05)
    x, y = normals(50, 3), normals(60, 3, seed=1)
    rule = [factor * median_distance(y) for factor in (0.25, 0.5, 1, 2, 4)]
    assert mmd(x, y) == mmd(x, y, bandwidths=rule)
    with pytest.raises(ArgumentError, match="median distance"):
        median_distance(torch.ones(20, 3))


@pytest.mark.parametrize("widths", [[], [0.0], [-1.0], [float("inf")], [1.0, float("nan")]])
def test_bandwidths_that_make_no_kernel_are_refused(widths):
    with pytest.raises(ArgumentError, match="bandwidths"):
        mmd(normals(5, 1), normals(5, 1), bandwidths=widths)


def test_a_mixture_of_bandwidths_is_a_mean():
    x, y = normals(50, 3), normals(60, 3, seed=1) + 1
    alone = [mmd(x, y, bandwidths=[h]) for h in (0.7, 1.9)]
    assert mmd(x, y, bandwidths=[0.7, 1.9]) == pytest.approx(sum(alone) / 2, rel=1e-12)
    assert RBF((1.0,))(x[:1], x[:1]).item() == pytest.approx(1.0, abs=1e-14)
