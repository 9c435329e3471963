"""Reading the intended class: on classes that cannot be mistaken the answer is known."""

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics import class_accuracy

CENTRES = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])


def blobs(labels, seed):
    noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed)) * 0.2
    return (CENTRES[labels] + noise).reshape(-1, 1, 1, 2)


TRAIN_LABELS = torch.arange(90) % 3
TRAIN = blobs(TRAIN_LABELS, 0)


def test_counts_exactly_those_that_show_another_class():
    shown = torch.arange(60) % 3
    asked = shown.clone()
    asked[:6] = (asked[:6] + 1) % 3  # two of each class asked for, but shown as its predecessor
    found = class_accuracy(blobs(shown, 1), asked, TRAIN, TRAIN_LABELS)
    assert found.accuracy == 54 / 60
    assert torch.equal(found.read, shown)
    assert found.per_class == {0: 18 / 20, 1: 18 / 20, 2: 18 / 20}


def test_only_classes_asked_for_are_reported():
    asked = torch.full((10,), 2)
    found = class_accuracy(blobs(asked, 1), asked, TRAIN, TRAIN_LABELS)
    assert found.per_class == {2: 1.0}


@pytest.mark.parametrize(
    ("labels", "train_labels", "message"),
    [
        (torch.tensor([0, 1, -1]), TRAIN_LABELS, "3 labels for 3 samples: expected one label >= 0"),
        (torch.tensor([0, 1]), TRAIN_LABELS, "2 labels for 3 samples"),
        (torch.tensor([0, 1, 2]), TRAIN_LABELS[:-1], "89 labels for 90 training images"),
        (torch.tensor([0, 1, 7]), TRAIN_LABELS, r"asked for \[0, 1, 7\]"),
        (torch.tensor([0, 0, 0]), torch.zeros(90, dtype=torch.int64), "at least two classes"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(labels, train_labels, message):
    with pytest.raises(ArgumentError, match=message):
        class_accuracy(blobs(torch.tensor([0, 1, 2]), 1), labels, TRAIN, train_labels)
