"""Floor 3: closed-form worlds, in which every quantity of the theory is known."""

from undiffuse.oracles.classifier import MixtureClassifier
from undiffuse.oracles.cumulants import posterior_cumulants
from undiffuse.oracles.empirical import Empirical
from undiffuse.oracles.energies import Funnel, LawEnergy, Ring, Rosenbrock
from undiffuse.oracles.flow import exact_flow
from undiffuse.oracles.gaussian import Gaussian
from undiffuse.oracles.law import Law, LawDenoiser
from undiffuse.oracles.mixture import GaussianMixture
from undiffuse.oracles.rbm import Bernoulli, BernoulliRBM, GaussianRBM

__all__ = [
    "Bernoulli",
    "BernoulliRBM",
    "Empirical",
    "Funnel",
    "Gaussian",
    "GaussianMixture",
    "GaussianRBM",
    "Law",
    "LawDenoiser",
    "LawEnergy",
    "MixtureClassifier",
    "Ring",
    "Rosenbrock",
    "exact_flow",
    "posterior_cumulants",
]
