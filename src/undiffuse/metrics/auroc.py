"""The area under the receiver operating characteristic: how well a score tells two sets apart."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError


def auroc(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> float:
    """`P(a < b) + P(a = b) / 2` for a of `inside`, b of `outside`: 1 where every score outside is larger.

    Exact: all n m pairs are counted, ties by half, in O((n + m) log(n + m)).

    Raises:
        ArgumentError: an empty set, or a score that is NaN.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1 or len(scores) == 0 or bool(torch.isnan(scores).any()):
            raise ArgumentError(
                f"{name}: {tuple(scores.shape)} scores, {int(torch.isnan(scores).sum())} of them NaN: expected (n,), "
                "n >= 1, all numbers"
            )
    both = torch.promote_types(inside.dtype, outside.dtype)
    values, place = torch.unique(torch.cat([inside.to(both), outside.to(both)]), return_inverse=True)
    a = torch.bincount(place[: len(inside)], minlength=len(values))
    b = torch.bincount(place[len(inside) :], minlength=len(values))
    below = a.cumsum(0) - a
    # Twice the count of pairs, an integer: half a pair per tie.
    return int((b * (2 * below + a)).sum()) / (2 * len(inside) * len(outside))
