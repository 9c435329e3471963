"""Figures on scikit-learn's digits that were found independently, on a random split into 1,437 and 360."""

import pytest
import torch

from undiffuse.metrics import baselines, class_accuracy, frechet_distance, nearest_neighbour


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(raw.data, dtype=torch.float32) / 8 - 1).reshape(-1, 1, 8, 8)[order]
    labels = torch.tensor(raw.target)[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def gaussian_per_class(train, labels, n):
    """n draws for each class from the Gaussian with its moments."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for k in range(10):
        rows = train[labels == k].flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(rows.T))
        noise = torch.randn(n, 64, generator=generator, dtype=torch.float64)
        drawn.append(rows.mean(dim=0) + noise @ (vectors * values.clamp(min=0).sqrt()).T)
    return torch.cat(drawn)


def test_resampled_training_images_are_close_and_held_out_images_show_how_few_they_are(digits):
    train, _, held_out, _ = digits
    found = baselines(train, held_out, n=10_000, seed=0)
    assert 0.010 < found.resample < 0.017
    assert 0.25 < found.held_out < 0.45


def test_a_gaussian_per_class_matches_the_moments_until_it_is_clipped_to_pixels(digits):
    train, labels, _, _ = digits
    drawn = gaussian_per_class(train, labels, 1000)
    flat = train.flatten(1).double()
    assert frechet_distance(drawn, flat) < 0.02
    assert frechet_distance(drawn.clamp(-1, 1), flat) == pytest.approx(0.34, abs=0.02)


def test_held_out_images_are_two_point_one_from_the_nearest_training_image(digits):
    train, _, held_out, _ = digits
    found = nearest_neighbour(held_out, train, held_out)
    assert found.held_out_median == pytest.approx(2.10, abs=0.06)
    assert found.ratio == 1.0
    copies = nearest_neighbour(train[:100], train, held_out)
    assert (copies.ratio, copies.duplicates) == (0.0, 100)


def test_the_reader_reads_held_out_digits(digits):
    train, labels, held_out, held_out_labels = digits
    assert class_accuracy(held_out, held_out_labels, train, labels).accuracy >= 0.98
