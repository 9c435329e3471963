"""Sums of tensors, new ones, in as few passes over memory as torch has operations for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

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
    """By the number of terms: a sum, a new tensor, and one that is written over the first."""

    new: Mapping[int, Callable[..., Tensor]]
    over: Mapping[int, Callable[..., Tensor]]


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
            *({k: torch.compile(_copy(f, k), **how) for k in range(2, _TERMS + 1)} for f in (_sum, _sum_over))
        )
        rows = torch.zeros(4, _LARGE, device="cuda" if torch.cuda.is_available() else "cpu").split(1)
        with torch.no_grad():
            for kernel in kernels:
                kernel[3](rows[0][0, :3].clone(), *(row.clone().view(-1) for row in rows[1:]))
    except Exception as error:  # of torch, of the backend, or of the compiler
        said = " ".join(str(error).partition("\n\n")[0].split())
        raise ArgumentError(
            f"sums cannot be compiled by {backend!r} on this machine: {said}. Install a C++ compiler, on a GPU Triton, "
            "or do without fuse_sums"
        ) from error
    _kernels = kernels


def _sum(weights: Tensor, *tensors: Tensor) -> Tensor:
    total = weights[0] * tensors[0]
    for k, x in enumerate(tensors[1:], start=1):
        total = total + weights[k] * x
    return total


def _sum_over(weights: Tensor, *tensors: Tensor) -> Tensor:
    return tensors[0].copy_(_sum(weights, *tensors))


def _copy(function: Any, k: int) -> FunctionType:
    return FunctionType(function.__code__.replace(co_name=f"{function.__name__}_{k}"), globals())


def _fused(kernels: _Kernels, tensors: Sequence[Tensor], weights: Sequence[float], spent: Tensor | None) -> Tensor:
    over = tensors[0] is spent
    # Rows of numbers that are no views, so that what is compiled fits all shapes.
    terms, rest = [x.view(-1).data for x in tensors], list(weights)
    while len(terms) > 1:
        now = torch.tensor(rest[:_TERMS], dtype=terms[0].dtype, device=terms[0].device)
        kernel = (kernels.over if over else kernels.new)[len(now)]
        terms, rest = [kernel(now, *terms[:_TERMS]), *terms[_TERMS:]], [1.0, *rest[_TERMS:]]
        over = True  # the sum so far
    return tensors[0] if tensors[0] is spent else terms[0].view(tensors[0].shape)


def added(a: float, b: float) -> float:
    """a + b, 0 where all but rounding of them cancels."""
    found = a + b
    return 0.0 if abs(found) <= UNIT * abs(a) else found


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], spent: Tensor | None = None) -> Tensor:
    """`sum_j w_j x_j` of tensors of one shape, a new one unless one is `spent`.

    Two terms are one pass over memory where the first weight is 1, where they sum to 1 (every path with alpha = 1, and
    Linear), and, without gradients, of large tensors on a CPU; each further term is one more.

    Args:
        tensors: at least one.
        weights: theirs.
        spent: a tensor that is needed no longer, once among them or not at all: where no derivatives are asked it may
            be written over with the sum, and returned.
    """
    if spent is not None and _differentiating():
        spent = None
    terms = list(zip(tensors, weights))
    if spent is not None:  # read before it is written
        terms.sort(key=lambda term: term[0] is not spent)
    if _kernels is not None and len(terms) > 2 and _large(tensors, _WORTH_COMPILING):
        return _fused(_kernels, [x for x, _ in terms], [w for _, w in terms], spent)
    (first, weight), *rest = terms
    if not rest:
        return torch.mul(first, weight, out=spent)
    total = _two(first, weight, *rest[0], spent)
    for x, w in rest[1:]:
        total.add_(x, alpha=w)
    return total


def combine(x: Event, a: float, d: Event, b: float, spent: Event | None = None) -> Event:
    """`a x + b d`, as `weighted_sum`; x is left out where a is 0, whatever is in it."""
    if spent is not None and _differentiating():
        spent = None
    if a == 0:
        return torch.mul(d, b, out=spent)
    return _two(x, a, d, b, spent) if spent is not d else _two(d, b, x, a, spent)


def _two(x: Tensor, a: float, d: Tensor, b: float, spent: Tensor | None) -> Tensor:
    """`a x + b d`; `spent`: x, or neither, to be written over."""
    if abs(a - 1) <= UNIT:
        return torch.add(x, d, alpha=b, out=spent)
    if abs(a + b - 1) <= UNIT and x.dtype == d.dtype:
        # From the larger weight on: 1 - b in float32 has no digits of a small a.
        return torch.lerp(x, d, b, out=spent) if abs(b) <= abs(a) else torch.lerp(d, x, a, out=spent)
    if x.device.type == "cpu" and _large((x, d) if spent is None else (x, d, spent), _LARGE):
        # As a x + b 1 d^T: of all operations the one that weights two terms in a pass.
        out = None if spent is None else spent.view(1, -1)
        total = torch.addr(x.view(1, -1), x.new_ones(1), d.view(-1), beta=a, alpha=b, out=out)
        # Not a view, which would share its memory with what it is a view of.
        return torch.ops.aten._unsafe_view(total, x.shape) if spent is None else spent
    return torch.mul(x, a, out=spent).add_(d, alpha=b)


def large(x: Tensor) -> bool:
    """Whether x has so many numbers on a CPU that passes over them are what a sum costs."""
    return x.device.type == "cpu" and _large((x,), _LARGE)


def _differentiating() -> bool:
    """Whether derivatives may be asked, backward or forward."""
    return torch.is_grad_enabled() or getattr(forward_ad, "_current_level", -1) >= 0


def _large(tensors: Sequence[Tensor], least: int) -> bool:
    """Whether all can be seen as plain rows of the same many numbers, of which no derivatives are asked."""
    first = tensors[0]
    alike = all(x.is_contiguous() and x.dtype == first.dtype and x.device == first.device for x in tensors)
    return first.numel() >= least and alike and not _differentiating()
