"""The partition function: annealed importance sampling, forward and back, brackets log Z from both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.fields.energy import Energy
from undiffuse.inference.annealing import Annealing, Base, Event
from undiffuse.solvers.markov import Kernel


@dataclass(frozen=True)
class LogPartition:
    """An estimate of log Z from n independent chains.

    Attributes:
        log_z: nats. Its expectation is at most log Z if it was made forward, at least log Z if in reverse.
        standard_error: of log_z, nats, by the delta method: that of the mean weight over the mean weight. It knows
            nothing of modes that no chain has found.
        ess: effective sample size `(sum w)^2 / sum w^2`, between 1 and n; the standard error needs some tens.
        log_weights: log of each chain's estimate of Z, (n,), float64.
        betas: 0 = beta_0 < ... < beta_K = 1.
        acceptance: mean probability of acceptance at beta_1 ... beta_{K-1}, (K - 1,); None where nothing is rejected.
    """

    log_z: float
    standard_error: float
    ess: float
    log_weights: Float[Tensor, " n"]
    betas: Float[Tensor, " k"]
    acceptance: Float[Tensor, " k1"] | None


@dataclass(frozen=True)
class Bracket:
    """log Z from below and from above."""

    lower: LogPartition
    upper: LogPartition

    @property
    def log_z(self) -> tuple[float, float]:
        """`(lower, upper)`, nats."""
        return self.lower.log_z, self.upper.log_z


def annealed_importance_sampling(
    energy: Energy,
    base: Base,
    *,
    kernel: Kernel,
    temperatures: int | Float[Tensor, " k"] = 1000,
    n: int = 100,
    steps_per_temperature: int = 1,
    generator: Generator = None,
) -> LogPartition:
    """A stochastic lower bound of `log Z = log int exp(-E)` (Neal 2001).

    `x_0 ~ base`; `log w += E_{k-1}(x_{k-1}) - E_k(x_{k-1})`, then `x_k` from `x_{k-1}` by a kernel that leaves
    `exp(-E_k)` invariant, for k = 1 ... K. `E_k = (1 - beta_k) (-log p_base) + beta_k E`, or the energy's own
    `anneal(base, beta_k)`. `E[w] = Z` whatever the kernel and the temperatures, so `E[log mean w] <= log Z`.

    Args:
        energy: E. Of a conditional one, `FunctionEnergy(lambda x: E(x, cond))` with E in evaluation mode.
        base: normalised, sampled exactly, and wide enough to cover the energy's modes.
        kernel: exact, such as `MALA`, `HMC` or `BlockGibbs`; its step size serves every temperature.
        temperatures: K, for `beta_k = k / K`; or the betas themselves, from 0 to 1.
        n: number of chains.
        steps_per_temperature: steps of the kernel at each of beta_1 ... beta_{K-1}.
        generator: with streams, one per chain, a chain does not depend on its neighbours.

    Raises:
        ArgumentError: a kernel that is not exact, betas that do not increase from 0 to 1, fewer than 2 chains, a base
            whose events have another shape than the energy's.
        SamplingError: weights or states that are not finite: how many, which chains, and at which beta.
    """
    way = Annealing(energy, base, kernel, temperatures, steps_per_temperature)
    if n < 2:
        raise ArgumentError(f"n is {n}: a standard error needs at least 2 chains, a good one some hundreds")
    return _record(*way.walk(base.sample(n, generator), generator, down=False), way.betas, 1)


def reverse_annealed_importance_sampling(
    energy: Energy,
    base: Base,
    samples: Event,
    *,
    kernel: Kernel,
    temperatures: int | Float[Tensor, " k"] = 1000,
    steps_per_temperature: int = 1,
    generator: Generator = None,
) -> LogPartition:
    """A stochastic upper bound of log Z (Grosse, Ghahramani and Adams 2015; Burda, Grosse and Salakhutdinov 2015).

    From samples of `exp(-E) / Z` the chains of `annealed_importance_sampling` are run backwards, beta_{K-1} ... beta_1,
    with the same weights: `E[1 / w] = 1 / Z`, so `E[-log mean(1 / w)] >= log Z`. The kernel must be reversible, as
    MALA, HMC and BlockGibbs are.

    Args:
        samples: exact, or the end of long runs, (n, *event): if they miss a mode the bound is no bound.

    Raises:
        ArgumentError: as forward; samples of another event shape, or fewer than 2.
        SamplingError: as forward.
    """
    way = Annealing(energy, base, kernel, temperatures, steps_per_temperature)
    if tuple(samples.shape[1:]) != tuple(base.event):
        raise ArgumentError(
            f"samples have shape {tuple(samples.shape)}: expected (n, {', '.join(map(str, base.event))}), events of "
            f"the base"
        )
    if len(samples) < 2:
        raise ArgumentError(f"{len(samples)} samples: a standard error needs at least 2, a good one some hundreds")
    return _record(*way.walk(samples.detach(), generator, down=True), way.betas, -1)


def bracket_log_z(
    energy: Energy,
    base: Base,
    samples: Event,
    *,
    kernel: Kernel,
    temperatures: int | Float[Tensor, " k"] = 1000,
    steps_per_temperature: int = 1,
    generator: Generator = None,
) -> Bracket:
    """log Z from both sides: annealed importance sampling forward and in reverse, as many chains as there are samples.

    In expectation `lower <= log Z <= upper`; their distance, with the two standard errors, says how far to trust them.

    Raises:
        ArgumentError: see the two functions.
        SamplingError: see the two functions.
    """
    above = reverse_annealed_importance_sampling(
        energy,
        base,
        samples,
        kernel=kernel,
        temperatures=temperatures,
        steps_per_temperature=steps_per_temperature,
        generator=generator,
    )
    below = annealed_importance_sampling(
        energy,
        base,
        kernel=kernel,
        temperatures=temperatures,
        n=len(samples),
        steps_per_temperature=steps_per_temperature,
        generator=generator,
    )
    return Bracket(below, above)


def _record(log_weights: Tensor, accepted: Tensor | None, betas: Tensor, sign: int) -> LogPartition:
    """Mean, its error and the effective size, of w (sign 1) or 1 / w (sign -1)."""
    n = len(log_weights)
    scaled = sign * log_weights
    mean = float(scaled.logsumexp(0)) - math.log(n)
    relative = (scaled - mean).exp()  # of mean 1
    error = float(relative.std()) / math.sqrt(n)
    ess = n / float(relative.square().mean())
    return LogPartition(sign * mean, error, ess, log_weights, betas, accepted)
