"""Integrals along a solution: of what the solution does not need to know of, at places of their own.

What only adds up along the way, as the log-density does, need not be asked for at every stage of every step that finds
the way. A rule of higher order asks at fewer places, on the states between the steps: that of Clenshaw and Curtis
(1960), the integral over a panel of the polynomial through n + 1 Chebyshev points,

    integral = (b - a) / 2 sum_k c_k 2 / (1 - k^2), k even,    c_k its coefficients in the polynomials T_k.

The last c_k, and half as many points, tell the error. Where it is too large n doubles, which keeps all values; then the
panel is halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undiffuse.core.errors import SamplingError
from undiffuse.solvers.adaptive import Tolerance
from undiffuse.solvers.solution import Track

# (positions (n,), states (n, D), which samples they are (n,)) -> numbers (n,)
Integrand = Callable[[Tensor, Tensor, Tensor], Tensor]

# A panel is at first up to 6 accepted steps. Of 3 to 8 steps and first and last n from 6 to 48 these needed the fewest
# evaluations at an error within the tolerance, on mixtures in 2 to 64 dimensions, wide and narrow.
_STEPS, _FIRST, _LAST = 6, 8, 32


@dataclass(frozen=True)
class _Panels:
    """Intervals of samples' ways, and the integrand at n + 1 Chebyshev points of each, from a to b."""

    rows: Int[Tensor, " p"]
    a: Float[Tensor, " p"]
    b: Float[Tensor, " p"]
    values: Float[Tensor, "p n"]

    def only(self, keep: Bool[Tensor, " p"]) -> _Panels:
        return _Panels(*(value[keep] for value in vars(self).values()))

    def integrals(self) -> tuple[Tensor, Tensor]:
        """The integral over each and the estimate of its error.

        That is what the last three coefficients would add; T_2n, which at these points looks like T_0 and is about
        last^2 / most where the integrand is smooth; and the error that half the points make times what doubling them
        took off those coefficients: little where it is smooth, a quarter at a kink.
        """
        half = 0.5 * (self.b - self.a)
        value, last, most = _integrated(self.values.double())
        coarse, before, _ = _integrated(self.values[:, ::2].detach().double())
        n = self.values.shape[1] - 1
        error = last * (2 / (n * n - 1) + 2 * last / most) + (value.detach() - coarse).abs() * (last / before).clamp(
            max=1
        )
        return half * value, half.abs() * error

    def points(self, shares: Float[Tensor, " m"]) -> Float[Tensor, "p m"]:
        """Positions at shares of -1 to 1 of each panel."""
        shares = shares.to(self.a.device)
        return 0.5 * (self.a[:, None] * (1 - shares) + self.b[:, None] * (1 + shares))


def _chebyshev(n: int) -> Float[Tensor, " m"]:
    """`-cos(j pi / n)`, j = 0 ... n, rising."""
    return torch.sin(0.5 * math.pi * torch.arange(-n, n + 1, 2, dtype=torch.float64) / n)


@cache
def _rule(n: int) -> tuple[Float[Tensor, "m m"], Float[Tensor, " m"]]:
    """The matrix from values at the points to coefficients, and the integrals of T_0 ... T_n over [-1, 1]; n even."""
    k = torch.arange(n + 1, dtype=torch.float64)
    ends = torch.where((k == 0) | (k == n), 0.5, 1.0)
    # The points rise, so T_k(x_j) = (-1)^k cos(j k pi / n).
    sign = 1 - 2 * (k % 2)
    matrix = (2 / n) * (ends * sign)[:, None] * torch.cos(k[:, None] * k * (math.pi / n)) * ends
    return matrix, torch.where(k % 2 == 0, 2 / (1 - k * k), 0.0)


