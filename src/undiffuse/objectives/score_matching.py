"""Score matching: fit `s(x) = grad log p(x)` to samples of p, by every route that does not need p itself.

Each objective is called as `objective(model, x, cond=None, generator=None) -> (B,)`; `model` is anything with
`.score(x, cond)`. REDUCTION: every value is per sample and SUMS over the event's dimensions, with the 1/2 of eq. 3.2.1;
SURE alone has no 1/2, being a squared error. With the score s* of p:

    explicit   E 1/2 |s - s*|^2
    implicit   the same minus E 1/2 |s*|^2; sliced and finite-difference sliced too
    denoising  the same at p_sigma, plus a constant
    SURE       2 sigma^4 times the implicit one at p_sigma, plus dim sigma^2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from undiffuse.core import autodiff, random
from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.random import Generator
from undiffuse.fields.denoiser import Cond, Event
from undiffuse.fields.energy import Energy, HasScore

PerSample = Float[Tensor, " b"]


class Objective(Protocol):
    """A loss per sample."""

    def __call__(self, model: HasScore, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample: ...


def _square(v: Tensor) -> Tensor:
    """`|v|^2` of each sample."""
    return v.flatten(1).square().sum(1)


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).flatten(1).sum(1)


def _check_probes(kind: str, probes: int) -> None:
    choose(kind, autodiff.PROBES, "probe")
    if probes < 1:
        raise ArgumentError(f"probes is {probes}: expected at least 1 random direction")


def _check_sigma(sigma: float) -> None:
    if not sigma > 0:
        raise ArgumentError(f"sigma is {sigma}: expected the standard deviation of the noise, > 0")


@dataclass(frozen=True)
class ExplicitScoreMatching:
    """`1/2 |s(x) - s*(x)|^2` (eq. 3.2.1): where the true score is known.

    Args:
        score: x -> s*(x), (B, *event).
    """

    score: Callable[[Tensor], Tensor]

    def __call__(self, model: HasScore, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample:
        """Per sample, summed over dimensions. Nothing is drawn."""
        return 0.5 * _square(model.score(x, cond) - self.score(x))


@dataclass(frozen=True)
class ImplicitScoreMatching:
    """`tr ds/dx + 1/2 |s(x)|^2` (eq. 3.2.2; Hyvarinen 2005), by parts from the explicit objective.

    Args:
        trace: "exact" (D products with the Jacobian) or "hutchinson" (`u^T J u`, one product per probe; unbiased).
        probe, probes: directions of the estimate, see `autodiff.probe`, and their number per sample.
        mode: "auto", "forward" or "reverse" differentiation.

    Raises:
        ArgumentError: an unknown name; probes < 1.
    """

    trace: str = "exact"
    probe: str = "rademacher"
    probes: int = 1
    mode: str = "auto"

    def __post_init__(self):
        choose(self.trace, dict.fromkeys(("exact", "hutchinson")), "trace")
        choose(self.mode, autodiff.MODES, "differentiation mode")
        _check_probes(self.probe, self.probes)

    def __call__(self, model: HasScore, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample:
        """Per sample, summed over dimensions."""
        f, mode = (lambda y: model.score(y, cond)), autodiff.MODES[self.mode]
        if self.trace == "exact":
            score, trace = autodiff.divergence(f, x, mode)
        else:
            score, trace = autodiff.hutchinson(
                f, x, probes=self.probes, kind=self.probe, generator=generator, mode=mode
            )
        return trace + 0.5 * _square(score)


@dataclass(frozen=True)
class SlicedScoreMatching:
    """`u^T J u + 1/2 (u^T s)^2`, mean over the probes u (Song et al. 2019).

    Its mean is the implicit objective for any u with `E[u u^T] = I`. The variance-reduced form keeps `1/2 |s|^2` whole:
    that is `ImplicitScoreMatching(trace="hutchinson")`, and it is computed by it.

    Args:
        probe, probes: directions, see `autodiff.probe`, and their number per sample.
        variance_reduced: average the second term in closed form.
        mode: "auto", "forward" or "reverse" differentiation.

    Raises:
        ArgumentError: an unknown name; probes < 1.
    """

    probe: str = "rademacher"
    probes: int = 1
    variance_reduced: bool = False
    mode: str = "auto"

    def __post_init__(self):
        choose(self.mode, autodiff.MODES, "differentiation mode")
        _check_probes(self.probe, self.probes)

    def __call__(self, model: HasScore, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample:
        """Per sample, summed over dimensions."""
        if self.variance_reduced:
            return ImplicitScoreMatching("hutchinson", self.probe, self.probes, self.mode)(model, x, cond, generator)
        total = x.new_zeros(x.shape[0])
        for _ in range(self.probes):
            u = autodiff.probe(self.probe, x.shape, generator, dtype=x.dtype, device=x.device)
            score, form = autodiff.quadratic_form(lambda y: model.score(y, cond), x, u, autodiff.MODES[self.mode])
            total = total + form + 0.5 * _dot(u, score).square()
        return total / self.probes


@dataclass(frozen=True)
class FiniteDifferenceSliced:
    """Sliced score matching without second derivatives (Pang et al. 2020): central differences along `v = h u`.

    of="energy", with f = -E = log p + const, `model(x, cond)` -> (B,):
        `[f(x + v) + f(x - v) - 2 f(x)] / h^2  +  [f(x + v) - f(x - v)]^2 / (8 h^2)`
    of="score":
        `u^T [s(x + v) - s(x - v)] / (2 h)  +  [u^T (s(x + v) + s(x - v))]^2 / 8`

    Both are the sliced objective of the same u plus O(h^2): along u, g(r) = f(x + r u),

        energy  `h^2 (g''''/12 + g' g'''/6)`        score  `h^2 (g''''/6 + g' g'''/2)`

    Step: let l be the shortest length over which the score changes (the smallest mode's standard deviation). The
    relative error is of order (h/l)^2 / 10; rounding adds about `4 eps |E| / h^2` to an energy's 1 / l^2, and
    `eps |s| / h` to a score's. In float32 h = l / 10 is safe for both: at |E| of 10 in ten dimensions an energy is off
    by 0.08 %, by 0.2 % at l / 100 and by 20 % at l / 1000, where a score is still right. The default suits l of 1.

    Args:
        step: h, in units of x.
        probe, probes: directions, see `autodiff.probe`, and their number per sample.
        of: "energy" (3 calls of the energy, no derivative in x at all) or "score" (2 calls of the score per probe).

    Raises:
        ArgumentError: step <= 0; an unknown name; probes < 1; at the call, an energy of another shape than (B,).
    """

    step: float = 0.1
    probe: str = "rademacher"
    probes: int = 1
    of: str = "energy"

    def __post_init__(self):
        if not self.step > 0:
            raise ArgumentError(f"step is {self.step}: expected a distance > 0, in units of x")
        choose(self.of, _DIFFERENCES, "kind of model")
        _check_probes(self.probe, self.probes)

    def __call__(self, model: HasScore, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample:
        """Per sample, summed over dimensions."""
        along = _DIFFERENCES[self.of](model, x, cond, self.step)
        total = x.new_zeros(x.shape[0])
        for _ in range(self.probes):
            total = total + along(autodiff.probe(self.probe, x.shape, generator, dtype=x.dtype, device=x.device))
        return total / self.probes


def _energy_differences(model: Energy, x: Tensor, cond: Cond, step: float) -> Callable[[Tensor], Tensor]:
    here = _energies(model, x, cond)

    def along(u: Tensor) -> Tensor:
        ahead, behind = _energies(model, x + step * u, cond), _energies(model, x - step * u, cond)
        return (2 * here - ahead - behind) / step**2 + (ahead - behind).square() / (8 * step**2)

    return along


def _energies(model: Energy, x: Tensor, cond: Cond) -> Tensor:
    energy = model(x, cond)
    if energy.shape != x.shape[:1]:
        raise ArgumentError(
            f"the model returned shape {tuple(energy.shape)} for x of shape {tuple(x.shape)}: of='energy' expects an "
            f"energy, ({x.shape[0]},); for a model of the score use of='score'"
        )
    return energy


def _score_differences(model: HasScore, x: Tensor, cond: Cond, step: float) -> Callable[[Tensor], Tensor]:
    def along(u: Tensor) -> Tensor:
        ahead, behind = _dot(u, model.score(x + step * u, cond)), _dot(u, model.score(x - step * u, cond))
        return (ahead - behind) / (2 * step) + (ahead + behind).square() / 8

    return along


_DIFFERENCES: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "energy": _energy_differences,
    "score": _score_differences,
}


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """`1/2 |s(x~) + eps / sigma|^2` at `x~ = alpha x + sigma eps` (eq. 3.3.4, there for alpha = 1; Vincent 2011).

    Its mean is `E 1/2 |s - s*|^2` under the law p_sigma of x~, plus a constant (theorem 3.3.1).

    Args:
        sigma, alpha: standard deviation of the noise, and factor on the clean sample.

    Raises:
        ArgumentError: sigma <= 0.
    """

    sigma: float
    alpha: float = 1.0

    def __post_init__(self):
        _check_sigma(self.sigma)

    def __call__(self, model: HasScore, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample:
        """Per sample, summed over dimensions; x is clean."""
        return self.at(model, x, random.normal(x.shape, generator, dtype=x.dtype, device=x.device), cond)

    def at(self, model: HasScore, x: Event, noise: Event, cond: Cond = None) -> PerSample:
        """The objective without its randomness: at the standard normal noise given."""
        return 0.5 * _square(model.score(self.alpha * x + self.sigma * noise, cond) + noise / self.sigma)


@dataclass(frozen=True)
class SURE:
    """`|D(x) - x|^2 + 2 sigma^2 div D(x) - dim sigma^2` with `D(x) = x + sigma^2 s(x)` (Stein 1981; eq. 3.3.7 of the
    lecture): an unbiased estimate of `|D(x) - x_clean|^2` from the noisy observation `x = x_clean + sigma eps` alone.

    In terms of the score it is `2 sigma^4 (tr ds/dx + 1/2 |s|^2) + dim sigma^2`, the implicit objective of the noisy
    data, and so it is computed; a denoiser enters as `DenoisingScore(denoise, sigma)`. A sum, without 1/2.

    Args:
        sigma: standard deviation of the noise in x.
        trace, probes, probe, mode: as in `ImplicitScoreMatching`.

    Raises:
        ArgumentError: sigma <= 0; an unknown name; probes < 1.
    """

    sigma: float
    trace: str = "hutchinson"
    probes: int = 1
    probe: str = "rademacher"
    mode: str = "auto"

    def __post_init__(self):
        _check_sigma(self.sigma)
        self._implicit()

    def _implicit(self) -> ImplicitScoreMatching:
        return ImplicitScoreMatching(self.trace, self.probe, self.probes, self.mode)

    def __call__(self, model: HasScore, x: Event, cond: Cond = None, generator: Generator = None) -> PerSample:
        """Per sample, summed over dimensions; x is the noisy observation. May be negative for one sample."""
        implicit = self._implicit()(model, x, cond, generator)
        return 2 * self.sigma**4 * implicit + self.sigma**2 * math.prod(x.shape[1:])


SCORE_MATCHING: dict[str, Callable[..., Objective]] = {
    "implicit": ImplicitScoreMatching,
    "sliced": SlicedScoreMatching,
    "sliced-vr": partial(SlicedScoreMatching, variance_reduced=True),
    "finite-difference": FiniteDifferenceSliced,
    "denoising-score-matching": DenoisingScoreMatching,
    "sure": SURE,
}
