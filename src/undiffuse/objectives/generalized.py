"""Generalized score matching: one objective for every linear operator L on densities, given its adjoint.

A field s matches `L p / p` where `E_p [1/2 |s - L p / p|^2]` is least (the generalized Fisher divergence, section 3.3;
Lyu 2009). Since `E_p [s . L p / p] = <L p, s> = <p, L† s>`, that is, up to a constant, an expectation under p of terms
in which p itself no longer stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.fields.denoiser import Cond
from undiffuse.objectives.adjoint import Operator, PerSample, check_adjoint
from undiffuse.objectives.operators import DenoisingOperator, Gradient, MatrixOperator, SecondOrder

__all__ = [
    "DenoisingOperator",
    "GeneralizedScoreMatching",
    "Gradient",
    "MatrixOperator",
    "Operator",
    "SecondOrder",
    "check_adjoint",
]


class GeneralizedScoreMatching:
    """`J = 1/2 |s(x)|^2 - (L† s)(x)`, summed over the entries of s; least where `s = L p / p` (section 3.3).

    `E_p [J] = E_p [1/2 |s - L p / p|^2] - E_p [1/2 |L p / p|^2]`. `Gradient` gives implicit score matching,
    `DenoisingOperator` SURE, `SecondOrder` the Hessian of the log-density, `MatrixOperator` and `Differences` the
    discrete forms.

    Args:
        operator: L; its adjoint is checked here, by `check_adjoint`.
        field: (model, x, cond) -> s(x); None: the model's method `operator.method` ("score", "denoise", "second").

    Raises:
        ArgumentError: an adjoint that does not match; at the call, a model without that method.
    """

    def __init__(self, operator: Operator, field: Callable[[Any, Tensor, Cond], Tensor] | None = None):
        check_adjoint(operator)
        self.operator, self.field = operator, field

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.operator})"

    def __call__(self, model: Any, x: Tensor, cond: Cond = None, generator: Generator = None) -> PerSample:
        """One value per sample."""
        field = self._field(model)

        def at(y: Tensor) -> Tensor:
            return field(y, rows_of(cond, len(y) // max(1, len(x))))

        value, pulled = self.operator.adjoint(at, x, generator)
        return 0.5 * value.reshape(len(x), -1).square().sum(1) - pulled

    def explicit(self, model: Any, x: Tensor, target: Tensor, cond: Cond = None) -> PerSample:
        """`1/2 |s(x) - target|^2` with the target known, `operator.ratio(law.log_prob, x)`: what J replaces."""
        return 0.5 * (self._field(model)(x, cond) - target).reshape(len(x), -1).square().sum(1)

    def _field(self, model: Any) -> Callable[[Tensor, Cond], Tensor]:
        if self.field is not None:
            given = self.field
            return lambda y, cond: given(model, y, cond)
        method = getattr(model, self.operator.method, None)
        if method is None:
            raise ArgumentError(
                f"{type(model).__name__} has no method '{self.operator.method}', which the operator "
                f"'{self.operator.name}' matches: give the objective field=(model, x, cond) -> s(x)"
            )
        return method


def rows_of(cond: Cond, times: int) -> Cond:
    """The condition of each row, for `times` rows."""
    if cond is None or times == 1:
        return cond
    if isinstance(cond, dict):
        return {name: value.repeat_interleave(times, 0) for name, value in cond.items()}
    return cond.repeat_interleave(times, 0)
