"""Whether a tensor's memory may be written over."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

# How many hold a storage, by torch. What of that is the asking itself differs from version to version, and there were
# builds without it.
_count = getattr(torch._C, "_storage_Use_Count", None)


def _holders(x: Tensor) -> tuple[int, int]:
    """Of the memory of x, and of the Python object that stands for it."""
    assert _count is not None
    storage = x.untyped_storage()
    return _count(storage._cdata), sys.getrefcount(storage)


_PROBE = torch.empty(1, device="cpu")
_ALONE = None if _count is None else _holders(_PROBE)


def alone(x: Tensor) -> bool:
    """Whether x is a plain tensor whose memory no view, storage or other process has; False where torch cannot tell.

    Who holds x itself is the caller's affair.
    """
    if _ALONE is None or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    try:
        return _holders(x) == _ALONE and not x.is_shared()
    except NotImplementedError:  # of torch.func, whose tensors have none
        return False
