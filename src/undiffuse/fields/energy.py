"""`Energy`: an unnormalised density `p(x) = exp(-E(x)) / Z`, and what can be made of energies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.autodiff import gradient
from undiffuse.core.errors import ArgumentError
from undiffuse.core.shapes import as_time
from undiffuse.fields.denoiser import Cond, Denoiser, Event

PerSample = Float[Tensor, " b"]


@runtime_checkable
class HasScore(Protocol):
    """What Langevin dynamics and score matching need of a model: `grad log p(x)`."""

    def score(self, x: Tensor, cond: Cond = None) -> Tensor:
        """`grad log p(x)`, (B, *event)."""
        ...


class Energy(nn.Module):
    """`E(x)` with `p(x) = exp(-E(x)) / Z` (eq. 3.1.1); a subclass gives `forward`."""

    @abstractmethod
    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        """`E(x)` in nats, one number per sample."""

    def score(self, x: Event, cond: Cond = None) -> Event:
        """`grad log p(x) = -grad E(x)`; keeps its graph where gradients are enabled.

        Raises:
            ArgumentError: the energy returned another shape than (B,).
        """
        return self.energy_and_score(x, cond)[1]

    def energy_and_score(self, x: Event, cond: Cond = None) -> tuple[PerSample, Event]:
        """`(E(x), -grad E(x))` from one pass."""
        energy, slope = gradient(lambda y: self(y, cond), x)
        return energy, -slope


class NetworkEnergy(Energy):
    """`E(x) = net(x, 0, cond) + |x|^2 / (2 prior_std^2)`.

    The second term, where asked for, makes exp(-E) integrable whatever the network says far from the data.

    Args:
        net: called as `net(x, c_noise, cond)` with c_noise = 0 of shape (B,); returns (B,) or (B, 1).
        prior_std: standard deviation of the confining Gaussian; None: no such term.

    Raises:
        ArgumentError: prior_std <= 0; at the call, a network that returns another shape.
    """

    def __init__(self, net: nn.Module, prior_std: float | None = None):
        super().__init__()
        if prior_std is not None and not prior_std > 0:
            raise ArgumentError(f"prior_std is {prior_std}: expected a standard deviation > 0, or None")
        self.net = net
        self.prior_std = prior_std

    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        energy = self.net(x, x.new_zeros(x.shape[0]), cond)
        if energy.shape not in ((x.shape[0],), (x.shape[0], 1)):
            raise ArgumentError(
                f"the energy network returned shape {tuple(energy.shape)} for x of shape {tuple(x.shape)}: expected "
                f"one number per sample, ({x.shape[0]},)"
            )
        energy = energy.reshape(-1)
        if self.prior_std is None:
            return energy
        return energy + x.flatten(1).square().sum(1) / (2 * self.prior_std**2)


class FunctionEnergy(Energy):
    """A plain function `x -> (B,)` as an energy, differentiated by autograd."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        return self.function(x)


def _members(energies: Sequence[Energy], what: str) -> nn.ModuleList:
    if not energies:
        raise ArgumentError(f"{what} of no energies: give at least one")
    return nn.ModuleList(energies)


class ProductEnergy(Energy):
    """`E = sum_k E_k`: the product of the densities, a logical and."""

    def __init__(self, energies: Sequence[Energy]):
        super().__init__()
        self.energies = _members(energies, "a product")

    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        return torch.stack([energy(x, cond) for energy in self.energies]).sum(0)


class MixtureEnergy(Energy):
    """`E = -log sum_k w_k exp(-E_k)`: a logical or. The shares are w_k where the members have equal Z.

    Raises:
        ArgumentError: weights that are not as many positive numbers as there are energies.
    """

    log_weights: Tensor

    def __init__(self, energies: Sequence[Energy], weights: Sequence[float] | None = None):
        super().__init__()
        self.energies = _members(energies, "a mixture")
        given = torch.as_tensor([1.0] * len(energies) if weights is None else list(weights), dtype=torch.float64)
        if given.shape != (len(energies),) or not bool((given > 0).all()):
            raise ArgumentError(f"weights {given.tolist()}: expected {len(energies)} numbers > 0")
        self.register_buffer("log_weights", (given / given.sum()).log().to(torch.float32))

    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        stacked = torch.stack([-energy(x, cond) for energy in self.energies], 1)
        return -torch.logsumexp(stacked + self.log_weights.to(stacked), 1)


