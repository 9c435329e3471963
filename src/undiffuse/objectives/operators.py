"""The operators of generalized score matching: gradient, denoising, second order, and matrices on finite sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.autodiff import divergence, gradient, hutchinson, jvp, probe
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.objectives.adjoint import Field, LogProb, Operator, PerSample, Trial, finite_trial


@dataclass(frozen=True)
class Gradient(Operator):
    """`L = grad`: the target is the score, `L† s = -div s`, the objective implicit score matching (eq. 3.2.2).

    Args:
        probes: random directions that estimate the divergence; None: exact.
        kind: their law, as in `core.autodiff.probe`.
    """

    name: ClassVar[str] = "gradient"
    probes: int | None = None
    kind: str = "rademacher"

    def adjoint(self, field: Field, x: Tensor, generator: Generator = None) -> tuple[Tensor, PerSample]:
        value, spread = _divergence(field, x, self.probes, self.kind, generator)
        return value, -spread

    def ratio(self, log_prob: LogProb, x: Tensor) -> Tensor:
        return gradient(log_prob, x)[1]

    def to_check(self) -> Gradient:
        return replace(self, probes=None)


def _divergence(field: Field, x: Tensor, probes: int | None, kind: str, generator: Generator):
    if probes is None:
        return divergence(field, x)
    return hutchinson(field, x, probes=probes, kind=kind, generator=generator)


@dataclass(frozen=True)
class DenoisingOperator(Operator):
    """`L p = (x p + sigma^2 grad p) / alpha`: the target is `E[x_0 | x]` (Tweedie, eq. 3.3.6).

    `L† s = (x . s - sigma^2 div s) / alpha`. The data are draws of the noisy law, `x = alpha x_0 + sigma eps`; no clean
    data are needed. With alpha = 1 the objective J and SURE are one:

        SURE = |D - x|^2 + 2 sigma^2 div D - dim sigma^2 = 2 J + |x|^2 - dim sigma^2,

    and for any alpha `E|D - x_0|^2 = 2 E[J] + E|x_0|^2`, with `E|x_0|^2 = (E|x|^2 - dim sigma^2) / alpha^2`.

    Args:
        sigma: standard deviation of the noise in x, > 0.
        alpha: scale of the signal in x, not 0.
        probes, kind: as in `Gradient`.
    """

    name: ClassVar[str] = "denoising"
    method: ClassVar[str] = "denoise"
    sigma: float
    alpha: float = 1.0
    probes: int | None = None
    kind: str = "rademacher"

    def __post_init__(self):
        if not self.sigma > 0 or self.alpha == 0:
            raise ArgumentError(f"sigma is {self.sigma}, alpha {self.alpha}: expected sigma > 0 and alpha not 0")

    def adjoint(self, field: Field, x: Tensor, generator: Generator = None) -> tuple[Tensor, PerSample]:
        value, spread = _divergence(field, x, self.probes, self.kind, generator)
        return value, ((x * value).flatten(1).sum(1) - self.sigma**2 * spread) / self.alpha

    def ratio(self, log_prob: LogProb, x: Tensor) -> Tensor:
        return (x + self.sigma**2 * gradient(log_prob, x)[1]) / self.alpha

    def to_check(self) -> DenoisingOperator:
        return replace(self, probes=None)


@dataclass(frozen=True)
class SecondOrder(Operator):
    """`L` = Hessian: the target is `Hess log p + s s^T`, s the score; `L† S = sum_ij d_i d_j S_ij`.

    The field gives (B, D, D), D the size of an event; of a field that is not symmetric, L† sees the symmetric part.
    Exact: D products with its Jacobian, differentiated D times. Estimated: `u^T (d_u d_v S) v` for K pairs of
    independent directions u and v.

    Args:
        probes: pairs of directions; None: exact.
        kind: as in `Gradient`.
    """

    name: ClassVar[str] = "second-order"
    method: ClassVar[str] = "second"
    probes: int | None = None
    kind: str = "rademacher"

    def adjoint(self, field: Field, x: Tensor, generator: Generator = None) -> tuple[Tensor, PerSample]:
        if self.probes is None:
            value = field(x)
            self._check(value, x)
            return value, divergence(lambda y: _columns(field, y), x)[1]
        if self.probes < 1:
            raise ArgumentError(f"probes is {self.probes}: expected at least 1 pair of directions, or None")
        value, total = field(x), x.new_zeros(x.shape[0])
        self._check(value, x)
        for _ in range(self.probes):
            u, v = (probe(self.kind, x.shape, generator, dtype=x.dtype, device=x.device) for _ in range(2))
            total = total + _along(field, x, u, v)
        return value, total / self.probes

    def _check(self, value: Tensor, x: Tensor) -> None:
        size = math.prod(x.shape[1:])
        if value.shape != (x.shape[0], size, size):
            raise ArgumentError(
                f"the second-order field has shape {tuple(value.shape)} for x of shape {tuple(x.shape)}: expected "
                f"({x.shape[0]}, {size}, {size})"
            )

    def ratio(self, log_prob: LogProb, x: Tensor) -> Tensor:
        score = gradient(log_prob, x)[1].flatten(1)
        rows = [jvp(lambda y: gradient(log_prob, y)[1], x, unit)[1].flatten(1) for unit in _units(x)]
        return torch.stack(rows, 1) + score[:, :, None] * score[:, None, :]

    def to_check(self) -> SecondOrder:
        return replace(self, probes=None)


def _units(x: Tensor) -> list[Tensor]:
    basis = torch.eye(math.prod(x.shape[1:]), dtype=x.dtype, device=x.device)
    return [row.reshape(x.shape[1:]).expand(x.shape) for row in basis]


def _columns(field: Field, x: Tensor) -> Tensor:
    """`sum_j d_j S_ij`, of the shape of x."""
    slopes = [
        jvp(lambda y, j=j: field(y)[:, :, j].reshape(y.shape), x, unit)[1].flatten(1)
        for j, unit in enumerate(_units(x))
    ]
    return torch.stack(slopes).sum(0).reshape(x.shape)


def _along(field: Field, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """`u^T (d_u d_v S) v`."""

    def product(y: Tensor) -> Tensor:
        return (field(y) @ v.flatten(1)[:, :, None]).reshape(y.shape)

    slope = jvp(lambda y: jvp(product, y, v, "reverse")[1], x, u, "reverse")[1]
    return (u * slope).flatten(1).sum(1)


@dataclass(frozen=True)
class MatrixOperator(Operator):
    """A linear map of functions on {0, ..., n - 1}: a law p (n,) to `L p` (n, *part). Data are states, int64 (B,).

    The field is asked at every state for each row of the batch: for small n.

    Args:
        states: n.
        apply: L on a batch, (B, n) -> (B, n, *part).
        transpose: L† on a batch, (B, n, *part) -> (B, n).
    """

    name: ClassVar[str] = "matrix"
    states: int
    apply: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, matrix: Float[Tensor, "n *part n"]) -> MatrixOperator:
        """`(L p)(x)_k = sum_y A[x, k, y] p(y)` of a matrix (n, n), or (n, *part, n) where L p is no scalar."""
        rows = matrix.flatten(0, -2)
        return cls(
            matrix.shape[-1],
            lambda p: (p @ rows.to(p).mT).unflatten(1, matrix.shape[:-1]),
            lambda s: s.flatten(1) @ rows.to(s),
        )

    def _all(self, x: Tensor) -> Tensor:
        return torch.arange(self.states, device=x.device)

    def adjoint(
        self, field: Field, x: Int[Tensor, " b"], generator: Generator = None
    ) -> tuple[Float[Tensor, "b ..."], PerSample]:
        value = field(self._all(x).repeat(len(x))).unflatten(0, (len(x), self.states))
        row = torch.arange(len(x), device=x.device)
        return value[row, x], self.transpose(value)[row, x]

    def ratio(self, log_prob: LogProb, x: Int[Tensor, " b"]) -> Float[Tensor, "b ..."]:
        p = log_prob(self._all(x)).exp()
        image = self.apply(p[None])[0]
        return (image / p.reshape(-1, *[1] * (image.ndim - 1)))[x]

    def trial(self, generator: Generator) -> Trial:
        return finite_trial(torch.arange(self.states), lambda y: y, self.states, generator)
