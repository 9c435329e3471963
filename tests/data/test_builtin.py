"""The built-in sources against their closed forms."""

import math
import zlib

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.data import MODE_STD, load, plane, ring_means

N = 40_000
FIVE_SIGMA = 5.0  # two-sided false alarm 6e-7 per comparison


def points(name, **options):
    """All points of a source and their labels."""
    dataset = load(name, n=N, **options)
    return dataset.batch(torch.arange(N))


def test_digits_are_split_once_and_for_all():
    train, held_out = load("digits"), load("digits", "held-out")
    assert (len(train), len(held_out)) == (1438, 359)
    assert zlib.crc32(train.x.numpy().tobytes()) == 1699709093
    assert zlib.crc32(held_out.labels.values.numpy().tobytes()) == 2453733282


def test_digits_splits_are_the_whole_stratified_and_scaled():
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    parts = [load("digits", split) for split in ("train", "held-out")]
    ours = torch.cat([part.batch(torch.arange(len(part)))[0] for part in parts])
    rows = sorted(map(tuple, ((ours.reshape(-1, 64) + 1) * 8).int().tolist()))
    assert rows == sorted(map(tuple, pixels.astype(int).tolist()))
    train_counts = torch.bincount(parts[0].labels.values, minlength=10)
    counts = torch.bincount(torch.as_tensor(target), minlength=10)
    assert (train_counts - 0.8 * counts).abs().max() <= 0.5
    assert ours.min() == -1.0
    assert ours.max() == 1.0


@pytest.mark.parametrize("name", list(plane.PLANE))
def test_plane_sources_have_mean_zero_and_unit_scale(name):
    x, _ = points(name)
    # Bounded or Gaussian coordinates of standard deviation about 1: the mean's error is about 1 / sqrt(n).
    assert x.mean(dim=0).abs().max() < FIVE_SIGMA * 1.2 / math.sqrt(N)
    half_square = x.double().square().sum(dim=1) / 2.0
    assert abs(half_square.mean() - 1.0) < FIVE_SIGMA * half_square.std() / math.sqrt(N) + 1e-6


@pytest.mark.parametrize("name", list(plane.PLANE))
def test_plane_points_are_a_function_of_seed_split_and_number(name):
    x, label = points(name)
    few, few_labels = load(name, n=100).batch(torch.arange(100))
    assert torch.equal(few, x[:100])
    assert (label is None and few_labels is None) or torch.equal(few_labels, label[:100])
    others = [points(name, split="held-out")[0], points(name, seed=1)[0]]
    mine = set(map(tuple, few.tolist()))
    assert all(mine.isdisjoint(map(tuple, other.tolist())) for other in others)
    prints = {load(name, **o).fingerprint for o in ({}, {"split": "held-out"}, {"seed": 1}, {"n": 7}, {"limit": 7})}
    assert len(prints) == 5
    assert load(name).fingerprint in prints


def test_gaussians_are_eight_equal_modes_on_a_ring():
    x, mode = points("gaussians")
    centres = ring_means()
    radius = math.sqrt(2.0 - 2.0 * MODE_STD**2)
    assert torch.allclose(centres.norm(dim=1), torch.full((8,), radius))
    gap = 2.0 * radius * math.sin(math.pi / 8)
    assert torch.allclose((centres - centres.roll(1, 0)).norm(dim=1), torch.full((8,), gap))
    residual = (x - centres[mode]) / MODE_STD
    for k in range(8):
        mine = residual[mode == k]
        assert mine.mean(dim=0).abs().max() < FIVE_SIGMA / math.sqrt(len(mine))
        assert (mine.T @ mine / len(mine) - torch.eye(2)).abs().max() < FIVE_SIGMA * math.sqrt(2 / len(mine))
    expected = N / 8
    chi_square = ((torch.bincount(mode, minlength=8) - expected) ** 2 / expected).sum()
    assert chi_square < 35.0  # 7 degrees of freedom: false alarm 1e-5