def _integrated(values: Float[Tensor, "p m"]) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals over [-1, 1], the largest of the last three coefficients, and of all."""
    to_coefficients, weights = (table.to(values.device) for table in _rule(values.shape[1] - 1))
    coefficients = values @ to_coefficients.mT
    sizes = coefficients.detach().abs().clamp(min=torch.finfo(torch.float64).tiny)
    return coefficients @ weights, sizes[:, -3:].amax(1), sizes.amax(1)


def integrate_along(
    integrand: Integrand, track: Track, tolerance: Tolerance, *, at_once: int
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """The integral of `integrand` along each sample's way, and how often it was evaluated for each.

    A sample's panels are its own, whoever shares the batch. Where gradients are enabled they flow through the values.

    Args:
        integrand: a number for each of some points of some samples' ways; a sample may be asked for at several.
        track: the ways, of samples 0 ... B - 1.
        tolerance: the error allowed to a panel, relative to the size of the whole integral; `max_steps` bounds the
            evaluations per sample.
        at_once: points for one call of the integrand.

    Raises:
        SamplingError: an integrand that is not finite, or a tolerance that cannot be met.
    """
    count = int(track.rows[-1]) + 1

    def asked(panels: _Panels, shares: Tensor) -> Tensor:
        position = panels.points(shares)
        rows = panels.rows[:, None].expand(position.shape).flatten()
        parts = [
            integrand(where, track.at(where, own), own)
            for where, own in zip(position.flatten().split(at_once), rows.split(at_once))
        ]
        return torch.cat(parts).reshape(position.shape)

    def fresh(rows: Tensor, a: Tensor, b: Tensor) -> _Panels:
        panels = _Panels(rows, a, b, a.new_empty(len(a), 0))
        return replace(panels, values=asked(panels, _chebyshev(_FIRST)))

    total = torch.zeros(count, dtype=torch.float64, device=track.y.device)
    evals = torch.zeros(count, dtype=torch.int64, device=track.y.device)
    waiting = [fresh(*_panels(track))]
    size = total.index_add(0, waiting[0].rows, waiting[0].integrals()[0].detach()).abs()
    while waiting:
        panels = waiting.pop()
        n = panels.values.shape[1] - 1
        evals.index_add_(0, panels.rows, torch.full_like(panels.rows, n + 1 if n == _FIRST else n // 2))
        value, error = panels.integrals()
        settled = tolerance.norm(error[:, None], size[panels.rows, None]) < 1
        total = total.index_add(0, panels.rows[settled], value[settled])
        if bool(settled.all()):
            continue
        rest = panels.only(~settled)
        _check(rest, evals, tolerance)
        if n < _LAST:
            new = asked(rest, _chebyshev(2 * n)[1::2])
            pairs = torch.stack([rest.values[:, :-1], new], 2).flatten(1)
            waiting.append(replace(rest, values=torch.cat([pairs, rest.values[:, -1:]], 1)))
        else:
            middle = 0.5 * (rest.a + rest.b)
            waiting.append(fresh(rest.rows.repeat(2), torch.cat([rest.a, middle]), torch.cat([middle, rest.b])))
    return total.to(track.y.dtype), evals


def _panels(track: Track) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, a, b): the ways cut into panels of 6 steps at most, as equal in steps as can be."""
    steps = torch.bincount(track.rows)
    first = steps.cumsum(0) - steps
    index, steps = torch.arange(len(track.rows), device=steps.device) - first[track.rows], steps[track.rows]
    panels = (steps + _STEPS - 1) // _STEPS
    opens = ((index == 0) | (index * panels // steps != (index - 1) * panels // steps)).nonzero()[:, 0]
    last = torch.cat([opens[1:], opens.new_tensor([len(track.rows)])]) - 1
    return track.rows[opens], track.start[opens], track.start[last] + track.length[last]


def _check(panels: _Panels, evals: Tensor, tolerance: Tolerance) -> None:
    bad = panels.rows[~torch.isfinite(panels.values).all(1)]
    if len(bad):
        raise SamplingError(
            f"the divergence is infinite or NaN along the way of {len(bad.unique())} of {len(evals)} samples (first: "
            f"{int(bad.min())}): check the weights and the condition"
        )
    most = int(evals[panels.rows].max())
    if most > tolerance.max_steps:
        raise SamplingError(
            f"rtol = {tolerance.rtol:g}, atol = {tolerance.atol:g} cannot be met: {most:,} evaluations did not find "
            f"the divergence's integral for {len(panels.rows.unique())} of {len(evals)} samples. Try larger tolerances "
            "or the state in float64; a field that is not smooth (dropout, rounding in 16 bits) allows no small ones"
        )
