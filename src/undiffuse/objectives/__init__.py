"""Floor 3: what training minimises."""

from undiffuse.objectives import times, weights
from undiffuse.objectives.denoising import Denoising, Losses
from undiffuse.objectives.times import TIMES, TimeDistribution
from undiffuse.objectives.weights import WEIGHTS, Weight

__all__ = ["TIMES", "WEIGHTS", "Denoising", "Losses", "TimeDistribution", "Weight", "times", "weights"]