def test_checkerboard_fills_its_black_squares_and_no_other():
    x, label = points("checkerboard")
    assert label is None
    square = (4.0 * (x / math.sqrt(3.0) + 1.0) / 2.0).floor().int()
    assert square.min() >= 0
    assert square.max() <= 3
    assert (square.sum(dim=1) % 2 == 0).all()
    counts = torch.bincount(4 * square[:, 0] + square[:, 1], minlength=16)
    filled = counts[counts > 0]
    assert len(filled) == 8
    assert ((filled - N / 8) ** 2 / (N / 8)).sum() < 35.0
    inside = 4.0 * (x / math.sqrt(3.0) + 1.0) / 2.0 - square
    # Uniform within a square: mean 1/2, variance 1/12.
    assert (inside.mean(dim=0) - 0.5).abs().max() < FIVE_SIGMA / math.sqrt(12 * N)
    assert (inside.var(dim=0) - 1 / 12).abs().max() < 0.005 / 12 * FIVE_SIGMA


def test_moons_are_half_circles_about_their_centres():
    x, moon = points("moons")
    (mean_x, mean_y), variance = plane.moon_moments()
    raw = x * math.sqrt(variance) + torch.tensor([mean_x, mean_y])
    noise = plane.MOON_NOISE
    for k, centre, side in ((0, (0.0, 0.0), 1.0), (1, (1.0, 0.5), -1.0)):
        mine = raw[moon == k] - torch.tensor(centre)
        radius = mine.norm(dim=1)
        # E|u + noise| = 1 + noise^2 / 2 to the next order, with the noise's own spread.
        assert abs(radius.mean() - 1.0 - noise**2 / 2.0) < FIVE_SIGMA * noise / math.sqrt(len(mine))
        assert abs(radius.std() / noise - 1.0) < 0.03
        assert (side * mine[:, 1] > -FIVE_SIGMA * noise).all()
        assert abs((mine[:, 0] > 0).float().mean() - 0.5) < FIVE_SIGMA * 0.5 / math.sqrt(len(mine))


def test_spiral_follows_its_equation():
    x, arm = points("spiral")
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    away = angle - 2.0 * math.pi * plane.SPIRAL_TURNS * radius / plane.SPIRAL_RADIUS - math.pi * arm
    far = radius > 0.5
    across = radius * torch.sin(away) / torch.sqrt(1 + (3 * math.pi * radius / plane.SPIRAL_RADIUS) ** 2)
    assert torch.cos(away)[far].min() > 0.0
    assert abs(across[far].std() / plane.SPIRAL_NOISE - 1.0) < 0.05
    # Uniform in area: a quarter of the points lie within half the radius.
    share = (radius < plane.SPIRAL_RADIUS / 2).float().mean()
    assert abs(share - 0.25) < FIVE_SIGMA * math.sqrt(0.25 * 0.75 / N) + 1e-3


def test_limit_is_a_fixed_choice_with_its_own_labels():
    whole, part = load("digits"), load("digits", limit=50)
    x, label = part.batch(torch.arange(50))
    place = torch.cdist(x.flatten(1), whole.x.flatten(1)).argmin(dim=1)
    assert torch.equal(whole.x[place], x)
    assert torch.equal(whole.labels.values[place], label)
    assert (place.diff() > 0).all()
    assert sum(part.summary()["classes"].values()) == 50


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "digit"}, "Did you mean 'digits'"),
        ({"source": "digits", "split": "test"}, "Did you mean 'held-out'"),
        ({"source": "moons", "split": "trian"}, "Did you mean 'train'"),
        ({"source": "digits", "size": 16}, "does not use data.size"),
        ({"source": "moons", "n": 0}, "data.n is 0"),
        ({"source": "folder"}, "needs data.path"),
        ({"source": "foldr", "path": "photos"}, "Did you mean 'folder'"),
        ({"source": "folder", "path": ".", "channels": 2}, "data.channels is 2"),
        ({"source": "folder", "path": ".", "on_error": "skp"}, "Did you mean 'skip'"),
        ({"source": "folder", "path": ".", "size": (3, 3, 3)}, r"data.size is \(3, 3, 3\)"),
        ({"source": "folder", "path": ".", "held_out": 1.0}, "data.held_out is 1.0"),
    ],
)
def test_wrong_arguments_are_named(options, says):
    with pytest.raises(ArgumentError, match=says):
        load(**options)
