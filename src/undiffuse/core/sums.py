"""Sums of tensors, new ones, in as few passes over memory as torch has operations for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError

Event = Float[Tensor, "b *event"]

# Rounding of three float64 operations; below it a + b is 1.
UNIT = 4 * torch.finfo(torch.float64).eps


# From this many numbers on two weighted terms in one pass pay. Measured in float32 on one thread of a CPU: two terms of
# 2^16 numbers take 0.9 of the time, of 2^17 to 2^21 0.7 to 0.8; three 0.8 to 0.9. In pieces that stay in the cache sums
# of 3 M numbers take longer, 1.1 times with pieces of 2^20, as every piece begins anew.
_LARGE = 1 << 16
# And from this many on one compiled pass, whose call takes some 30 us: of three terms of 2^16, 2^18, 2^20, 2^21 numbers
# 1.8, 1.3, 1.0, 0.9 of the time of two passes.
_WORTH_COMPILING = 1 << 20


class _Kernels(NamedTuple):
    """By the number of terms: a sum, and two sums of the same tensors."""

    one: Mapping[int, Callable[..., Tensor]]
    two: Mapping[int, Callable[..., tuple[Tensor, Tensor]]]


_kernels: _Kernels | None = None
# Terms of a compiled sum at most; longer ones go on from the sum so far.
_TERMS = 6


def fuse_sums(on: bool = True, backend: str = "inductor") -> None:
    """Make each sum of three and more large tensors one pass over memory, by `torch.compile`; in the whole process.

    The steps of solvers are such sums. Without it they take a pass for two terms and one for each further term. Large
    is 2^20 numbers and more: below, calling what is compiled takes longer than what it saves. A sum of three is
    compiled here, those of other numbers of terms when they come; each takes seconds and needs a C++ compiler, on a
    GPU Triton. Results change by rounding.

    Args:
        on: False undoes it.
        backend: of `torch.compile`.

    Raises:
        ArgumentError: the backend cannot compile here; sums stay as they were without it.
    """
    global _kernels
    _kernels = None
    if not on:
        return
    how: dict[str, Any] = {"dynamic": True, "backend": backend}
    try:
        # Each has code of its own, of which torch makes few variants: of dtypes, devices and modes.
        kernels = _Kernels(
            *({k: torch.compile(_copy(f, k), **how) for k in range(2, _TERMS + 1)} for f in (_sum, _sums))
        )
        rows = torch.zeros(4, _LARGE, device="cuda" if torch.cuda.is_available() else "cpu").split(1)
        with torch.no_grad():
            kernels.one[3](rows[0][0, :3], *_rows(rows[1:]))
    except Exception as error:  # of torch, of the backend, or of the compiler
        said = " ".join(str(error).partition("\n\n")[0].split())
        raise ArgumentError(
            f"sums cannot be compiled by {backend!r} on this machine: {said}. Install a C++ compiler, on a GPU Triton, "
            "or do without fuse_sums"
        ) from error
    _kernels = kernels


def fusing(x: Tensor) -> bool:
    """Whether sums of three tensors and more such as x are one pass."""
    return _kernels is not None and _large((x,), _WORTH_COMPILING)


def _sum(weights: Tensor, *tensors: Tensor) -> Tensor:
    total = weights[0] * tensors[0]
    for k, x in enumerate(tensors[1:], start=1):
        total = total + weights[k] * x
    return total


def _sums(weights: Tensor, others: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return _sum(weights, *tensors), _sum(others, *tensors)


def _copy(function: Any, k: int) -> FunctionType:
    return FunctionType(function.__code__.replace(co_name=f"{function.__name__}_{k}"), globals())


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Rows of numbers that are no views, so that what is compiled fits all shapes."""
    return [x.view(-1).data for x in tensors]


def _fused(kernels: Mapping[int, Callable[..., Tensor]], tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    shape, terms, rest = tensors[0].shape, _rows(tensors), list(weights)
    while len(terms) > 1:
        now = torch.tensor(rest[:_TERMS], dtype=terms[0].dtype, device=terms[0].device)
        terms, rest = [kernels[len(now)](now, *terms[:_TERMS]), *terms[_TERMS:]], [1.0, *rest[_TERMS:]]
    return terms[0].view(shape)


def added(a: float, b: float) -> float:
    """a + b, 0 where all but rounding of them cancels."""
    found = a + b
    return 0.0 if abs(found) <= UNIT * abs(a) else found


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_j w_j x_j` of tensors of one shape, a new one.

    Many numbers on a CPU, without gradients: the first two terms in one pass.
    """
    first, *rest = tensors
    if _kernels is not None and len(tensors) > 2 and _large(tensors, _WORTH_COMPILING):
        return _fused(_kernels.one, tensors, weights)
    if rest and abs(weights[0] - 1) <= UNIT:
        total = torch.add(first, rest.pop(0), alpha=weights[1])
    elif rest and first.device.type == "cpu" and _large(tensors[:2], _LARGE):
        total = _two(first, weights[0], rest.pop(0), weights[1])
    else:
        total = torch.mul(first, weights[0])
    for x, w in zip(rest, weights[len(tensors) - len(rest) :]):
        total.add_(x, alpha=w)
    return total


def weighted_sums(
    tensors: Sequence[Tensor], weights: Sequence[float], others: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Two sums of the same tensors; in one pass where sums are fused."""
    if _kernels is not None and 2 <= len(tensors) <= _TERMS and _large(tensors, _WORTH_COMPILING):
        like, rows = tensors[0], _rows(tensors)
        both = [torch.tensor(list(w), dtype=like.dtype, device=like.device) for w in (weights, others)]
        first, second = _kernels.two[len(rows)](*both, *rows)
        return first.view(like.shape), second.view(like.shape)
    first, second = ([(x, v) for x, v in zip(tensors, w) if v != 0] for w in (weights, others))
    return weighted_sum(*zip(*first)), weighted_sum(*zip(*second))


def _large(tensors: Sequence[Tensor], least: int) -> bool:
    """Whether all can be seen as plain rows of the same many numbers, of which no gradient is asked."""
    first = tensors[0]
    alike = all(x.is_contiguous() and x.dtype == first.dtype and x.device == first.device for x in tensors)
    return first.numel() >= least and alike and not torch.is_grad_enabled()


def _two(x: Tensor, a: float, d: Tensor, b: float) -> Tensor:
    """`a x + b d` as `a x + b 1 d^T`: of all operations the one that weights two terms in a pass."""
    return torch.addr(x.view(1, -1), x.new_ones(1), d.view(-1), beta=a, alpha=b).view(x.shape)


def combine(x: Event, a: float, d: Event, b: float, *, spend: bool = False) -> Event:
    """`a x + b d`, in one pass over memory where a is 0 or 1, a + b = 1 (every path with alpha = 1, and Linear), or the
    tensors are large.

    x is left out where a is 0, whatever is in it, but not where d is spent.

    `spend`: d is the caller's own, and is overwritten.
    """
    whole = abs(a + b - 1) <= UNIT
    if spend:
        return d.lerp_(x, a) if whole else d.mul_(b).add_(x, alpha=a)
    if a == 0:
        return d * b
    if abs(a - 1) <= UNIT:
        return torch.add(x, d, alpha=b)
    return torch.lerp(d, x, a) if whole else weighted_sum((x, d), (a, b))
