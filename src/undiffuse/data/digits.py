"""The built-in data set: scikit-learn's 1,797 hand-written digits of 8 x 8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.core.random import Streams, hash_key
from undiffuse.data.dataset import ArrayDataset, Labels

TRAIN_SHARE = 0.8
HALF_RANGE = 8.0  # pixels are 0 ... 16


def training_rows(label: Tensor) -> Tensor:
    """Mask of the training split: of each class a fixed random 80 %, the same on every machine."""
    key = Streams.of(hash_key("digits", "split"), len(label)).bits((len(label),))
    mask = torch.zeros(len(label), dtype=torch.bool)
    for k in label.unique():
        rows = (label == k).nonzero()[:, 0]
        mask[rows[key[rows].argsort()][: round(TRAIN_SHARE * len(rows))]] = True
    return mask


def digits_dataset(split: str) -> ArrayDataset:
    """Digits, x = pixel / 8 - 1 in [-1, 1], shape (1, 8, 8), ten classes; 1,438 to train, 359 held out."""
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    label = torch.as_tensor(target, dtype=torch.int64)
    x = (torch.as_tensor(pixels, dtype=torch.float32) / HALF_RANGE - 1.0).reshape(-1, 1, 8, 8)
    mask = training_rows(label)
    rows = (mask if split == "train" else ~mask).nonzero()[:, 0]
    return ArrayDataset(x[rows], Labels(label[rows], [str(k) for k in range(10)], 10), "digits", split)
