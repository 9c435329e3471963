"""Splits and subsets that depend on a row's name or number only, never on a generator's state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undiffuse.core.errors import DataError
from undiffuse.core.random import Streams, hash_key


def row_positions(n: int) -> Float[Tensor, " n"]:
    """A fixed uniform number in (0, 1) for each of rows 0 ... n - 1."""
    return Streams.of(hash_key("data", "held-out"), n).uniform((n,), dtype=torch.float64)


def name_positions(names: Sequence[str]) -> Float[Tensor, " n"]:
    """A uniform number in [0, 1) for each name, so that a file keeps its split when others come or go."""
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    # 53 bits: what a float64 holds.
    values = [(int.from_bytes(d[:8], "big") >> 11) * 2.0**-53 for d in digests]
    return torch.tensor(values, dtype=torch.float64)


def split_rows(positions: Float[Tensor, " n"], split: str, held_out: float) -> Int[Tensor, " m"]:
    """Rows of "train" (position >= held_out) or "held-out" (below).

    Raises:
        DataError: no row falls into the split.
    """
    mask: Bool[Tensor, " n"] = positions < held_out
    rows = (mask if split == "held-out" else ~mask).nonzero()[:, 0]
    if len(rows) == 0:
        raise DataError(
            f"the {split} split is empty: {len(positions)} rows of which a share held_out={held_out} is set apart; "
            "give more data or another data.held_out"
        )
    return rows


def subset(n: int, limit: int | None) -> Int[Tensor, " m"]:
    """At most `limit` of rows 0 ... n - 1: a fixed random choice, in order."""
    if limit is None or limit >= n:
        return torch.arange(n)
    key = Streams.of(hash_key("data", "limit"), n).bits((n,))
    return key.argsort()[:limit].sort().values
