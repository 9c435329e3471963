"""The Markov kernels by name."""

from __future__ import annotations

from collections.abc import Callable

from undiffuse.solvers.hamiltonian import HMC
from undiffuse.solvers.langevin import MALA, Langevin, Underdamped
from undiffuse.solvers.markov import Kernel
from undiffuse.solvers.tempering import ParallelTempering

KERNELS: dict[str, Callable[..., Kernel]] = {
    "hmc": HMC,
    "langevin": Langevin,
    "mala": MALA,
    "parallel-tempering": ParallelTempering,
    "underdamped": Underdamped,
}
