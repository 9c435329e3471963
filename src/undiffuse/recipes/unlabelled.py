"""Data without the labels that they have."""

from __future__ import annotations

from typing import Any


class Unlabelled:
    """A data set without its labels."""

    num_classes = None
    cond_dim = None
    class_names = None

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._dataset, name)
        if name == "batch":
            return lambda indices: (value(indices)[0], None)
        if name == "batches":
            return lambda *args, **options: ((x, None) for x, _ in value(*args, **options))
        return value

    def __len__(self) -> int:
        return len(self._dataset)
