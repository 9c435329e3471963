"""Score matching of discrete data: ratios of probabilities between neighbours take the place of the score.

Data are tokens x (B, L), int64, each of V values; a neighbour `x' = x[l -> v]` changes one position. A model gives
`ratios(x, cond)` (B, L, V), positive, entry (l, v) standing for `p(x[l -> v]) / p(x)`; entries at v = x_l are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.fields.denoiser import Cond
from undiffuse.objectives.adjoint import Field, LogProb, Operator, Trial, finite_trial
from undiffuse.objectives.generalized import GeneralizedScoreMatching, rows_of

Tokens = Int[Tensor, "b l"]
Ratios = Float[Tensor, "b l v"]
PerSample = Float[Tensor, " b"]

# Values with which the adjoint is checked: what is said of three is said of any number.
_CHECKED = 3


class HasRatios(Protocol):
    """What these objectives need of a model."""

    def ratios(self, x: Tensor, cond: Cond = None) -> Tensor:
        """`p(x[l -> v]) / p(x)`, (B, L, V), positive."""
        ...


def own_values(x: Tokens, values: int) -> Bool[Tensor, "b l v"]:
    """Where v = x_l: the entries that are no neighbours.

    Raises:
        ArgumentError: a token outside 0 ... V - 1 (looked for on the CPU only).
    """
    if x.device.type == "cpu" and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < values:
        raise ArgumentError(f"tokens from {int(x.min())} to {int(x.max())}: expected 0 to {values - 1}")
    return x[:, :, None] == torch.arange(values, device=x.device)


def checked_ratios(model: HasRatios, x: Tokens, cond: Cond, values: int) -> Ratios:
    """The model's ratios, 1 at v = x_l.

    Raises:
        ArgumentError: ratios of another shape, or not positive (looked for on the CPU only).
    """
    ratios = model.ratios(x, cond)
    if ratios.shape != (*x.shape, values):
        raise ArgumentError(
            f"the model's ratios have shape {tuple(ratios.shape)} for tokens of shape {tuple(x.shape)}: expected "
            f"{(*x.shape, values)}, one number for each value at each position"
        )
    ratios = torch.where(own_values(x, values), torch.ones_like(ratios), ratios)
    if ratios.device.type == "cpu" and ratios.numel() and not float(ratios.detach().min()) > 0:
        raise ArgumentError(
            f"the model's ratios go down to {float(ratios.detach().min()):g}: expected numbers > 0, such as exp(output)"
        )
    return ratios


def neighbours_of(x: Tokens, values: int, drawn: int | None, generator: Generator = None) -> tuple[Tensor, Tensor]:
    """Neighbours (B, N, L) and the positions (B, N) where they differ: all L (V - 1), or so many drawn of them."""
    batch, length = x.shape
    count = length * (values - 1)
    if drawn is None:
        index = torch.arange(count, device=x.device).expand(batch, count)
    else:
        index = random.integers(count, (batch, drawn), generator, device=x.device)
    place = index // (values - 1)
    there = place[:, :, None] == torch.arange(length, device=x.device)
    moved = (x[:, None, :] + (1 + index % (values - 1))[:, :, None]) % values
    return torch.where(there, moved, x[:, None, :].expand_as(there)), place


def seen_from_neighbours(
    field: Field, x: Tokens, values: int, drawn: int | None, generator: Generator = None
) -> PerSample:
    """`sum over neighbours x' of f(x')_x`, f of shape (B, L, V); unbiased where neighbours are drawn."""
    near, place = neighbours_of(x, values, drawn, generator)
    batch, number, length = near.shape
    answer = field(near.reshape(batch * number, length)).reshape(batch, number, length, values)
    at_place = answer.gather(2, place[:, :, None, None].expand(-1, -1, 1, values))[:, :, 0]
    back = at_place.gather(2, x.gather(1, place)[:, :, None])[:, :, 0]
    return back.sum(1) * (length * (values - 1) / number)


def _check_sizes(values: int, neighbours: int | None) -> None:
    if values < 2 or (neighbours is not None and neighbours < 1):
        raise ArgumentError(
            f"values is {values}, neighbours {neighbours}: expected at least 2 values, and at least 1 drawn neighbour "
            "or None for all"
        )


@dataclass(frozen=True)
class Differences(Operator):
    """`(L p)(x)_{l,v} = p(x[l -> v]) - p(x)`: the target is the concrete score `p(x') / p(x) - 1` (Meng et al. 2022).

    `(L† c)(x) = sum over neighbours x' of c(x')_x - c(x)_x'`, c(x')_x the entry of c(x') that leads back to x.

    Args:
        values: V.
        neighbours: how many neighbours are drawn for the first sum; None: all L (V - 1) of them.
    """

    name: ClassVar[str] = "differences"
    method: ClassVar[str] = "concrete_score"
    values: int
    neighbours: int | None = None

    def __post_init__(self):
        _check_sizes(self.values, self.neighbours)

    def adjoint(self, field: Field, x: Tokens, generator: Generator = None) -> tuple[Ratios, PerSample]:
        value = field(x)
        away = value.masked_fill(own_values(x, self.values), 0).sum((1, 2))
        return value, seen_from_neighbours(field, x, self.values, self.neighbours, generator) - away

    def ratio(self, log_prob: LogProb, x: Tokens) -> Ratios:
        return ratios_of(log_prob, x, self.values) - 1

    def to_check(self) -> Differences:
        return Differences(min(self.values, _CHECKED))

    def trial(self, generator: Generator) -> Trial:
        values = torch.arange(self.to_check().values)
        every = torch.cartesian_prod(values, values)
        return finite_trial(every, lambda y: y[:, 0] * len(values) + y[:, 1], len(every), generator)


def ratios_of(log_prob: LogProb, x: Tokens, values: int) -> Ratios:
    """The true `p(x[l -> v]) / p(x)` of a law that is known, 1 at v = x_l."""
    batch, length = x.shape
    near, place = neighbours_of(x, values, None)
    change = log_prob(near.reshape(-1, length)).reshape(batch, -1) - log_prob(x)[:, None]
    ratios = change.new_ones(batch, length * values)
    entry = place * values + near.gather(2, place[:, :, None])[:, :, 0]
    return ratios.scatter(1, entry, change.exp()).reshape(batch, length, values)


class ConcreteScoreMatching(GeneralizedScoreMatching):
    """`J = sum over x' of 1/2 c(x)_x'^2 + c(x)_x' - c(x')_x`, with `c = ratios - 1` (Meng et al. 2022).

    The generalized objective for `Differences`: `E_p [J] = E_p [1/2 |c - c_p|^2] + const`, c_p the concrete score of p.
    The sum over the L (V - 1) neighbours, with the 1/2. It is half the loss as printed in that paper.

    Args:
        values: V.
        neighbours: how many neighbours are drawn for the last term; None: all, L (V - 1) calls of the model in one.

    Raises:
        ArgumentError: V < 2, no neighbour; at the call, tokens or ratios out of range.
    """

    def __init__(self, values: int, neighbours: int | None = None):
        def concrete_score(model: HasRatios, x: Tokens, cond: Cond) -> Ratios:
            return checked_ratios(model, x, cond, values) - 1

        super().__init__(Differences(values, neighbours), concrete_score)


class ScoreEntropy:
    """`J = sum over x' of s(x)_x' - log s(x')_x`, s the model's ratios (Lou, Meng and Ermon 2024, implicit form).

    `E_p [J] = E_p [sum s(x)_x' - a log s(x)_x' + a (log a - 1)] + const`, `a = p(x') / p(x)`: a divergence whose terms
    are >= 0, and 0 where s = a. The sum over the L (V - 1) neighbours, all of weight 1.

    Args:
        values: V.
        neighbours: how many neighbours are drawn for the last term; None: all, L (V - 1) calls of the model in one.

    Raises:
        ArgumentError: V < 2, no neighbour; at the call, tokens or ratios out of range.
    """

    def __init__(self, values: int, neighbours: int | None = None):
        _check_sizes(values, neighbours)
        self.values, self.neighbours = values, neighbours

    def __repr__(self) -> str:
        return f"ScoreEntropy(values={self.values}, neighbours={self.neighbours})"

    def __call__(self, model: HasRatios, x: Tokens, cond: Cond = None, generator: Generator = None) -> PerSample:
        """One value per sample."""

        def logarithm(y: Tensor) -> Tensor:
            return checked_ratios(model, y, rows_of(cond, len(y) // max(1, len(x))), self.values).log()

        away = checked_ratios(model, x, cond, self.values).masked_fill(own_values(x, self.values), 0).sum((1, 2))
        return away - seen_from_neighbours(logarithm, x, self.values, self.neighbours, generator)

    def explicit(self, model: HasRatios, x: Tokens, target: Ratios, cond: Cond = None) -> PerSample:
        """`sum over x' of s - a log s + a (log a - 1)` with the ratios a known, `ratios_of(log_prob, x, values)`."""
        terms = _entropy(checked_ratios(model, x, cond, self.values), target)
        return terms.masked_fill(own_values(x, self.values), 0).sum((1, 2))


def _entropy(s: Tensor, a: Tensor) -> Tensor:
    return s - a * s.log() + torch.xlogy(a, a) - a


@dataclass(frozen=True)
class UniformFlips:
    """Each position is replaced, with probability `rate`, by a value drawn uniformly from all V.

    `k(v | u) = (1 - rate) [v = u] + rate / V`.

    Raises:
        ArgumentError: V < 2; a rate outside (0, 1]: without flips a neighbour has probability 0.
    """

    values: int
    rate: float

    def __post_init__(self):
        if self.values < 2 or not 0 < self.rate <= 1:
            raise ArgumentError(f"values is {self.values}, rate {self.rate}: expected values >= 2, 0 < rate <= 1")

    def draw(self, x_0: Tokens, generator: Generator = None) -> Tokens:
        """A corrupted copy."""
        flipped = random.uniform(x_0.shape, generator, device=x_0.device) < self.rate
        return torch.where(flipped, random.integers(self.values, x_0.shape, generator, device=x_0.device), x_0)

    def ratios(self, x: Tokens, x_0: Tokens) -> Float[Tensor, "b l v"]:
        """`k(v | x_0) / k(x | x_0)` at each position, float64."""
        return self._chance(own_values(x_0, self.values)) / self._chance(x == x_0)[:, :, None]

    def _chance(self, same: Tensor) -> Tensor:
        """`k(v | u)` where v = u, and where not."""
        return (1 - self.rate) * same.double() + self.rate / self.values


class DenoisingScoreEntropy:
    """`J = sum over x' of s(x)_x' - a log s(x)_x' + a (log a - 1)`, `a = k(x' | x_0) / k(x | x_0)` (Lou et al. 2024).

    x is a corrupted copy of the clean x_0; the minimiser is the ratio of the corrupted law, the mean of a given x. One
    call of the model; the terms are >= 0, their mean at the minimum is not 0. The sum over the L (V - 1) neighbours.

    Args:
        kernel: the corruption, each position on its own, with `values`, `draw(x_0, generator)` and `ratios(x, x_0)`.
    """

    def __init__(self, kernel: UniformFlips):
        self.kernel = kernel

    def __repr__(self) -> str:
        return f"DenoisingScoreEntropy({self.kernel})"

    def __call__(self, model: HasRatios, x_0: Tokens, cond: Cond = None, generator: Generator = None) -> PerSample:
        """One value per sample, at a corruption drawn from `generator`."""
        return self.at(model, x_0, self.kernel.draw(x_0, generator), cond)

    def at(self, model: HasRatios, x_0: Tokens, x: Tokens, cond: Cond = None) -> PerSample:
        """The objective at the corrupted x given: without its randomness."""
        s = checked_ratios(model, x, cond, self.kernel.values)
        terms = _entropy(s, self.kernel.ratios(x, x_0).to(s.dtype))
        return terms.masked_fill(own_values(x, self.kernel.values), 0).sum((1, 2))
