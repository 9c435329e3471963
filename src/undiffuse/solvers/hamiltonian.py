"""Hamiltonian Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass

from undiffuse.core.errors import ArgumentError
from undiffuse.solvers.langevin import positive
from undiffuse.solvers.metropolis import Metropolis


@dataclass(frozen=True, eq=False)
class HMC(Metropolis):
    """Leapfrog steps from a fresh momentum, accepted with probability `min(1, exp(H - H'))` (Neal 2011, section 5.3).

    `H(x, w) = E(x) + |w|^2 / 2`, the momentum `w = L^T p` standard normal, `L L^T` the preconditioner. The target is
    left invariant for any step. `leapfrog` calls of the target per step, and one before the first. One leapfrog step is
    `MALA(step_size**2 / 2)`.

    Args:
        step_size: of a leapfrog step, in units of x; stable for step < 2 standard deviations of the narrowest direction
            (where the preconditioner is the identity). An acceptance near 0.65 is best in many dimensions (Beskos et
            al. 2013).
        leapfrog: number of leapfrog steps. On a Gaussian of variance v, step_size * leapfrog near pi sqrt(v) leads from
            x to -x and does not mix: pi / 2 times is best.
        preconditioner: inverse of the mass: an event's shape (a diagonal) or (D, D), symmetric positive definite. The
            covariance of the target is best.

    Raises:
        ArgumentError: step_size <= 0, leapfrog < 1; at the start, a preconditioner that does not fit, a target without
            energies, or an energy that is not finite.
    """

    leapfrog: int

    def __post_init__(self):
        positive("step_size", self.step_size)
        if not isinstance(self.leapfrog, int) or isinstance(self.leapfrog, bool) or self.leapfrog < 1:
            raise ArgumentError(f"leapfrog is {self.leapfrog!r}: expected a number of steps of at least 1")

    def trajectory(self) -> tuple[float, int]:
        return self.step_size, self.leapfrog
