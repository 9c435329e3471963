"""Divergences between two densities that are known: the f-divergences of section 1.1, and Fisher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.random import Generator


class Density(Protocol):
    """A law that can be drawn from and evaluated: an oracle, or a model with a likelihood."""

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        """`n` draws, (n, *event)."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, (n,)."""
        ...


class Scored(Protocol):
    """Anything with `grad log p(x)`."""

    def score(self, x: Tensor) -> Tensor:
        """(n, *event)."""
        ...


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo mean and its standard error."""

    value: float
    std_error: float


# Integrands under m = (p + q) / 2, as functions of r = log(p / q): p / m = 2 sigmoid(r), q / m = 2 sigmoid(-r).


def _kl(r: Tensor) -> Tensor:
    # r = -inf, outside the support of p, adds nothing.
    return torch.where(r == -torch.inf, torch.zeros_like(r), 2 * torch.sigmoid(r) * r)


def _jensen_shannon(r: Tensor) -> Tensor:
    def half(s: Tensor) -> Tensor:  # (p / 2m) log(p / m)
        share = torch.sigmoid(s)
        return torch.where(share == 0, torch.zeros_like(s), share * (logsigmoid(s) + torch.log(s.new_tensor(2.0))))

    return half(r) + half(-r)


F_DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": _kl,
    "reverse-kl": lambda r: _kl(-r),
    "jensen-shannon": _jensen_shannon,
    "total-variation": lambda r: torch.tanh(r / 2).abs(),
    "squared-hellinger": lambda r: 1 - torch.sqrt(1 - torch.tanh(r / 2).square()),
}


def f_divergence(p: Density, q: Density, n: int, kind: str = "kl", generator: Generator = None) -> Estimate:
    """`D_f(p | q) = integral of q f(p / q)` in nats, `f(1) = 0` (eq. 1.1.4), from n draws of p and n of q.

    "kl" is `E_p log(p / q)`, f(u) = u log u, which fits a model by maximum likelihood (lemma 1.1.1); "reverse-kl" is
    `E_q log(q / p)`; "jensen-shannon" `KL(p | m) / 2 + KL(q | m) / 2`, m the half-and-half mixture, at most log 2;
    "total-variation" `1/2 int |p - q|` and "squared-hellinger" `1/2 int (sqrt p - sqrt q)^2`, at most 1.

    All are means under m, in which the ratios p / m and q / m are at most 2: the bounded ones never overflow, and the
    two KLs are infinite only where a draw meets a density of zero.

    Raises:
        ArgumentError: unknown kind, n < 2, or a draw at which both log-densities are -inf or one is NaN.
    """
    integrand = choose(kind, F_DIVERGENCES, "divergence")
    if n < 2:
        raise ArgumentError(f"n is {n}: expected at least 2 draws of each density")
    values = []
    for drawn in (p.sample(n, generator), q.sample(n, generator)):
        r = (p.log_prob(drawn) - q.log_prob(drawn)).double()
        if bool(r.isnan().any()):
            raise ArgumentError(
                f"the log-ratio is NaN at {int(r.isnan().sum())} of {n} draws: a density is NaN there, or both are zero"
            )
        values.append(integrand(r))
    return _stratified(values)


def _stratified(halves: list[Tensor]) -> Estimate:
    value = sum(float(part.mean()) for part in halves) / len(halves)
    variance = sum(float(part.var()) / len(part) for part in halves) / len(halves) ** 2
    return Estimate(value, variance**0.5)


def fisher_divergence(p: Scored, q: Scored, x: Float[Tensor, "n *event"]) -> Estimate:
    """`D_F(p | q) = E_p |grad log p - grad log q|^2` over draws x of p (eq. 1.1.3): no normalising constant needed.

    Summed over the dimensions, without the factor 1/2 of the objectives.

    Raises:
        ArgumentError: fewer than 2 draws.
    """
    if x.shape[0] < 2:
        raise ArgumentError(f"{x.shape[0]} draws: expected at least 2")
    gap = (p.score(x) - q.score(x)).detach().double().flatten(1).square().sum(1)
    return Estimate(float(gap.mean()), float(gap.var() / len(gap)) ** 0.5)
