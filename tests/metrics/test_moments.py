"""Frechet distance against closed forms, moments against one pass, in one process and in two."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics import (
    Moments,
    SmallSampleWarning,
    baselines,
    frechet_between,
    frechet_distance,
)

F64 = torch.float64


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_moments(n, mean, covariance, seed=0):
    """n points whose mean and unbiased covariance are exactly the given ones, up to rounding."""
    z = normals(n, len(mean), seed=seed)
    z = z - z.mean(dim=0)
    factor = torch.linalg.cholesky(torch.cov(z.T).reshape(len(mean), len(mean)))
    white = torch.linalg.solve_triangular(factor, z.T, upper=False).T
    values, vectors = torch.linalg.eigh(covariance)
    return mean + white @ (vectors * values.clamp(min=0).sqrt()).T


def test_one_dimension_is_difference_of_means_and_of_deviations():
    a = with_moments(50, torch.tensor([1.0], dtype=F64), torch.tensor([[4.0]], dtype=F64))
    b = with_moments(70, torch.tensor([-2.0], dtype=F64), torch.tensor([[0.25]], dtype=F64), seed=1)
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + (2.0 - 0.5) ** 2, rel=1e-12)


def test_commuting_covariances_with_a_direction_that_never_varies():
    va, vb = torch.tensor([4.0, 1.0, 0.0, 0.09], dtype=F64), torch.tensor([1.0, 9.0, 0.0, 0.0], dtype=F64)
    rotation = torch.linalg.qr(normals(4, 4)).Q
    ma, mb = normals(4, seed=2), normals(4, seed=3)
    a = with_moments(60, ma, rotation @ va.diag() @ rotation.T)
    b = with_moments(90, mb, rotation @ vb.diag() @ rotation.T, seed=1)
    expected = (ma - mb).square().sum() + (va.sqrt() - vb.sqrt()).square().sum()
    # A variance of 0 is known to eps of the largest only, so its root to sqrt(eps).
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-7)


def test_covariances_that_do_not_commute_in_two_dimensions():
    """The eigenvalues p, q of a 2 x 2 product M have (sqrt p + sqrt q)^2 = tr M + 2 sqrt(det M)."""
    sa = torch.tensor([[3.0, 1.2], [1.2, 1.0]], dtype=F64)
    sb = torch.tensor([[0.7, -0.5], [-0.5, 2.0]], dtype=F64)
    a = with_moments(40, torch.zeros(2, dtype=F64), sa)
    b = with_moments(30, torch.zeros(2, dtype=F64), sb, seed=1)
    product = sa @ sb
    cross = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    assert frechet_distance(a, b) == pytest.approx(3.0 + 1.0 + 0.7 + 2.0 - 2 * cross, rel=1e-11)


def test_agrees_with_scipys_square_root_of_the_unsymmetric_product():
    a, b = normals(200, 30) @ normals(30, 30, seed=1), normals(150, 30, seed=2) @ normals(30, 30, seed=3) + 1
    sa, sb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = (a.mean(dim=0) - b.mean(dim=0)).numpy()
    root = scipy.linalg.sqrtm(sa @ sb)
    expected = gap @ gap + np.trace(sa) + np.trace(sb) - 2 * np.trace(np.real(root))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_zero_for_equal_moments_also_where_the_covariance_is_singular():
    a = normals(500, 3, seed=1) @ normals(3, 12, seed=2)
    again = a[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    scale = float(torch.cov(a.T).trace())
    assert 0.0 <= frechet_distance(a, again) < 1e-7 * scale


def test_units_are_squared_units_of_the_data():
    a, b = normals(60, 6), normals(80, 6, seed=1) * 1.5 + 0.3
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * frechet_distance(a, b), rel=1e-10)


def test_float32_images_are_summed_in_float64():
    """At 1e4 with spread 1, float32 sums would keep no digit of the variance."""
    z = (normals(3000, 2) + 1e4).to(torch.float32)
    found = Moments.of(z).covariance
    torch.testing.assert_close(found, torch.cov(z.double().T), rtol=1e-9, atol=0)


def test_batches_merge_into_the_moments_of_the_whole_whatever_the_split():
    x = normals(1500, 4) * torch.tensor([1.0, 10.0, 0.1, 1.0], dtype=F64) + 100
    for split in ([1500], [1, 1499], [700, 1, 799], [100] * 15):
        parts = x.split(split)
        total = Moments.of(parts[0])
        for part in parts[1:]:
            total = total.update(part)
        assert total.n == 1500
        torch.testing.assert_close(total.mean, x.mean(dim=0), rtol=1e-13, atol=0)
        torch.testing.assert_close(total.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-12)


def test_merging_rows_of_unlike_length_is_refused():
    with pytest.raises(ArgumentError, match="4 and of 3"):
        Moments.of(normals(9, 4)).merge(Moments.of(normals(9, 3)))
    with pytest.raises(ArgumentError, match="equally long"):
        frechet_between(Moments.of(normals(9, 4)), Moments.of(normals(9, 3)))


def _share_of_one_process(rank, file, found):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = normals(101, 3) + 50
    share = x[:30] if rank == 0 else x[30:]
    total = Moments.of(share).reduce()
    torch.save((total.n, total.mean, total.scatter), f"{found}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_reduce_to_the_moments_of_all_rows(tmp_path):
    mp.spawn(_share_of_one_process, (str(tmp_path / "meet"), str(tmp_path / "found")), nprocs=2)
    whole = Moments.of(normals(101, 3) + 50)
    for rank in range(2):
        n, mean, scatter = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert n == 101
        torch.testing.assert_close(mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(scatter, whole.scatter, rtol=1e-11, atol=1e-12)


def test_one_process_reduces_to_itself():
    own = Moments.of(normals(9, 2))
    assert own.reduce() is own


def test_fewer_samples_than_dimensions_warn_and_one_sample_is_refused():
    with pytest.warns(SmallSampleWarning, match=r"n = 8 samples of d = 8.*rank 7.*d \+ 1 = 9"):
        frechet_distance(normals(8, 8), normals(50, 8, seed=1))
    with pytest.raises(ArgumentError, match="at least 2 rows"):
        frechet_distance(normals(1, 8), normals(50, 8))
    with pytest.raises(ArgumentError, match="at least 2 samples, given 1"):
        Moments.of(normals(1, 8)).covariance  # noqa: B018


def test_a_full_rank_is_not_warned_about(recwarn):
    frechet_distance(normals(9, 8), normals(50, 8, seed=1))
    assert not [one for one in recwarn if one.category is SmallSampleWarning]


def test_baselines_are_a_bootstrap_and_the_held_out_images():
    d = 6
    train = with_moments(300, torch.ones(d, dtype=F64), torch.eye(d, dtype=F64)).reshape(300, 2, 3)
    held_out = normals(100, 2, 3, seed=1) * 1.3 + 0.2
    found = baselines(train, held_out, n=4000, seed=5)
    assert found.held_out == frechet_distance(held_out, train)
    assert baselines(train, held_out, n=4000, seed=5) == found
    assert baselines(train, held_out, n=4000, seed=6).resample != found.resample
    # To first order in 1/n, with unit covariance: d / n from the mean, d (d + 1) / (4 n) from the covariance.
    # The standard error over 40 seeds is 4 %.
    mean = sum(baselines(train, held_out, n=4000, seed=s).resample for s in range(40)) / 40
    assert mean == pytest.approx(d * (d + 5) / (4 * 4000), rel=0.15)
    with pytest.raises(ArgumentError, match="n = 1 draws"):
        baselines(train, held_out, n=1)
