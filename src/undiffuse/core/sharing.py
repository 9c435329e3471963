"""Whether a tensor's memory may be written over."""

from __future__ import annotations

import torch
from torch import Tensor

# How many hold a storage, by torch. What of that is the asking itself differs from version to version, and there were
# builds without it.
_count = getattr(torch._C, "_storage_Use_Count", None)


def _holders(x: Tensor) -> int:
    assert _count is not None
    return _count(x.untyped_storage()._cdata)


_ALONE = None if _count is None else _holders(torch.empty(1))


def alone(x: Tensor) -> bool:
    """Whether x is a plain tensor that shares its memory with no other one, a view say; False where torch cannot tell.

    Who holds x itself is the caller's affair.
    """
    if _ALONE is None or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    try:
        return _holders(x) == _ALONE
    except NotImplementedError:  # of torch.func, whose tensors have none
        return False
