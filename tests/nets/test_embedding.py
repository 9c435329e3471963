"""Noise features, labels and vectors: exact properties, what is absent, and what is refused."""

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.nets.embedding import Embedding, Fourier, Labels, Sinusoidal, Vector


@pytest.mark.parametrize("kind", [Sinusoidal, Fourier])
def test_features_have_unit_magnitude_and_a_stationary_kernel(kind):
    torch.manual_seed(0)
    features = kind(64).double()
    c = torch.linspace(-2, 2, 9, dtype=torch.float64)
    e = features(c)
    torch.testing.assert_close(e.square().mean(1), torch.ones_like(c))
    # <e(a), e(b)> is a function of a - b alone.
    torch.testing.assert_close(e @ e.T, features(c + 0.7) @ features(c + 0.7).T, rtol=1e-6, atol=1e-6)


def test_fourier_kernel_is_the_gaussian_of_its_bandwidth():
    torch.manual_seed(0)
    c = torch.tensor([0.0, 0.1, 0.2, 0.4])
    e = Fourier(400_000, scale=0.8)(c)
    kernel = (e @ e[0]) / e.shape[1]
    # Mean of 200,000 cosines: standard error below 0.002, false alarms below 1e-6 at 5 of them.
    torch.testing.assert_close(kernel, torch.exp(-2 * (math.pi * 0.8 * c) ** 2), rtol=0, atol=0.01)


def test_close_noise_levels_stay_apart_and_far_ones_are_ordered():
    features = Sinusoidal(64)
    near = features(torch.tensor([1.0, 1.005]))
    assert (near[0] - near[1]).square().sum() > 0.5
    slow = features(torch.linspace(-3, 3, 50))[:, -1]  # sine of the lowest frequency
    assert (slow.diff() > 0).all()


def test_embedding_is_float32_under_autocast_and_with_narrow_weights():
    torch.manual_seed(0)
    embedding = Embedding(32, num_classes=3)
    c, labels = torch.rand(5), torch.tensor([0, 1, 2, -1, 0])
    plain = embedding(c, labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = embedding(c, labels)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert embedding.to(torch.bfloat16)(c, labels).dtype == torch.float32


def test_absent_labels_are_one_learned_row_however_they_are_said():
    torch.manual_seed(0)
    embedding = Embedding(16, num_classes=4)
    c = torch.full((3,), 0.3)
    none, minus = embedding(c), embedding(c, torch.full((3,), -1))
    assert torch.equal(none, minus)
    mixed = embedding(c, torch.tensor([2, -1, 3]))
    assert torch.equal(mixed[1], none[1])
    assert not torch.allclose(mixed[0], mixed[2])
    assert not torch.allclose(mixed[0], none[0])
    assert torch.equal(embedding(c, {"label": torch.tensor([2, -1, 3])}), mixed)


def test_absent_vectors_are_one_learned_row_and_nan_goes_nowhere_else():
    torch.manual_seed(0)
    vector = Vector(3, 8)
    given = torch.tensor([[1.0, 2.0, 3.0], [math.nan] * 3, [0.0, math.nan, 0.0]])
    out = vector(given, 3)
    assert torch.equal(out[1], vector.absent)
    assert torch.equal(out[2], vector.absent)
    torch.testing.assert_close(out[0], vector.linear(given[0]))
    assert torch.equal(vector(None, 2)[0], vector.absent)
    out.sum().backward()
    assert torch.equal(vector.linear.weight.grad, given[:1].expand(8, 3))  # from the first row alone
    assert torch.equal(vector.absent.grad, torch.full((8,), 2.0))


def test_label_and_vector_together():
    torch.manual_seed(0)
    embedding = Embedding(16, num_classes=4, cond_dim=2)
    c = torch.full((2,), 0.3)
    label, vector = torch.tensor([1, 2]), torch.randn(2, 2)
    both = embedding(c, {"label": label, "vector": vector})
    only = embedding(c, {"vector": vector})
    assert not torch.allclose(both, only)
    assert torch.equal(only, embedding(c, {"label": torch.tensor([-1, -1]), "vector": vector}))
    with pytest.raises(ArgumentError, match="dict with keys 'label' and 'vector'"):
        embedding(c, label)


@pytest.mark.parametrize(
    ("make", "cond", "message"),
    [
        ({"num_classes": 4}, torch.tensor([0, 4]), r"from 0 to 4: this network knows 0 \.\.\. 3.*num_classes=5"),
        ({"num_classes": 4}, torch.tensor([-2, 1]), "from -2 to 1"),
        ({"num_classes": 4}, torch.tensor([0.0, 1.0]), r"expected \(2,\) integers"),
        ({"num_classes": 4}, torch.tensor([0, 1, 2]), r"expected \(2,\) integers"),
        ({"cond_dim": 3}, torch.zeros(2, 4), r"expected \(2, 3\) floats"),
        ({"cond_dim": 3}, torch.zeros(2, 3, dtype=torch.int64), r"expected \(2, 3\) floats"),
        ({}, torch.tensor([0, 1]), "built without a condition"),
        ({"num_classes": 4}, {"lable": torch.tensor([0, 1])}, "has the key 'lable'"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(make, cond, message):
    with pytest.raises(ArgumentError, match=message):
        Embedding(8, **make)(torch.zeros(2), cond)


def test_wrong_construction_is_refused():
    with pytest.raises(ArgumentError, match="even number"):
        Embedding(8, features=7)
    with pytest.raises(ArgumentError, match="Did you mean 'fourier'"):
        Embedding(8, noise="furier")


def test_table_has_a_row_for_every_label_and_one_more():
    assert Labels(5, 7).table.weight.shape == (6, 7)


@pytest.mark.parametrize("late", [False, True])
def test_a_condition_joins_behind_the_first_layer_or_the_second(late):
    torch.manual_seed(0)
    module = Embedding(6, num_classes=3, features=8, noise_scale=2.0, noise_offset=0.5, late_condition=late).double()
    c, labels = torch.tensor([0.1, 0.7], dtype=torch.float64), torch.tensor([2, -1])
    silu = torch.nn.functional.silu
    told = module.label.table.weight[[2, 3]]
    h = module.first(module.noise(2 * (c + 0.5)))
    expected = module.second(silu(h)) + told if late else module.second(silu(h + told))
    torch.testing.assert_close(module(c, labels), silu(expected))
