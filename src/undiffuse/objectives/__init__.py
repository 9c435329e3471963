"""Floor 3: what training minimises."""

from undiffuse.objectives import times, weights
from undiffuse.objectives.adjoint import Operator, check_adjoint
from undiffuse.objectives.classification import NoisyClassification
from undiffuse.objectives.concrete import (
    ConcreteScoreMatching,
    DenoisingScoreEntropy,
    Differences,
    ScoreEntropy,
    UniformFlips,
)
from undiffuse.objectives.contrastive import ContrastiveDivergence, Stop
from undiffuse.objectives.denoising import Denoising, Losses
from undiffuse.objectives.generalized import GeneralizedScoreMatching
from undiffuse.objectives.noise_contrastive import NoiseContrastive
from undiffuse.objectives.operators import DenoisingOperator, Gradient, MatrixOperator, SecondOrder
from undiffuse.objectives.score_matching import (
    SCORE_MATCHING,
    SURE,
    DenoisingScoreMatching,
    ExplicitScoreMatching,
    FiniteDifferenceSliced,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)
from undiffuse.objectives.starts import FromData, FromNoise, ReplayBuffer
from undiffuse.objectives.times import TIMES, TimeDistribution
from undiffuse.objectives.weights import WEIGHTS, Weight

__all__ = [
    "SCORE_MATCHING",
    "SURE",
    "TIMES",
    "WEIGHTS",
    "ConcreteScoreMatching",
    "ContrastiveDivergence",
    "Denoising",
    "DenoisingOperator",
    "DenoisingScoreEntropy",
    "DenoisingScoreMatching",
    "Differences",
    "ExplicitScoreMatching",
    "FiniteDifferenceSliced",
    "FromData",
    "FromNoise",
    "GeneralizedScoreMatching",
    "Gradient",
    "ImplicitScoreMatching",
    "Losses",
    "MatrixOperator",
    "NoiseContrastive",
    "NoisyClassification",
    "Operator",
    "ReplayBuffer",
    "ScoreEntropy",
    "SecondOrder",
    "SlicedScoreMatching",
    "Stop",
    "TimeDistribution",
    "UniformFlips",
    "Weight",
    "check_adjoint",
    "times",
    "weights",
]
