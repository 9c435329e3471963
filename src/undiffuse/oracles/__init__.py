"""Floor 3: closed-form worlds, in which every quantity of the theory is known."""

from undiffuse.oracles.empirical import Empirical
from undiffuse.oracles.flow import exact_flow
from undiffuse.oracles.gaussian import Gaussian
from undiffuse.oracles.law import Law, LawDenoiser
from undiffuse.oracles.mixture import GaussianMixture

__all__ = ["Empirical", "Gaussian", "GaussianMixture", "Law", "LawDenoiser", "exact_flow"]