class MarginalEnergy(Energy):
    """`E(x) = -log sum_k w_k exp(-E(x, k))`, the law of x where w_k exp(-E(x, k)) is that of x and its label k.

    Energies trained at given labels know each class up to a constant of its own, which the weights are to make good:
    `log w_k = log p(k) - log Z_k`. To tell strangers, see `undiffuse.inference.NearestClass`.

    Args:
        energy: with a label 0 ... K - 1 as condition.
        log_weights: (K,).

    Raises:
        ArgumentError: weights of another shape; at the call, a condition.
    """

    log_weights: Tensor

    def __init__(self, energy: Energy, log_weights: Float[Tensor, " k"]):
        super().__init__()
        if log_weights.ndim != 1 or len(log_weights) == 0:
            raise ArgumentError(f"log_weights has shape {tuple(log_weights.shape)}: expected one number per class")
        self.energy = energy
        self.register_buffer("log_weights", log_weights.detach())

    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        if cond is not None:
            raise ArgumentError("a marginal energy sums over all labels: cond must be None")
        n, k = len(x), len(self.log_weights)
        labels = torch.arange(k, device=x.device).repeat(n)
        energies = self.energy(x.repeat_interleave(k, 0), labels).reshape(n, k)
        return -torch.logsumexp(self.log_weights.to(energies) - energies, 1)


class TemperedEnergy(Energy):
    """`E / T`: the density to the power 1 / T.

    Raises:
        ArgumentError: temperature <= 0.
    """

    def __init__(self, energy: Energy, temperature: float):
        super().__init__()
        if not temperature > 0:
            raise ArgumentError(f"temperature is {temperature}: expected > 0")
        self.energy, self.temperature = energy, temperature

    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        return self.energy(x, cond) / self.temperature


class ScoreNetwork(nn.Module):
    """A network read as a score: `s(x) = net(x, 0, cond)`, (B, *event). Nothing makes it a gradient."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Event, cond: Cond = None) -> Event:
        return self.score(x, cond)

    def score(self, x: Event, cond: Cond = None) -> Event:
        """`net(x, 0, cond)`.

        Raises:
            ArgumentError: a network that returns another shape.
        """
        value = self.net(x, x.new_zeros(x.shape[0]), cond)
        if value.shape != x.shape:
            raise ArgumentError(
                f"the network returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}: expected the same"
            )
        return value


class DenoiserAt(nn.Module):
    """A denoiser at one time: `score(x)` is that of `p_t`, and `denoise(x)` is `E[x_0 | x_t = x]`."""

    def __init__(self, denoiser: Denoiser, t: float):
        super().__init__()
        self.denoiser, self.t = denoiser, float(t)
        denoiser.path.check_time(torch.tensor(self.t, dtype=torch.float64))

    def forward(self, x: Event, cond: Cond = None) -> Event:
        return self.score(x, cond)

    def score(self, x: Event, cond: Cond = None) -> Event:
        """`grad log p_t(x)`."""
        return self.denoiser.score(x, as_time(self.t, x), cond)

    def denoise(self, x: Event, cond: Cond = None) -> Event:
        """`E[x_0 | x_t = x]`."""
        return self.denoiser(x, as_time(self.t, x), cond)


class DenoisingScore(nn.Module):
    """The score of a denoiser of one noise level, `s(x) = (D(x) - x) / sigma^2` (Tweedie, eq. 3.3.6).

    Args:
        denoiser: called as `denoiser(x)`, or `denoiser(x, cond)` where there is a condition; returns D(x), (B, *event).
            A module's parameters are this module's.
        sigma: standard deviation of the noise it removes.

    Raises:
        ArgumentError: sigma <= 0.
    """

    def __init__(self, denoiser: Callable[..., Tensor], sigma: float):
        super().__init__()
        if not sigma > 0:
            raise ArgumentError(f"sigma is {sigma}: expected the standard deviation of the noise, > 0")
        self.denoiser, self.sigma = denoiser, sigma

    def forward(self, x: Event, cond: Cond = None) -> Event:
        return self.score(x, cond)

    def score(self, x: Event, cond: Cond = None) -> Event:
        """`(D(x) - x) / sigma^2`."""
        return (self.denoise(x, cond) - x) / self.sigma**2

    def denoise(self, x: Event, cond: Cond = None) -> Event:
        """`D(x)`."""
        return self.denoiser(x) if cond is None else self.denoiser(x, cond)


def log_density_ratio(
    model: HasScore, x: Event, reference: Float[Tensor, "*event"], *, points: int = 32, cond: Cond = None
) -> PerSample:
    """`log p(x) - log p(x_ref) = integral from 0 to 1 of s(x_ref + u (x - x_ref))^T (x - x_ref) du` (section 3.1.2).

    Gauss-Legendre quadrature with `points` nodes, one call of the score each; exact for a score that is a polynomial of
    degree `2 points - 1` along the line. Where s is no gradient the value depends on the line.

    Raises:
        ArgumentError: a reference of another shape than an event; points < 1.
    """
    if reference.shape != x.shape[1:]:
        raise ArgumentError(f"reference has shape {tuple(reference.shape)}: expected an event, {tuple(x.shape[1:])}")
    if points < 1:
        raise ArgumentError(f"points is {points}: expected at least 1")
    nodes, weights = np.polynomial.legendre.leggauss(points)
    way = x - reference
    total = x.new_zeros(x.shape[0])
    for node, weight in zip(nodes.tolist(), weights.tolist()):
        slope = model.score(reference + 0.5 * (node + 1) * way, cond)
        total = total + 0.5 * weight * (slope * way).flatten(1).sum(1)
    return total
