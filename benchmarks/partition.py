"""log Z between its bounds by annealed importance sampling, where it is known: a mixture and two Boltzmann machines.

    python benchmarks/partition.py               # some seconds; --seed for other draws

Prints the two bounds less the true log Z in nats, their standard errors, and the effective sample sizes.
"""

from __future__ import annotations

import argparse
import math

import torch

import undiffuse as ud
from undiffuse.oracles import Bernoulli
from undiffuse.solvers import BlockGibbs

LIFT = 3.7  # added to the mixture's log-density, so that log Z is not 0


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cases() -> dict[str, tuple]:
    """Energy, log Z, base, a law of exact samples, kernel, chains."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    ring = ud.GaussianMixture(1.4 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.2))
    lifted = ud.FunctionEnergy(lambda x: -ring.log_prob(x) - LIFT)
    machine = ud.GaussianRBM(numbers(4, 6, seed=1), numbers(4, seed=2), numbers(6, seed=3), 0.7)
    moments = machine.mixture()
    near = ud.Gaussian(moments.mean, covariance=moments.covariance)
    binary = ud.BernoulliRBM(numbers(12, 8, seed=1), numbers(12, seed=2), numbers(8, seed=3))
    wide = ud.Gaussian(torch.zeros(2, dtype=torch.float64), 1.1)
    return {
        "mixture of 8, MALA": (lifted, LIFT, wide, ring, ud.MALA(0.04), 2000),
        "Gaussian RBM 4 x 6, MALA": (machine, machine.log_z, near, machine, ud.MALA(0.2), 1000),
        "binary RBM 12 x 8, Gibbs": (
            binary, binary.log_z, Bernoulli(binary.visible_bias.detach()), binary, BlockGibbs(), 1000,
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperatures", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    for name, (energy, log_z, base, exact, kernel, chains) in cases().items():
        samples = exact.sample(chains, generator)
        found = ud.bracket_log_z(
            energy, base, samples, kernel=kernel, temperatures=options.temperatures, generator=generator
        )
        lower, upper = found.log_z
        print(
            f"{name:26s} log Z {log_z:8.4f}: lower {lower - log_z:+.4f} +- {found.lower.standard_error:.4f}, upper "
            f"{upper - log_z:+.4f} +- {found.upper.standard_error:.4f}, ess {found.lower.ess:.0f} and "
            f"{found.upper.ess:.0f} of {chains}"
        )


if __name__ == "__main__":
    main()
