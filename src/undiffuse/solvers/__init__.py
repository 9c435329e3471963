"""Floor 3: how noise becomes data. One loop, and solvers that are frozen values."""

from undiffuse.core.sums import combine, fuse_sums, weighted_sum
from undiffuse.solvers.adaptive_sde import AdaptiveSDE
from undiffuse.solvers.annealed import AnnealedLangevin, langevin_step
from undiffuse.solvers.base import Bound, Solver, StreamNoise, rates, scales
from undiffuse.solvers.comparing import OWN, compare
from undiffuse.solvers.comparison import Cell, Comparison, Judged, Recommendation
from undiffuse.solvers.compiled import CompiledEnergy
from undiffuse.solvers.corrector import LangevinCorrector, Stay
from undiffuse.solvers.dpm_v3 import DPMv3
from undiffuse.solvers.estimating import model_statistics
from undiffuse.solvers.exponential import DDIM
from undiffuse.solvers.flow import Adaptive
from undiffuse.solvers.gibbs import BlockGibbs
from undiffuse.solvers.grids import GRIDS, Spacing, check_grid, curved_angle, karras, make_grid, mixed
from undiffuse.solvers.hamiltonian import HMC
from undiffuse.solvers.integrate import (
    CORRECTORS,
    DPM_V3,
    SOLVERS,
    Corrector,
    Step,
    get_corrector,
    get_solver,
    integrate,
)
from undiffuse.solvers.kernels import KERNELS
from undiffuse.solvers.langevin import MALA, Langevin, Underdamped
from undiffuse.solvers.markov import Chains, Draws, Kernel
from undiffuse.solvers.multistep import DPMpp2M, Multistep
from undiffuse.solvers.optimised import fit_grid, optimise_grid
from undiffuse.solvers.optimised_grid import OptimisedGrid
from undiffuse.solvers.picard import Picard
from undiffuse.solvers.reverse import SRK, EulerMaruyama, ReverseDiffusion, StochasticHeun
from undiffuse.solvers.runge_kutta import RK4, Euler, Heun, Midpoint, RungeKutta
from undiffuse.solvers.sampling import Sample, sample
from undiffuse.solvers.singlestep import Singlestep
from undiffuse.solvers.statistics import ModelStatistics
from undiffuse.solvers.stochastic import DDPM, EDM
from undiffuse.solvers.tempering import ParallelTempering
from undiffuse.solvers.tuned import Tuned, linear_table
from undiffuse.solvers.tuning import tune

__all__ = [
    "CORRECTORS",
    "DDIM",
    "DDPM",
    "DPM_V3",
    "EDM",
    "GRIDS",
    "HMC",
    "KERNELS",
    "MALA",
    "OWN",
    "RK4",
    "SOLVERS",
    "SRK",
    "Adaptive",
    "AdaptiveSDE",
    "AnnealedLangevin",
    "BlockGibbs",
    "Bound",
    "Cell",
    "Chains",
    "Comparison",
    "CompiledEnergy",
    "Corrector",
    "DPMpp2M",
    "DPMv3",
    "Draws",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Judged",
    "Kernel",
    "Langevin",
    "LangevinCorrector",
    "Midpoint",
    "ModelStatistics",
    "Multistep",
    "OptimisedGrid",
    "ParallelTempering",
    "Picard",
    "Recommendation",
    "ReverseDiffusion",
    "RungeKutta",
    "Sample",
    "Singlestep",
    "Solver",
    "Spacing",
    "Stay",
    "Step",
    "StochasticHeun",
    "StreamNoise",
    "Tuned",
    "Underdamped",
    "check_grid",
    "combine",
    "compare",
    "curved_angle",
    "fit_grid",
    "fuse_sums",
    "get_corrector",
    "get_solver",
    "integrate",
    "karras",
    "langevin_step",
    "linear_table",
    "make_grid",
    "mixed",
    "model_statistics",
    "optimise_grid",
    "rates",
    "sample",
    "scales",
    "tune",
    "weighted_sum",
]
