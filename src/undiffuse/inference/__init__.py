"""Floor 4: questions put to a trained model or a given energy: how large is its partition function?"""

from undiffuse.inference.energies import NearestClass, denoise, out_of_distribution
from undiffuse.inference.partition import (
    Bracket,
    LogPartition,
    annealed_importance_sampling,
    bracket_log_z,
    reverse_annealed_importance_sampling,
)

__all__ = [
    "Bracket",
    "LogPartition",
    "NearestClass",
    "annealed_importance_sampling",
    "bracket_log_z",
    "denoise",
    "out_of_distribution",
    "reverse_annealed_importance_sampling",
]
