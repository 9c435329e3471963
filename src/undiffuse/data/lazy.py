"""Verified images: decoded in memory where they fit, on the way where they do not."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.errors import DataError
from undiffuse.data.dataset import ArrayDataset, Labelled, Labels, Skipped, digest, to_float
from undiffuse.data.images import Decoder, Unreadable
from undiffuse.data.records import Crew, Records, survey
from undiffuse.data.request import Request


class LazyImages(Labelled):
    """Images too many to keep decoded: each batch decodes its own. All have been read once before.

    Args:
        records: the readable rows.
        decoder: how they were read, and are again.
        shape: (C, H, W) of each.
        identity: digest of the encoded images, of how they are decoded, and of the labels.
        name: what it is called in print-outs.
        split: "train", "held-out" or the source's own name.
        skipped: what was left out.
    """

    def __init__(
        self,
        records: Records,
        decoder: Decoder,
        shape: tuple[int, ...],
        identity: str,
        name: str,
        split: str,
        skipped: list[Skipped],
    ):
        self.records, self.decoder = records, decoder
        self._shape, self._identity = shape, identity
        self.name, self.split, self.skipped = name, split, skipped
        self.labels: Labels = records.labels.select(records.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one image."""
        return self._shape

    @property
    def fingerprint(self) -> str:
        """Digest of the encoded images, of how they are decoded, and of the labels."""
        return self._identity

    @cached_property
    def _crew(self) -> Crew:
        return self.records.crew()

    def __len__(self) -> int:
        return len(self.records.rows)

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b ..."], Tensor | None]:
        """The rows at `indices`: x float32 (B, *shape); classes (B,), vectors (B, d) or None.

        Raises:
            DataError: a file was readable when the data were loaded and is not, or not the same, any more.
        """
        rows = self.records.rows[indices].tolist()
        images = list(self._crew.map(self._pixels, rows))
        return to_float(torch.from_numpy(np.stack(images))), self.labels.select(indices).values

    def _pixels(self, row: int) -> np.ndarray:
        image, _ = self.records.decode(row, self.decoder)
        if isinstance(image, Unreadable):
            raise DataError(f"{self.records.where(row)} has changed since it was first read: {image.reason}")
        if image.shape != self._shape:
            raise DataError(f"{self.records.where(row)} has changed since it was first read: shape {image.shape}")
        return image


def read_images(records: Records, request: Request, split: str) -> ArrayDataset | LazyImages:
    """All images of `records`, every one read once.

    Raises:
        DataError: see `survey`.
    """
    records = records.limited(request.limit)
    found = survey(records, request)
    good = records.select(torch.tensor(found.good))
    labels = good.labels.select(good.rows)
    identity = digest(
        split, labels.num_classes, request.height_width, found.shape, found.content.hexdigest(), labels.values
    )
    if found.pixels is not None:
        x = torch.from_numpy(found.pixels[: len(found.good)])
        return ArrayDataset(x, labels, request.name, split, found.skipped, identity)
    decoder = Decoder(request.height_width, request.channels)
    return LazyImages(good, decoder, found.shape, identity, request.name, split, found.skipped)
