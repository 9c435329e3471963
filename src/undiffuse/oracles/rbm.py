"""Restricted Boltzmann machines as energies of their visible units, small enough to enumerate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.oracles.energies import KnownEnergy
from undiffuse.oracles.law import Cond
from undiffuse.oracles.mixture import GaussianMixture

MOST_UNITS = 20
_CHUNK = 2**14  # states looked at together: 100 MB for 784 units in the other layer


class BinaryEnergy(KnownEnergy):
    """An energy of vectors of zeros and ones, (B, V); `log_z` is the log of a sum over all 2^V of them."""

    def check(self, x: Tensor, cond: Cond) -> None:
        """Raise on values other than 0 and 1 too: a kernel for continuous x would leave the support unnoticed."""
        super().check(x, cond)
        # Looking at the values would stop a GPU's queue, and break a compiled graph.
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and bool((x * (1 - x) != 0).any()):
            raise ArgumentError(
                f"{type(self).__name__} is an energy of zeros and ones: x holds other values; move x with a kernel for "
                f"binary units, such as BlockGibbs"
            )


class Bernoulli(BinaryEnergy):
    """Independent units, `E(x) = -bias^T x`: `P(x_i = 1) = sigmoid(bias_i)`, `log_z = sum_i softplus(bias_i)`.

    Args:
        bias: log-odds, (V,).
    """

    bias: Tensor

    def __init__(self, bias: Float[Tensor, " v"]):
        super().__init__(tuple(bias.shape), bias.dtype, bias.device)
        self.register_buffer("bias", bias.detach().clone())

    @property
    def log_z(self) -> float:
        return float(F.softplus(self.bias.double()).sum())

    def forward(self, x: Float[Tensor, "b v"], cond: Cond = None) -> Float[Tensor, " b"]:
        self.check(x, cond)
        return -x @ self.bias.to(x.dtype)

    def sample(self, n: int, generator: Generator = None) -> Float[Tensor, "n v"]:
        u = random.uniform((n, *self.event), generator, dtype=self.bias.dtype, device=self.bias.device)
        return (u < self.bias.sigmoid()).to(u.dtype)


class BernoulliRBM(BinaryEnergy):
    """Binary visible and hidden units, `E(x, h) = -b^T x - c^T h - x^T W h`, as the free energy of the visible ones:

    `E(x) = -b^T x - sum_j softplus(c_j + (x^T W)_j)` (Salakhutdinov and Murray 2008, section 2).

    The parameters can be trained. `log_z` and `sample` enumerate the smaller layer.

    Args:
        weight: W, (V, H).
        visible_bias: b, (V,).
        hidden_bias: c, (H,).

    Raises:
        ArgumentError: biases that do not fit the weight; at the call, x that is not (B, V) of zeros and ones; at
            `log_z` and `sample`, more than 20 units in the smaller layer.
    """

    def __init__(
        self, weight: Float[Tensor, "v h"], visible_bias: Float[Tensor, " v2"], hidden_bias: Float[Tensor, " h2"]
    ):
        _check_sizes("BernoulliRBM", weight, visible_bias, hidden_bias)
        super().__init__((weight.shape[0],), weight.dtype, weight.device)
        self.weight = nn.Parameter(weight.detach().clone())
        self.visible_bias = nn.Parameter(visible_bias.detach().clone())
        self.hidden_bias = nn.Parameter(hidden_bias.detach().clone())

    def forward(self, x: Float[Tensor, "b v"], cond: Cond = None) -> Float[Tensor, " b"]:
        self.check(x, cond)
        inputs = self.hidden_bias.to(x.dtype) + x @ self.weight.to(x.dtype)
        return -x @ self.visible_bias.to(x.dtype) - F.softplus(inputs).sum(1)

    @property
    def log_z(self) -> float:
        return float(self._log_weights().logsumexp(0))

    @torch.no_grad()
    def _log_weights(self) -> Float[Tensor, " states"]:
        """For every state of the smaller layer, the log of the sum of exp(-E) over the other, in float64."""
        weight, b, c = (p.double() for p in (self.weight, self.visible_bias, self.hidden_bias))
        if weight.shape[1] > weight.shape[0]:
            weight, b, c = weight.mT, c, b

        def of(states: Tensor) -> Tensor:
            return states @ c + F.softplus(b + states @ weight.mT).sum(1)

        return over_states(of, weight.shape[1], weight)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator = None) -> Float[Tensor, "n v"]:
        log_weights, units = self._log_weights(), min(self.weight.shape)
        u = random.uniform((n, 1 + self.event[0]), generator, dtype=torch.float64, device=log_weights.device)
        drawn = binary_states(pick(log_weights, u[:, 0]), units).to(self.weight.dtype)
        if self.weight.shape[1] > self.weight.shape[0]:
            return drawn
        return (u[:, 1:] < self.visible_given(drawn)).to(drawn.dtype)

    def hidden_given(self, x: Float[Tensor, "b v"]) -> Float[Tensor, "b h"]:
        """`P(h_j = 1 | x) = sigmoid(c_j + (x^T W)_j)`."""
        return torch.sigmoid(self.hidden_bias.to(x.dtype) + x @ self.weight.to(x.dtype))

    def visible_given(self, h: Float[Tensor, "b h"]) -> Float[Tensor, "b v"]:
        """`P(x_i = 1 | h) = sigmoid(b_i + (W h)_i)`."""
        return torch.sigmoid(self.visible_bias.to(h.dtype) + h @ self.weight.to(h.dtype).mT)

    def anneal(self, base: Bernoulli, beta: float) -> Self:
        """The machine between independent units and this one: `beta W`, `(1 - beta) b_base + beta b`, `beta c`.

        (Salakhutdinov and Murray 2008, for a base without couplings.) Block Gibbs sampling can move this machine; the
        geometric mean of the two densities is none.

        Raises:
            ArgumentError: a base that is not made of independent binary units.
        """
        if not isinstance(base, Bernoulli) or base.event != self.event:
            raise ArgumentError(
                f"the base of a BernoulliRBM must be a Bernoulli of {self.event[0]} units: given {type(base).__name__}"
            )
        bias = (1 - beta) * base.bias.to(self.visible_bias) + beta * self.visible_bias
        return type(self)(beta * self.weight, bias, beta * self.hidden_bias)


class GaussianRBM(KnownEnergy):
    """Gaussian visible units, binary hidden ones (Cho, Ilin and Raiko 2011), as a free energy of the visible:

    `E(x) = sum_i (x_i - b_i)^2 / (2 s_i^2) - sum_j softplus(c_j + sum_i W_ij x_i / s_i^2)`.

    Given h, `x ~ N(b + W h, diag s^2)`: it is a mixture of 2^H Gaussians with log-weights
    `c^T h + sum_i (m_i(h)^2 - b_i^2) / (2 s_i^2)`, `m = b + W h`, and Z is their sum times `prod_i sqrt(2 pi) s_i`.
    The parameters b, c and W can be trained.

    Args:
        weight: W, (V, H).
        visible_bias: b, (V,).
        hidden_bias: c, (H,).
        std: s, a number or (V,).

    Raises:
        ArgumentError: biases that do not fit the weight, a std <= 0; at the call, x of another shape than (B, V); at
            `log_z`, `mixture` and `sample`, more than 20 hidden units.
    """

    std: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "v h"],
        visible_bias: Float[Tensor, " v2"],
        hidden_bias: Float[Tensor, " h2"],
        std: Tensor | float = 1.0,
    ):
        _check_sizes("GaussianRBM", weight, visible_bias, hidden_bias)
        super().__init__((weight.shape[0],), weight.dtype, weight.device)
        spread = torch.as_tensor(std, dtype=weight.dtype, device=weight.device)
        if spread.shape not in ((), self.event) or not bool((spread > 0).all()):
            raise ArgumentError(
                f"GaussianRBM: std has shape {tuple(spread.shape)}, least value {float(spread.min())}: expected a "
                f"number or shape {self.event}, all positive"
            )
        self.weight = nn.Parameter(weight.detach().clone())
        self.visible_bias = nn.Parameter(visible_bias.detach().clone())
        self.hidden_bias = nn.Parameter(hidden_bias.detach().clone())
        self.register_buffer("std", spread.detach().expand(self.event).clone())

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(x - b) / s^2`, and what the hidden units receive."""
        precision = self.std.to(x.dtype) ** -2
        inputs = self.hidden_bias.to(x.dtype) + (x * precision) @ self.weight.to(x.dtype)
        return (x - self.visible_bias.to(x.dtype)) * precision, inputs

    def _energy(self, x: Tensor, pull: Tensor, inputs: Tensor) -> Tensor:
        return ((x - self.visible_bias.to(x.dtype)) * pull).sum(1) / 2 - F.softplus(inputs).sum(1)

    def forward(self, x: Float[Tensor, "b v"], cond: Cond = None) -> Float[Tensor, " b"]:
        self.check(x, cond)
        return self._energy(x, *self._inputs(x))

    def energy_and_score(self, x, cond=None):
        self.check(x, cond)
        pull, inputs = self._inputs(x)
        expected = torch.sigmoid(inputs) @ self.weight.to(x.dtype).mT / self.std.to(x.dtype).square()
        return self._energy(x, pull, inputs), expected - pull

    def _wide(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight.double(), self.visible_bias.double(), self.hidden_bias.double(), self.std.double()

    @torch.no_grad()
    def _log_weights(self) -> Float[Tensor, " states"]:
        """Of the mixture's components, one for every state of the hidden units, in float64."""
        weight, b, c, std = self._wide()

        def of(states: Tensor) -> Tensor:
            shift = states @ weight.mT
            # m^2 - b^2 = (m - b)(m + b), without its cancellation
            return states @ c + (shift * (shift + 2 * b) / (2 * std.square())).sum(1)

        return over_states(of, weight.shape[1], weight)

    @property
    def log_z(self) -> float:
        volume = self.event[0] / 2 * math.log(2 * math.pi) + float(self.std.double().log().sum())
        return float(self._log_weights().logsumexp(0)) + volume

    @torch.no_grad()
    def _means(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n v"]:
        """`b + W h` for the hidden states of these indices, in float64."""
        weight, b, _, _ = self._wide()
        return b + binary_states(index, weight.shape[1]) @ weight.mT

    def mixture(self) -> GaussianMixture:
        """The same distribution as a law of 2^H components."""
        log_weights = self._log_weights()
        means = self._means(torch.arange(len(log_weights), device=log_weights.device))
        return GaussianMixture(means, self.std.double().expand(means.shape), log_weights.softmax(0)).to(self.std.dtype)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator = None) -> Float[Tensor, "n v"]:
        log_weights = self._log_weights()
        u = random.uniform((n,), generator, dtype=torch.float64, device=log_weights.device)
        return self._means(pick(log_weights, u)).to(self.std.dtype) + self.std * self.normal(n, generator)


def _check_sizes(name: str, weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor) -> None:
    if (*visible_bias.shape, *hidden_bias.shape) != tuple(weight.shape) or weight.numel() == 0:
        raise ArgumentError(
            f"{name}: weight has shape {tuple(weight.shape)}, the biases {tuple(visible_bias.shape)} and "
            f"{tuple(hidden_bias.shape)}: expected (V, H), (V,) and (H,)"
        )


def binary_states(index: Int[Tensor, " n"], units: int) -> Float[Tensor, "n units"]:
    """The binary digits of each index, lowest first: `arange(2^units)` gives all vectors of zeros and ones."""
    return ((index[:, None] >> torch.arange(units, device=index.device)) & 1).double()


def over_states(f: Callable[[Tensor], Tensor], units: int, like: Tensor) -> Float[Tensor, " states"]:
    """f, which maps (n, units) to (n,), of all 2^units binary states.

    Raises:
        ArgumentError: more than 20 units.
    """
    if units > MOST_UNITS:
        raise ArgumentError(
            f"{units} binary units: 2^{units} states are too many to enumerate (at most {MOST_UNITS} units); "
            f"estimate log Z by annealed importance sampling"
        )
    index = torch.arange(2**units, device=like.device)
    return torch.cat([f(binary_states(part, units)) for part in index.split(_CHUNK)])


def pick(log_weights: Float[Tensor, " k"], u: Float[Tensor, " n"]) -> Tensor:
    """Index k with probability proportional to exp(log_weights), from uniforms on [0, 1)."""
    steps = log_weights.softmax(0).cumsum(0)
    return torch.searchsorted(steps, u * steps[-1], right=True).clamp(max=len(steps) - 1)
