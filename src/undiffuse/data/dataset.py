"""What a data set is to the rest of the library, and the kind that is held in memory."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.errors import DataError

# Characters of the sha256 that identify a data set; 64 bits tell any two in practice.
FINGERPRINT_LENGTH = 16
# A stored byte v stands for v / 127.5 - 1, so that 0 and 255 are exactly -1 and 1.
BYTE_SCALE = 2.0 / 255.0
IMAGE_CHANNELS = (1, 3, 4)


@runtime_checkable
class Dataset(Protocol):
    """Rows that can be asked for by index; images are float32 in [-1, 1], channels first."""

    name: str
    split: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one event, channels first."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None."""
        ...

    @property
    def cond_dim(self) -> int | None:
        """Length of the condition vector, or None."""
        ...

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, or None."""
        ...

    @property
    def is_image(self) -> bool:
        """Whether an event is a picture, shape (C, H, W) with C = 1, 3 or 4."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of what the rows are: equal data, equal fingerprint."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b ..."], Tensor | None]:
        """The rows at `indices`: x of shape (B, *shape), and labels (B,), vectors (B, d) or None."""
        ...

    def summary(self) -> dict[str, Any]:
        """Number of rows, shape, rows per class, what was left out: for print-outs and the report."""
        ...


@dataclass(frozen=True)
class Labels:
    """What is known of each row besides `x`.

    Attributes:
        values: int64 classes (n,), where -1 is "no label"; or float32 vectors (n, d); or None.
        names: the classes by name, in the order of their numbers.
        num_classes: how many classes there are, in all splits together.
    """

    values: Tensor | None = None
    names: list[str] | None = None
    num_classes: int | None = None

    @property
    def cond_dim(self) -> int | None:
        """Length of the condition vector; None for classes and for no labels."""
        return None if self.values is None or self.values.ndim == 1 else self.values.shape[1]

    def select(self, rows: Tensor) -> Labels:
        """The labels of some of the rows."""
        return Labels(None if self.values is None else self.values[rows], self.names, self.num_classes)

    def counts(self) -> dict[str, int] | None:
        """Rows per class by name (or number); "none" counts the rows without label. None without classes."""
        if self.values is None or self.num_classes is None:
            return None
        names = self.names or [str(k) for k in range(self.num_classes)]
        found = torch.bincount(self.values + 1, minlength=self.num_classes + 1).tolist()
        unlabelled = {"none": found[0]} if found[0] else {}
        return dict(zip(names, found[1:])) | unlabelled


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read and was left out: its row, where that is, and why."""

    row: int
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Labelled:
    """What every kind of data set derives from its `labels`, `shape` and `skipped`."""

    name: str
    split: str
    labels: Labels
    skipped: list[Skipped]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of what the rows are: equal data, equal fingerprint."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None."""
        return self.labels.num_classes

    @property
    def cond_dim(self) -> int | None:
        """Length of the condition vector, or None."""
        return self.labels.cond_dim

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, or None."""
        return self.labels.names

    @property
    def is_image(self) -> bool:
        """Whether an event is a picture, shape (C, H, W) with C = 1, 3 or 4."""
        return len(self.shape) == 3 and self.shape[0] in IMAGE_CHANNELS

    def __len__(self) -> int:
        raise NotImplementedError

    def __repr__(self) -> str:
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"{type(self).__name__}({self.name}, {self.split}, shape {self.shape}{classes})"

    def summary(self) -> dict[str, Any]:
        """Number of rows, shape, rows per class, what was left out; JSON-able."""
        return self.described() | {
            "n": len(self),
            "classes": self.labels.counts(),
            "skipped": [str(one) for one in self.skipped],
        }

    def described(self) -> dict[str, Any]:
        """The part of the summary that needs no count of rows."""
        return {
            "name": self.name,
            "split": self.split,
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "cond_dim": self.cond_dim,
            "fingerprint": self.fingerprint,
        }


@dataclass(eq=False, repr=False)
class ArrayDataset(Labelled):
    """Rows held in memory: bytes (images, scaled as they leave) or floats (kept as they are).

    Args:
        x: uint8 or float32, shape (n, *event).
        labels: see `Labels`.
        name: what it is called in print-outs.
        split: "train", "held-out" or the source's own name.
        skipped: what was left out on reading.
        identity: digest of where the rows came from; None: of the rows themselves.
    """

    x: Tensor
    labels: Labels = field(default_factory=Labels)
    name: str = "array"
    split: str = "train"
    skipped: list[Skipped] = field(default_factory=list)
    identity: str | None = None

    def __post_init__(self):
        if len(self.x) == 0 or math.prod(self.x.shape[1:]) == 0:
            raise DataError(f"{self.name} ({self.split}) is empty: its array has shape {tuple(self.x.shape)}")
        if self.labels.values is not None and len(self.labels.values) != len(self.x):
            raise DataError(f"{self.name} has {len(self.x)} rows but {len(self.labels.values)} labels")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b ..."], Tensor | None]:
        """The rows at `indices`: x float32 (B, *shape); classes (B,), vectors (B, d) or None."""
        return to_float(self.x.index_select(0, indices)), self.labels.select(indices).values

    @cached_property
    def _content(self) -> str:
        return digest(self.split, self.num_classes, self.x, self.labels.values)

    @property
    def fingerprint(self) -> str:
        """Digest of values and labels, not of names or places: data may be moved."""
        return self.identity or self._content

    def at(self, rows: Int[Tensor, " m"]) -> ArrayDataset:
        """Some of the rows, as a data set."""
        identity = self.identity and digest(self.identity, rows)
        return replace(self, x=self.x[rows], labels=self.labels.select(rows), identity=identity)


def to_float(x: Tensor) -> Tensor:
    """Bytes become float32 in [-1, 1]; floats pass."""
    return x if x.is_floating_point() else x.to(torch.float32).mul_(BYTE_SCALE).sub_(1.0)


def digest(*parts: Any) -> str:
    """Hexadecimal prefix of the sha256 of tensors (type, shape and bytes) and of printable values."""
    total = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            total.update(part.contiguous().numpy().data)
        else:
            total.update(f"{part!r};".encode())
    return total.hexdigest()[:FINGERPRINT_LENGTH]
